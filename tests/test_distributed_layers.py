"""The layers in DDP and FSDP2 over gloo, two processes: losses and weights as in one process, by the error rule."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_layers import make_model
from torchrun import results, torchrun

CHECKS = (
    "ddp",
    "ddp_static_graph",
    "ddp_no_sync",
    "ddp_uneven",
    "auto_encoder",
    "fsdp",
    "fsdp_encode",
    "fsdp_checkpoint",
    "dtensors",
    "dtensors_refused",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    job = torchrun(2, folder, *(f"distributed_layers:{check}" for check in CHECKS))
    print(job.stdout)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_as_one_process(folder, check):
    results(folder, check, processes=2)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_is_read_by_one(folder):
    saved, _ = results(folder, "fsdp_checkpoint", processes=2)
    model = make_model("stack")
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, saved[name]), name
