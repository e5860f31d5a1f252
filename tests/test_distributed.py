"""Trainer under torchrun over gloo: as one process, by the error rule, whatever the number of processes."""

from __future__ import annotations

import re
import shutil

import distributed_trainer as worker
import pytest
import torch
from accuracy import Worst
from torchrun import results, torchrun

from fastenc import Trainer, use_backend
from fastenc.training import ModelCheckpoint
from fastenc.training.distributed import ProcessesError, own_device

CHECKS = (
    "cases",
    "others_of_a_trainer",
    "torchmetrics_add_up",
    "dropout",
    "stops_together",
    "one_writer",
    "bad_input",
    "sharded_model",
    "fails_on_one",
)
BAD_INPUT = {
    "other data": "DataError: process 1 was given other rows than process 0 for x and y; give every process all rows",
    "other rows": "DataError: process 1 was given other rows than process 0 for x and y; give every process all rows",
    "other data, evaluated": "DataError: process 1 was given other rows than process 0 for x and y",
    "other batch_size": "ValueError: process 1 has batch_size 17 and process 0 has 16; make them the same",
    "small batch_size": "ValueError: batch_size is 1 and there are 2 processes; make it at least 2",
    "small loader": "ValueError: the DataLoader's batch_size is 1 and there are 2 processes; make it at least 2",
    "other model": "ValueError: process 1 has parameters [[6, 6], [6], [6, 6], [6]] and process 0 has [[5, 6], [5], "
    "[6, 5], [6]]; make them the same",
    "other batches": "DataError: x gives process 1 another batch than process 0; give every process the same data",
    "sampler": "DataError: x has a DistributedSampler, and the Trainer gives each process its rows of every batch "
    "itself; leave the sampler out",
    "DDP": "ValueError: the model is in a DistributedDataParallel, and the Trainer adds up gradients itself; give it "
    "the model inside, model.module",
    "no checkpoint": "CheckpointError: there is no checkpoint in ",
    "NaN": "FloatingPointError: ",
    "none": "no error",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    job = torchrun(2, folder, *(f"distributed_trainer:{check}" for check in CHECKS))
    print(job.stdout)
    return folder


def assert_rule(several, one, exact):
    worst = Worst()
    worst.add(several, one, exact)
    worst.check()


@pytest.mark.parametrize("case", worker.CASES)
def test_fit_is_that_of_one_process(folder, case):
    first, second = (cases[case] for cases in results(folder, "cases", 2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name  # the same bits on every process
    with use_backend("reference"):  # one operation after another, in eager PyTorch
        assert_rule(first, worker.fit_case(case), worker.fit_case(case, torch.float64))


def test_the_other_methods(folder):
    one = worker.others_of_a_trainer(folder)
    for rank, found in enumerate(results(folder, "others_of_a_trainer", 2)):
        assert found["partial_fit"] == pytest.approx(one["partial_fit"], rel=1e-5)
        assert found["evaluate"] == pytest.approx(one["evaluate"], rel=1e-5)
        torch.testing.assert_close(found["predict"], one["predict"])
        assert len(found["find_lr"]) == len(one["find_lr"]), rank
        assert found["explain"].startswith("step by step: 2 processes share every batch, and add up their gradients")


def test_torchmetrics_add_up_over_processes(folder):
    one = worker.torchmetrics_add_up(folder)
    for found in results(folder, "torchmetrics_add_up", 2):
        assert found["exact"] == pytest.approx(one["exact"])
        assert found["val_exact"] == pytest.approx(one["val_exact"])
        assert found["val_exact"] == pytest.approx(found["val_accuracy"])


def test_processes_drop_other_values(folder):
    (masks, weights), (other_masks, other_weights) = results(folder, "dropout", 2)
    drawn = {tuple(mask.tolist()) for mask in masks + other_masks}
    assert len(drawn) == len(masks) + len(other_masks) == 8  # 2 processes, 2 epochs of 2 steps
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


def test_a_callback_of_one_process_stops_all(folder):
    (losses, history), (none, other_history) = results(folder, "stops_together", 2)
    assert (len(losses), none) == (10, [])
    assert history == other_history
    assert len(history["loss"]) == 3


def test_process_0_alone_writes(folder):
    first, second = results(folder, "one_writer", 2)
    assert first["exists"]
    assert not second["exists"]
    assert (first["bar"], second["bar"]) == (True, False)
    for found in (first, second):
        assert found["logged"]
        assert found["loaded"]
    assert {"log.csv", "by hand/training.safetensors", "by hand/model.safetensors"} <= set(first["files"])


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_on_every_process(folder, case):
    for found in results(folder, "bad_input", 2):
        assert found[case].startswith(BAD_INPUT[case])
        assert "\n" not in found[case]


def test_a_sharded_model_is_refused(folder):
    for found in results(folder, "sharded_model", 2):
        assert found.startswith("ValueError: the model's parameters are sharded, and the Trainer trains whole ones")


def test_an_error_of_one_process_ends_the_others(folder):
    first, second = results(folder, "fails_on_one", 2)
    assert second == "ValueError: only here"
    assert first.startswith("ProcessesError: process 0 of 2 has lost the others")
    assert first.endswith("with fit(resume=...) to go on from the latest checkpoint")


@pytest.fixture(scope="module")
def killed_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, torchrun(2, folder, "distributed_trainer:killed")


def check_against_uninterrupted(folder, numbers):
    with use_backend("reference"):
        one, exact = (worker.lasting_fit(folder, [], dtype) for dtype in (torch.float32, torch.float64))
    assert_rule(numbers, worker.numbers_of(one), worker.numbers_of(exact))


def test_a_killed_process_ends_the_job(killed_job):
    folder, job = killed_job
    assert job.returncode != 0
    assert re.search(r"seen: process 0 of 2 has lost the others \(.*\); one of them has ended", job.stdout), job.stdout
    assert "Signal 9 (SIGKILL)" in job.stdout
    assert ModelCheckpoint(folder / "run").latest.name == "epoch-0001-step-000002"


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_goes_on(killed_job, tmp_path, processes):
    shutil.copytree(killed_job[0] / "run", tmp_path / "run")
    if processes == 1:
        found = [worker.resumed(tmp_path)]
    else:
        job = torchrun(processes, tmp_path, "distributed_trainer:resumed")
        assert job.returncode == 0, job.stdout
        found = results(tmp_path, "resumed", processes)
    for numbers in found:
        check_against_uninterrupted(tmp_path, numbers)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE is 2, and the others cannot be joined .*MASTER_ADDR",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number; start the program with torchrun"),
    ],
)
def test_without_torchrun(monkeypatch, environment, why):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(worker.make_model("autoencoder", torch.float32))
    with pytest.raises(ProcessesError, match=why) as caught:
        trainer.fit(worker.make_x(), verbose=False)
    assert "\n" not in str(caught.value)


def test_one_process_of_torchrun_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer = Trainer(worker.make_model("autoencoder", torch.float32))
    trainer.fit(worker.make_x(), verbose=False)
    assert "by the C++ engine" in trainer.explain()


def test_cuda_is_the_process_s_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == torch.device("cuda:3")
    assert own_device("cuda:1") == torch.device("cuda:1")
    assert own_device("cpu") == torch.device("cpu")
    assert chosen == [torch.device("cuda:3")]
