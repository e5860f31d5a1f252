"""Low-rank adapters (LoRA; Hu et al., 2021): W + (alpha / rank) B A, of which only A and B are trained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .activation import get_activation
from .functional import fused_dense
from .modules import FusedDense
from .pretrained import ModelFileError

ADAPTER = ("lora_a", "lora_b")  # the parameters of an adapter
_METADATA_KEY = "fastenc_lora"


class LoraDense(nn.Module):
    """A FusedDense or nn.Linear, frozen, and an adapter beside its weight.

    Its activation is applied to x @ (weight + scale * lora_b @ lora_a).T + bias, by the layer's own fused kernel. With
    dropout, which is of the adapter's input only, the two products are apart while training.

    Parameters: base.weight [N, K], base.bias [N]; lora_a [rank, K], drawn as a Linear's weight; lora_b [N, rank], 0.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.activation: str = getattr(base, "activation", "identity")
        weight = cast(Tensor, base.weight)
        self.lora_a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_b.shape[0]

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)

    @property
    def weight(self) -> Tensor:
        """The weight with the adapter in it, [N, K]."""
        return cast(Tensor, self.base.weight) + (self.alpha / self.rank) * (self.lora_b @ self.lora_a)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout > 0.0):
            return fused_dense(x, self.weight, self.bias, self.activation)
        low = F.linear(F.dropout(x, self.dropout), self.lora_a)
        out = F.linear(x, cast(Tensor, self.base.weight), self.bias) + (self.alpha / self.rank) * F.linear(
            low, self.lora_b
        )
        return get_activation(self.activation).forward(out)


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> nn.Module:
    """Give every FusedDense and nn.Linear in `model` an adapter, in place, and freeze all else.

    The outputs stay as they are until the adapters are trained. What of the model should be trained beside them, such
    as a new head, is set free afterwards by `requires_grad_(True)`.

    Args:
        rank: of the adapters.
        alpha: the adapters count alpha / rank times.
        dropout: of the adapters' inputs, in training.

    Returns: the model; a new module if the model is itself such a layer.

    Raises:
        ValueError: a wrong option, no such layer, or adapters that are there already.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank is {rank!r}; give a whole number of at least 1")
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; give a finite number above 0")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"the adapters' dropout is {dropout!r}; it must be at least 0 and less than 1")
    if any(isinstance(module, LoraDense) for module in model.modules()):
        raise ValueError("the model has adapters already; merge them first, by merge_lora")
    layers = [module for module in model.modules() if type(module) in (FusedDense, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FusedDense or nn.Linear to adapt")
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise ValueError("layers share a weight, and each would have an adapter of its own; untie them first")
    model.requires_grad_(False)
    return _replace(model, {layer: LoraDense(layer, rank, alpha, dropout).train(layer.training) for layer in layers})


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Put the adapters into the weights, in place: the model is a plain one again, with the same outputs in eval mode
    within rounding, the keys that it had before, and all of its parameters trainable.

    Returns: the model; another module if the model is itself an adapted layer.

    Raises:
        ValueError: the model has no adapters.
    """
    adapted = _adapted(model)
    for layer in adapted.values():
        cast(Tensor, layer.base.weight).copy_(layer.weight)
    return _replace(model, {layer: layer.base for layer in adapted.values()}).requires_grad_(True)


def save_lora(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, and nothing else, to one safetensors file.

    Raises:
        ValueError: the model has no adapters.
        OSError: the file cannot be written; what was there before stays.
    """
    adapted = _adapted(model)
    tensors = {}
    for name, layer in adapted.items():
        for key in ADAPTER:
            tensors[adapter_key(name, key)] = getattr(layer, key)
    layer = next(iter(adapted.values()))
    write_adapters(Path(path), tensors, {"rank": layer.rank, "alpha": layer.alpha, "dropout": layer.dropout})


def load_lora(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Give `model`, a plain one, the adapters that `save_lora` wrote. All of them fit, or none is loaded.

    Returns: as `add_lora`.

    Raises:
        ModelFileError: the file is missing, damaged or something else, or holds adapters of another model; then every
            one that is missing, extra or of another shape is named.
        ValueError: as `add_lora`.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in (FusedDense, nn.Linear)}
    settings, tensors, _ = read_adapters(Path(path), layers)
    model = add_lora(model, **settings)
    with torch.no_grad():
        for name, layer in _adapted(model).items():
            for key in ADAPTER:
                getattr(layer, key).copy_(tensors[adapter_key(name, key)])
    return model


def write_adapters(
    path: Path, tensors: dict[str, Tensor], settings: dict[str, float], metadata: dict[str, str] | None = None
) -> None:
    """Write a file as `save_lora` does: tensors by `adapter_key`, the arguments of `add_lora`, and more metadata.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {**(metadata or {}), _METADATA_KEY: json.dumps(settings)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapters(
    path: Path, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """The settings, tensors and metadata that `write_adapters` wrote, if they are of these layers, by name.

    Raises:
        ModelFileError: as `load_lora`.
    """
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}; give the file that save_lora wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            settings = json.loads(metadata.get(_METADATA_KEY, "null"))
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path} is truncated or damaged ({error}); save the adapters again") from None
    if settings is None:
        raise ModelFileError(f"{path} holds no adapters; give the file that save_lora wrote")
    expected: dict[str, list[int]] = {}
    for name, layer in layers.items():
        N, K = cast(Tensor, layer.weight).shape
        expected |= {adapter_key(name, "lora_a"): [settings["rank"], K]}
        expected |= {adapter_key(name, "lora_b"): [N, settings["rank"]]}
    found = {key: list(tensor.shape) for key, tensor in tensors.items()}
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is not part of the model" for key in found if key not in expected]
    faults += [
        f"{key} is {found[key]}, not {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    if faults:
        raise ModelFileError(f"{path} holds adapters of another model: {'; '.join(faults)}")
    return settings, tensors, metadata


def adapter_key(name: str, key: str) -> str:
    """The name in a file of an adapter's tensor `key`, one of ADAPTER, of the layer of this name."""
    return f"{name}.{key}" if name else key


def _adapted(model: nn.Module) -> dict[str, LoraDense]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraDense)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; add them by add_lora")
    return found


def _replace(model: nn.Module, new: dict[Any, Any]) -> nn.Module:
    """Put modules in the place of others, wherever these are; a module is no part of what replaces it."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new and parent not in new.values():
                setattr(parent, name, new[child])
    return model
