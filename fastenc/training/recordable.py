"""Whether a training step can be recorded and replayed, and whether one that was recorded still holds."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as for_all_modules
from torch.optim import SGD, Adam, AdamW, Optimizer

from .losses import LossFunction
from .update import Update

_OPTIMIZERS = (Adam, AdamW, SGD)  # whose fused kernels read the rate and count the steps on the device
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _MODULE_HOOKS)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def why_not(model: nn.Module, optimizer: Optimizer, device: torch.device) -> str | None:
    """Why the step of `model` on `device` cannot be recorded, in words; None if nothing is known against it."""
    if type(optimizer) not in _OPTIMIZERS or not all(group.get("fused") for group in optimizer.param_groups):
        return "the optimiser is not PyTorch's Adam, AdamW or SGD with fused=True"
    tensors = [*model.parameters(), *model.buffers()]
    if elsewhere := {str(tensor.device) for tensor in tensors if tensor.device != device}:
        return f"the model is on {device} and on {', '.join(sorted(elsewhere))}"
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        return "the model is in float64, and a recorded step keeps its learning rate in float32"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"the model is in a {type(model).__name__}"
    if reason := hook_reason(model, optimizer):
        return reason
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, which keeps casts of the weights from step to step"
    return "anomaly detection is on" if torch.is_anomaly_enabled() else None


def hook_reason(model: nn.Module, optimizer: Optimizer) -> str | None:
    """What of the user's own code would have to run within a step, in words; None if nothing."""
    if _has_hooks(optimizer, _STEP_HOOKS):
        return "the optimiser has hooks"
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return "the optimiser's step was replaced"
    for name, module in model.named_modules():
        if _has_hooks(module, _MODULE_HOOKS):
            return f"{name or 'the model'} has hooks"
    if any(_has_hooks(parameter, _TENSOR_HOOKS) for parameter in model.parameters()):
        return "a parameter has hooks"
    return "all modules have hooks" if _has_hooks(for_all_modules, _GLOBAL_HOOKS) else None


def signature(model: nn.Module, loss: LossFunction, update: Update) -> list[Any]:
    """What a recorded step depends on beside values in memory: equal lists, and a replay does what a step would.

    Memory is known by its address. Learning rates are not in it: they are values on the device.
    """
    optimizer = update.optimizer
    modules = [(id(module), module.training, "forward" in vars(module)) for module in model.modules()]
    tensors = [
        (id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
        for tensor in chain(model.parameters(), model.buffers())
    ]
    groups = [
        [(name, _comparable(value)) for name, value in group.items() if name not in ("params", "lr")]
        + [id(parameter) for parameter in group["params"]]
        + [_comparable(group["lr"]) if on_device(group["lr"], group["params"]) else None]
        for group in optimizer.param_groups
    ]
    state = [
        (id(parameter), [(name, _comparable(value)) for name, value in values.items()])
        for parameter, values in optimizer.state.items()
    ]
    options = (update.l1, update.clip_norm, update.clip_value)
    return [id(loss), id(optimizer), options, modules, tensors, groups, state]


def host_state(model: nn.Module) -> list[Any]:
    """What Python code in a step could change and a replay would not: random numbers of the CPU, modules' numbers.

    Only plain attributes are seen. Other state of a model's own, in lists or closures, nobody can see.
    """
    plain = [
        {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for module in model.modules()
    ]
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), plain]


def on_device(lr: float | Tensor, parameters: list[Tensor]) -> bool:
    """Whether a learning rate is a tensor that the parameters' device can read: its user's own, changed in place."""
    return isinstance(lr, Tensor) and not lr.is_cpu and lr.device == parameters[0].device


def _has_hooks(owner: object, names: tuple[str, ...]) -> bool:
    return any(getattr(owner, name, None) for name in names)


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    return value
