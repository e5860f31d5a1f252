"""Peers on a GPU, by stand-ins: how they are called, the weights they get, what is said where they have no place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from gpu_stand_ins import Calls, stand_ins
from planted import dense_case

from benchmarks import blocks, cuda, dense, encoder, harness, stacks
from benchmarks.command import Options
from benchmarks.harness import Case, Side, Sides, find_errors
from benchmarks.peers import gpu

WIDTHS = (128, 32, 16)  # in training FusedMLP with relu wants a multiple of 128
MODES = (stacks.FORWARD, stacks.PARAMETERS, stacks.EVERYTHING)
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = Options(threads=(1,), dtypes=DTYPES, quick=True, seed=0, device="cuda")
TCNN = "tiny-cuda-nn's FullyFusedMLP"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made: Calls = []
    for name, module in stand_ins(made).items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def case_of(mode: str, dtype: torch.dtype) -> Case:
    return replace(dense_case(mode, dtype), sizes={"batch": 32})


def relu_sides(mode: str, dtype: torch.dtype, widths: tuple[int, ...] = WIDTHS) -> Sides:
    torch.manual_seed(0)
    return stacks.encoder_sides(case_of(mode, dtype), 32, widths, models=gpu.RELU)


def same_as_eager(sides: Sides, but: tuple[str, ...] = ()) -> set[str]:
    """The peers there are; each gives the same bits as eager PyTorch does, by which the stand-ins compute."""
    with sides.context():
        present = sides.present()
        expected = present.pop(stacks.EAGER).results()
        for name, side in present.items():
            for actual, e in zip(side.results(), expected, strict=True):
                assert name in but or (actual.dtype == e.dtype and torch.equal(actual, e)), name
        assert not find_errors(sides)
    return {*present}


@pytest.mark.parametrize("mode", MODES)
def test_relu_stacks_in_float32(calls: Calls, mode: str) -> None:
    assert same_as_eager(relu_sides(mode, torch.float32)) == {
        "apex.mlp",
        "apex.fused_dense, relu",
        "Transformer Engine's Linear, relu",
    }
    assert ("MLP", ([*WIDTHS],), {}) in calls
    assert ("Linear", (128, 32), {"params_dtype": torch.float32, "device": torch.device("cpu")}) in calls


@pytest.mark.parametrize("mode", MODES)
def test_relu_stacks_in_bfloat16(calls: Calls, mode: str) -> None:
    expected = {"apex.fused_dense, relu", "Transformer Engine's Linear, relu", "flash-attention's FusedMLP"}
    if mode != stacks.FORWARD:
        expected |= {"flash-attention's FusedDense, relu"}
    assert same_as_eager(relu_sides(mode, torch.bfloat16)) == expected
    there = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    assert ("FusedMLP", (128, 32, 16), {"activation": "relu", **there}) in calls


@pytest.mark.parametrize("mode", [stacks.FORWARD, stacks.EVERYTHING])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_layers_with_gelu_between(calls: Calls, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = {"apex's FusedDenseGeluDense", "Transformer Engine's Linear, gelu"}
    expected |= {"flash-attention's FusedMLP, gelu"} if dtype == torch.bfloat16 else set()
    assert same_as_eager(blocks.gelu_block(case_of("a block", dtype), mode, (16, 48, 24))) == expected


@pytest.mark.parametrize("widths", [(16, 32, 32, 32), (48, 16, 16, 5)])
def test_one_width_without_biases(calls: Calls, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sides = blocks.one_width(case_of("one width", torch.bfloat16), stacks.FORWARD, widths)
    assert TCNN in same_as_eager(sides, but=(TCNN,))
    (out,) = sides.present()[TCNN].results()
    torch.testing.assert_close(out, sides.exact[0].half())  # within float16's rounding
    (_, arguments, _), *_ = [call for call in calls if call[0] == "Network"]
    assert arguments[:2] == (widths[0], widths[-1])
    assert (arguments[2]["n_neurons"], arguments[2]["n_hidden_layers"]) == (widths[1], 2)


@pytest.mark.parametrize(
    ("mode", "dtype", "widths", "name", "reason"),
    [
        (stacks.FORWARD, torch.bfloat16, WIDTHS, "apex.mlp", "no bfloat16"),
        (stacks.FORWARD, torch.float32, WIDTHS, "flash-attention's FusedMLP", "half precision only"),
        (stacks.EVERYTHING, torch.float32, WIDTHS, "flash-attention's FusedDense, relu", "half precision only"),
        (stacks.FORWARD, torch.bfloat16, WIDTHS, "flash-attention's FusedDense, relu", "when no gradient"),
        (stacks.FORWARD, torch.bfloat16, (16, 8), "flash-attention's FusedMLP", "two layers"),
        (stacks.EVERYTHING, torch.bfloat16, (16, 8, 8), "flash-attention's FusedMLP", "a multiple of 128"),
        (stacks.FORWARD, torch.float32, (16, 16, 16), TCNN, "multiplies in float16"),
        (stacks.FORWARD, torch.bfloat16, (16, 8), TCNN, "of one width"),
        (stacks.FORWARD, torch.bfloat16, encoder.WIDTHS, TCNN, "of one width"),
        (stacks.FORWARD, torch.bfloat16, (16, 48, 48), TCNN, "of 16, 32, 64 or 128"),
        (stacks.FORWARD, torch.bfloat16, (20, 16, 16), TCNN, "no multiple of 16"),
        (stacks.FORWARD, torch.bfloat16, (16, 16, 16), TCNN, "has no biases"),
        (stacks.EVERYTHING, torch.bfloat16, (16, 16, 16), TCNN, "has no biases"),
    ],
)
def test_a_peer_that_has_no_place_says_why(
    calls: Calls, mode: str, dtype: torch.dtype, widths: tuple[int, ...], name: str, reason: str
) -> None:
    assert reason in relu_sides(mode, dtype, widths).missing()[name]


@pytest.mark.parametrize("makers", [gpu.RELU, gpu.GELU_BLOCK], ids=["relu", "gelu"])
def test_a_peer_that_is_not_importable_is_a_line(
    monkeypatch: pytest.MonkeyPatch, makers: Mapping[str, stacks.ModelMaker]
) -> None:
    for name in stand_ins([]):
        monkeypatch.setitem(sys.modules, name, None)
    layers = [torch.nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(2)]
    for layer in layers:
        torch.nn.init.zeros_(layer.bias)
    for make in makers.values():
        made = make(layers, torch.zeros(4, 16, dtype=torch.bfloat16), False)
        assert isinstance(made, str)
        assert made.startswith("it is not importable here: ")


def test_a_peer_that_cannot_be_made_is_a_line(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError("Unknown compute capability")

    monkeypatch.setattr(sys.modules["transformer_engine.pytorch"], "Linear", fail)
    why = relu_sides(stacks.FORWARD, torch.float32).missing()["Transformer Engine's Linear, relu"]
    assert why == "it cannot be made here, in float32: OSError: Unknown compute capability"


def test_each_question_asks_them_on_a_gpu_only(calls: Calls) -> None:
    of_dense = replace(dense_case(), device="cuda")
    assert {*gpu.RELU} <= {*dense.setup(of_dense).peers}
    assert not {*gpu.RELU} & {*dense.setup(dense_case()).peers}
    of_encoder = case_of(stacks.FORWARD, torch.float32)
    assert {*gpu.RELU} <= {*encoder.setup(replace(of_encoder, device="cuda"), quick=True).peers}
    assert not {*gpu.RELU} & {*encoder.setup(of_encoder, quick=True).peers}


def test_their_shapes_are_cases_on_a_gpu_only() -> None:
    assert list(blocks.cases(replace(OPTIONS, device="cpu"))) == []
    modes = {case.mode for case in encoder.QUESTION.cases(OPTIONS)}
    assert {blocks.NO_BIASES, *blocks.GELU_MODES} < modes
    assert {case.device for case in blocks.cases(OPTIONS)} == {"cuda"}


def test_a_peer_that_cannot_be_recorded_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(call):
        if call is refusing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: call()

    def refusing() -> tuple:
        return ()

    monkeypatch.setattr(cuda, "recorded", recorded)
    ours, eager = Side(lambda: ()), Side(lambda: ())
    sides = harness.in_graphs(Sides(ours, {"eager": eager, "peer": Side(refusing), "absent": "why"}, (), ()))
    assert {*sides.present()} == {"eager"}
    assert "CUDA graph: RuntimeError: operation not permitted when stream is capturing" in sides.missing()["peer"]
    assert sides.missing()["absent"] == "why"
    with pytest.raises(RuntimeError, match="capturing"):
        harness.in_graphs(Sides(ours, {"eager": Side(refusing)}, (), ()))
