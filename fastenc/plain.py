"""to_plain(): fastenc's layers as `nn.Linear` and PyTorch's activation modules, for tools that know nothing else."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .activation import LEAKY_RELU_SLOPE
from .convert import unfuse
from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .modules import FusedDense

MODULES: dict[str, Any] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_RELU_SLOPE),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class PlainDense(nn.Module):
    """A FusedDense as `linear` and `activation`. Its state_dict has FusedDense's names, without `linear.`"""

    _PREFIX = "linear."

    def __init__(self, layer: FusedDense) -> None:
        super().__init__()
        self.linear = _linear(layer)
        self.activation = MODULES[layer.activation]()
        self.register_state_dict_post_hook(_rename_on_saving)
        self.register_load_state_dict_pre_hook(_rename_on_loading)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


def _rename_on_saving(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inner = prefix + PlainDense._PREFIX
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _rename_on_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inner = prefix + PlainDense._PREFIX
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(inner)]:
        state[inner + key.removeprefix(prefix)] = state.pop(key)


class PlainEncoder(nn.Module):
    """An Encoder whose `layers` are `nn.Linear`; `activations[i]` follows `layers[i]`, then the dropout but at the end.

    Shapes: `[..., in_features] -> [..., widths[-1]]`.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        layers = [cast(FusedDense, layer) for layer in encoder.layers]
        self.layers = nn.ModuleList(_linear(layer) for layer in layers)
        self.activations = nn.ModuleList(MODULES[layer.activation]() for layer in layers)
        self.dropout = nn.Dropout(encoder.dropout)

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.layers) - 1
        for i, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            x = activation(layer(x))
            if i < last and self.dropout.p > 0:
                x = self.dropout(x)
        return x


class PlainAutoEncoder(nn.Module):
    """An AutoEncoder of plain parts: `decoder(encoder(x))`."""

    def __init__(self, model: AutoEncoder) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class PlainHead(nn.Module):
    """A Classifier or Regressor of plain parts: `head(encoder(x))`."""

    def __init__(self, model: Classifier | Regressor) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


_CONTAINERS: dict[type[nn.Module], type[nn.Module]] = {
    AutoEncoder: PlainAutoEncoder,
    Classifier: PlainHead,
    Regressor: PlainHead,
}


def to_plain(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model with `nn.Linear` and activation modules in the place of fastenc's layers and models.

    For ONNX, PEFT, torchao and whatever else looks for `nn.Linear`. Parameters are shared with the model, and the names
    in `state_dict` stay the same. An Encoder's `layers[i]` are `nn.Linear`; so is a FusedDense without an activation;
    any other FusedDense becomes a module with a `linear` and an `activation`. Hooks, `requires_grad` and the training
    mode are kept. What `fuse` did is undone.

    Args:
        model: any module with FusedDense layers or fastenc's models in it, or one of these itself.
        inplace: change the model's own submodules, rather than those of a copy; what is returned is still what to use,
            since the model itself may be one that is replaced.

    Raises:
        TypeError: the model is no nn.Module, or cannot be copied.
        ValueError: a layer is of a subclass of FusedDense, for example parametrised; what it does is not known.
    """
    return _convert(unfuse(model, inplace), "", {})


def _convert(module: nn.Module, name: str, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    if isinstance(module, FusedDense) and type(module) is not FusedDense:
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__}, a subclass of FusedDense that cannot be made plain; "
            f"remove its parametrizations (torch.nn.utils.parametrize.remove_parametrizations), or replace it by a "
            f"FusedDense"
        )
    plain = module
    if isinstance(module, FusedDense):
        plain = _linear(module) if module.activation == "identity" else PlainDense(module).train(module.training)
    elif type(module) is Encoder and all(type(layer) is FusedDense and not _hooked(layer) for layer in module.layers):
        plain = PlainEncoder(module).train(module.training)
    else:
        for child, part in list(module._modules.items()):
            if part is not None:
                module._modules[child] = _convert(part, f"{name}.{child}".lstrip("."), done)
        if type(module) in _CONTAINERS:
            plain = _CONTAINERS[type(module)](module)
    if plain is not module:
        plain.training = module.training
        for hooks in _HOOKS:
            plain.__dict__[hooks] = module.__dict__[hooks]
    done[id(module)] = done[id(plain)] = plain
    return plain


def _hooked(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in _HOOKS)


def _linear(layer: FusedDense) -> nn.Linear:
    """With the layer's own parameters."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear
