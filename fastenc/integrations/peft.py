"""PEFT: LoRA on a layer whose activation is part of it, and comes after the adapter."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional as F

from ..activation import get_activation
from ..encoder import is_plain
from ..functional import fused_dense
from ..modules import FusedDense


def register(config: LoraConfig) -> LoraConfig:
    """Let the configuration adapt FusedDense, and so the layers of encoders. Returns it.

    PEFT does not keep this with saved adapters: load them by `PeftModel.from_pretrained(model, folder,
    config=register(LoraConfig.from_pretrained(folder)))`. Without it PEFT says that the layer is not supported. Models
    from `fuse` need nothing; their layers are nn.Linear, and PEFT's own take their place.
    """
    config._register_custom_module({FusedDense: LoraFusedDense})
    return config


class LoraFusedDense(lora.Linear):
    """PEFT's adapted layer for FusedDense: activation(x @ (weight + scaling * B @ A).T + bias), in one kernel.

    While adapters drop out of their input, or have another dtype than the layer, the products are apart, as PEFT's.
    """

    def _get_in_out_features(self, module: FusedDense) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"FusedDense takes plain LoRA alone ({error}); for its variants: fastenc.to_plain(model)"
            ) from None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("a FusedDense takes one adapter for the whole batch: set_adapter instead of adapter_names")
        base = self.get_base_layer()
        if not is_plain(base, FusedDense):
            raise ValueError(
                f"an adapter is for a FusedDense itself, and this {type(base).__name__} has hooks, or a forward of its "
                "own; put hooks on the adapted layer"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return base(x, *args, **kwargs)
        drops = self.training and any(getattr(self.lora_dropout[name], "p", 0.0) > 0.0 for name in names)
        if not drops and all(self.lora_A[name].weight.dtype == base.weight.dtype for name in names):
            weight, bias = base.weight, base.bias
            for name in names:
                weight = weight + self.scaling[name] * (self.lora_B[name].weight @ self.lora_A[name].weight)
                if self.lora_bias[name]:
                    addition = self.scaling[name] * self.lora_B[name].bias
                    bias = addition if bias is None else bias + addition
            return fused_dense(x, weight, bias, base.activation)
        preact = F.linear(x, base.weight, base.bias)
        dtype = preact.dtype
        for name in names:
            low = self.lora_A[name](self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype)))
            preact = preact + self.lora_B[name](low) * self.scaling[name]
        return get_activation(base.activation).forward(preact.to(dtype))
