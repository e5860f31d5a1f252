"""Stand-ins for peers on a GPU: modules with their signatures that compute by eager PyTorch and note their calls."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Calls = list[tuple[str, tuple, dict[str, Any]]]


def unset(*shape: int, **options: Any) -> nn.Parameter:
    """NaN, where a constructor leaves memory as it finds it: weights that are not handed over are seen."""
    return nn.Parameter(torch.full(shape, torch.nan, **options))


class Noted(nn.Module):
    calls: Calls

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.calls.append((type(self).__name__, arguments, options))
        self.build(*arguments, **options)


def stand_ins(calls: Calls) -> dict[str, ModuleType | None]:
    """By the name in sys.modules; what is constructed is noted in `calls`."""

    class Base(Noted):
        pass

    Base.calls = calls

    class MLP(Base):
        def build(self, mlp_sizes: list[int], bias: bool = True, activation: str = "relu") -> None:
            assert bias
            assert activation == "relu"
            self.weights, self.biases = [], []
            for i, (K, N) in enumerate(pairwise(mlp_sizes)):
                self.weights.append(unset(N, K))
                self.biases.append(unset(N))
                setattr(self, f"weight_{i}", self.weights[-1])
                setattr(self, f"bias_{i}", self.biases[-1])

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype != torch.bfloat16
            for weight, bias in zip(self.weights, self.biases, strict=True):
                x = torch.relu(F.linear(x, weight, bias))
            return x

    class ApexDense(Base):
        def build(self, in_features: int, out_features: int, bias: bool = True) -> None:
            assert bias
            self.weight, self.bias = unset(out_features, in_features), unset(out_features)

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight, self.bias)

    class FusedDenseGeluDense(Base):
        def build(self, in_features: int, intermediate_features: int, out_features: int, bias: bool = True) -> None:
            assert bias
            self.weight1, self.bias1 = unset(intermediate_features, in_features), unset(intermediate_features)
            self.weight2, self.bias2 = unset(out_features, intermediate_features), unset(out_features)

        def forward(self, input: Tensor) -> Tensor:
            hidden = F.gelu(F.linear(input, self.weight1, self.bias1), approximate="tanh")
            return F.linear(hidden, self.weight2, self.bias2)

    class FusedDense(Base):
        def build(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            return_residual: bool = False,
            device: Any = None,
            dtype: Any = None,
        ) -> None:
            assert bias
            assert not return_residual
            self.weight = unset(out_features, in_features, device=device, dtype=dtype)
            self.bias = unset(out_features, device=device, dtype=dtype)

        def forward(self, x: Tensor, process_group: None = None) -> Tensor:
            assert x.dtype in (torch.float16, torch.bfloat16)
            return F.linear(x, self.weight, self.bias)

    class FusedMLP(Base):
        def build(
            self,
            in_features: int,
            hidden_features: int,
            out_features: int | None = None,
            bias1: bool = True,
            bias2: bool = True,
            activation: str = "gelu_approx",
            return_residual: bool = False,
            checkpoint_lvl: int = 0,
            heuristic: str = "auto",
            device: Any = None,
            dtype: Any = None,
        ) -> None:
            assert (bias1, bias2, return_residual) == (True, True, False)
            self.activation = activation
            self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
            self.fc2 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)

        def forward(self, x: Tensor, process_group: None = None) -> Tensor:
            assert self.training == torch.is_grad_enabled()  # or it would not save what backward needs
            assert not self.training or x.shape[-1] % (128 if self.activation == "relu" else 8) == 0
            z = self.fc1(x)
            return self.fc2(torch.relu(z) if self.activation == "relu" else F.gelu(z, approximate="tanh"))

    class Linear(Base):
        def build(
            self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None, device: Any = "cuda"
        ) -> None:
            assert bias
            self.weight = unset(out_features, in_features, device=device, dtype=params_dtype)
            self.bias = unset(out_features, device=device, dtype=params_dtype)

        def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
            assert inp.dtype == self.weight.dtype
            return F.linear(inp, self.weight, self.bias)

    class Network(Base):
        """Row-major weights one after the other; input and output padded to multiples of 16, fp16 out."""

        def build(self, n_input_dims: int, n_output_dims: int, network_config: dict, seed: int = 1337) -> None:
            assert network_config["otype"] == "FullyFusedMLP"
            assert (network_config["activation"], network_config["output_activation"]) == ("ReLU", "ReLU")
            width, hidden = network_config["n_neurons"], network_config["n_hidden_layers"]
            assert width in (16, 32, 64, 128)
            assert hidden > 0
            self.n_output_dims = n_output_dims
            self.shapes = [(width, -(-n_input_dims // 16) * 16), *[(width, width)] * (hidden - 1)]
            self.shapes.append((-(-n_output_dims // 16) * 16, width))
            self.params = unset(sum(rows * columns for rows, columns in self.shapes))
            self.jit_fusion = False

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            assert self.jit_fusion
            weights = self.params.split([rows * columns for rows, columns in self.shapes])
            for weight, shape in zip(weights, self.shapes, strict=True):
                x = torch.relu(x @ weight.view(shape).T)
            return x[:, : self.n_output_dims].half()

    ApexDense.__name__ = "FusedDense"

    def module(name: str, **members: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(members)
        return made

    modules = [
        module("apex"),
        module("apex.mlp", MLP=MLP),
        module("apex.fused_dense", FusedDense=ApexDense, FusedDenseGeluDense=FusedDenseGeluDense),
        module("flash_attn"),
        module("flash_attn.ops"),
        module("flash_attn.ops.fused_dense", FusedDense=FusedDense, FusedMLP=FusedMLP),
        module("transformer_engine"),
        module("transformer_engine.pytorch", Linear=Linear),
        module("tinycudann", Network=Network, supports_jit_fusion=lambda: True),
    ]
    return {made.__name__: made for made in modules}
