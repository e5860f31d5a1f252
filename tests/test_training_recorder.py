"""CUDA graphs as PyTorch's notes ask for them: by stand-ins for torch.cuda, and on a GPU where there is one."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

from fastenc.training.recorder import CudaRecorder

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


class Cuda:
    """Notes what is asked of torch.cuda, in order."""

    def __init__(self, monkeypatch) -> None:
        self.said: list[str] = []
        outer = self
        self.current = "default stream"

        class Stream:
            def __init__(self, device=None, name="side stream") -> None:
                self.name = name
                self.device = "cpu"

            def wait_stream(self, other) -> None:
                outer.said.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def replay(self) -> None:
                outer.said.append("replay")

            def reset(self) -> None:
                outer.said.append("reset")

        @contextmanager
        def stream(used):
            before, outer.current = outer.current, used.name
            yield
            outer.current = before

        @contextmanager
        def graph(made, stream):
            outer.said.append(f"record on {stream.name}")
            yield
            outer.said.append("recorded")

        @contextmanager
        def device(index):
            yield

        fakes = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "device": device,
            "current_stream": lambda device=None: Stream(name=outer.current),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: outer.said.append(f"sync debug mode {mode}"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    return Cuda(monkeypatch)


def test_only_gpus() -> None:
    assert CudaRecorder().why_not(DEVICE) is None
    assert CudaRecorder().why_not(torch.device("cpu")) == "the model is on cpu, and CUDA graphs are for GPUs"


def test_all_work_is_on_one_side_stream_in_order_with_the_rest(cuda) -> None:
    recorder = CudaRecorder()
    for _ in range(2):
        with recorder.stream(DEVICE):
            cuda.said.append(f"work on {cuda.current}")
    once = ["side stream waits for default stream", "work on side stream", "default stream waits for side stream"]
    assert cuda.said == once * 2
    assert len(recorder._streams) == 1  # autograd remembers streams: another one would be waited for


def test_an_error_inside_is_still_waited_for(cuda) -> None:
    with pytest.raises(KeyboardInterrupt), CudaRecorder().stream(DEVICE):
        raise KeyboardInterrupt
    assert cuda.said[-1] == "default stream waits for side stream"


def test_recording_on_the_stream_in_use(cuda) -> None:
    recorder = CudaRecorder()
    with recorder.stream(DEVICE):
        replay = recorder.record(lambda: cuda.said.append("work"))
        replay()
    assert cuda.said[1:-1] == ["record on side stream", "work", "recorded", "replay"]


def test_a_recording_that_fails_is_reset(cuda) -> None:
    def work() -> None:
        raise ValueError("not like this")

    with pytest.raises(ValueError, match="not like this"):
        CudaRecorder().record(work)
    assert cuda.said[-3:] == ["reset", "record on default stream", "recorded"]  # which frees the random numbers


def test_waits_are_told_apart_from_other_warnings(cuda) -> None:
    waits: list[str] = []

    def watched() -> None:
        with CudaRecorder().watch(waits):
            warn_of_three_things()

    def warn_of_three_things() -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)
        warnings.warn("of the user's own", stacklevel=1)

    with pytest.warns(UserWarning, match="of the user's own") as others:
        watched()
    assert len(waits) == 1
    assert waits[0].startswith(f"it waits for the GPU ({__file__}, line ")
    assert len(others) == 1
    assert cuda.said == ["sync debug mode warn", "sync debug mode 0"]


def test_the_mode_comes_back_after_an_error(cuda) -> None:
    with pytest.raises(ValueError, match="inside"), CudaRecorder().watch([]):
        raise ValueError("inside")
    assert cuda.said[-1] == "sync debug mode 0"


@needs_gpu
def test_a_replay_reads_and_writes_the_same_memory() -> None:
    recorder, x, out = CudaRecorder(), torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    with recorder.stream(DEVICE):
        out.copy_(x * 2)
        replay = recorder.record(lambda: out.copy_(x * 2))
    x.fill_(3)
    replay()
    assert out.tolist() == [6.0] * 5


@needs_gpu
def test_waits_on_a_gpu() -> None:
    waits: list[str] = []
    with CudaRecorder().watch(waits):
        torch.ones(5, device=DEVICE).sum().item()
    assert len(waits) == 1


@needs_gpu
def test_random_numbers_go_on_after_a_recording_that_failed() -> None:
    recorder, x = CudaRecorder(), torch.ones(5, device=DEVICE)
    with recorder.stream(DEVICE), pytest.raises(RuntimeError):
        recorder.record(lambda: torch.rand(5, device=DEVICE).sum().item())
    assert torch.rand(5, device=DEVICE).add(x).isfinite().all()
