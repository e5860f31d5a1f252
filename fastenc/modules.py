"""FusedDense: `nn.Linear` and the activation after it, as one layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .activation import get_activation
from .functional import fused_dense


class FusedDense(nn.Module):
    """`activation(x @ weight.T + bias)` in one fused kernel, forward and backward.

    Parameters, their names, shapes and initialisation are `nn.Linear`'s, so that `state_dict` goes both ways. It is
    not a subclass of `nn.Linear`: tools that look for one would put their change after the activation.

    Args:
        in_features: K, the size of the last dimension of the input.
        out_features: N, the size of the last dimension of the output.
        bias: whether to add a learned bias `[N]`.
        activation: a name of `fastenc.activation.ACTIVATIONS`.
        device, dtype: of the parameters, as for `nn.Linear`.

    Shapes: `[..., K] -> [..., N]`, any leading dimensions. Any dtype that `nn.Linear` takes; fused in fp32, bf16 and
    fp16.

    Raises:
        ValueError: the activation is unknown.
        RuntimeError: as `nn.Linear`, where shapes, dtypes or devices do not match.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        get_activation(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values as `nn.Linear` does: uniform in +-1/sqrt(in_features)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._parameters  # `self.weight` finds it there, after looking in vain elsewhere
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:  # they are computed by a parametrisation
            return fused_dense(x, self.weight, self.bias, self.activation)
        return fused_dense(x, weight, parameters["bias"], self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )
