"""fuse() and unfuse(): Linear layers and the activations after them in one kernel, in a model as it is.

Every module stays where it is, with its parameters, hooks and names. What changes is the code that calls them: a module
whose methods hand the output of a Linear layer to an activation becomes an instance of a twin class, derived from its
own, with those methods rewritten to call `chain`, which decides at each call whether it may fuse. So whatever is done
to the model later (hooks, adapters, quantised weights, other layers in place of these) is seen at the next call.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .chain import Run, activation_of, plan, why_not_linear
from .report import FusionReport
from .resolve import UNKNOWN, resolve
from .twin import methods, original, refusals, twin, why_no_twin


def fuse(model: nn.Module, inplace: bool = False, verbose: bool = True) -> nn.Module:
    """Run each Linear layer of the model and the activation after it as one fused layer, and chains of them as a stack.

    Found are layers in `nn.Sequential` and in methods written in Python, there as `F.relu(self.fc1(x))`, `x.relu()`,
    in statements that follow one another and in loops. Results are those of the model within rounding, in training and
    in eval mode. All modules stay in place: parameters are the same objects, and names in `state_dict`, hooks, tied
    weights, dtypes and devices are as they were. Left alone is what cannot be proven equal: layers of other classes
    (subclasses and parametrised layers among them), layers with hooks, outputs that are used before the activation,
    scripted modules, methods whose source is not at hand. The report lists them.

    Args:
        model: any module.
        inplace: change the model itself. Otherwise a copy of its structure is changed, with the same parameters and
            buffers.
        verbose: print what was fused, what was not, and why; `fusion_report` gives the same.

    Returns:
        The fused model.

    Raises:
        TypeError: the model is no `nn.Module`, or its structure cannot be copied.
    """
    model = _own(model, inplace)
    for module in list(model.modules()):
        choices = _choices(module)
        if choices and why_no_twin(module) is None:
            module.__class__ = twin(original(type(module)), choices)
    if verbose:
        print(fusion_report(model))
    return model


def unfuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model with the code that it had before `fuse`; arguments and errors as there."""
    model = _own(model, inplace)
    for module in model.modules():
        if original(type(module)) is not type(module):
            module.__class__ = original(type(module))
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What `fuse` does with the model as it is now: what runs fused, what does not, and why. Nothing is changed."""
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    fused: list[str] = []
    later: list[str] = []
    seen: set[int] = set()
    for module in model.modules():
        if why_no_twin(module) is not None:
            continue
        for name, method in methods(module):
            if isinstance(method, str):
                continue
            for site in method.sites:
                steps = resolve(method, module, site.steps)
                if not _is_wanted(module, steps):
                    continue
                runs = [part for part in plan(steps) if isinstance(part, Run)]
                for run in runs:
                    seen.update(map(id, run.layers))
                    fused.append(" -> ".join(_shown(names[id(m)], a) for m, a in zip(*run, strict=True)))
                if not runs and UNKNOWN in steps:
                    where = f"{names[id(module)]}: " if names[id(module)] else ""
                    later.append(f"{where}{type(module).__name__}.{name}, line {site.line}")
    return FusionReport(tuple(fused), tuple(later), dict(_left(model, seen)))


def _shown(name: str, activation: str) -> str:
    return name if activation == "identity" else f"{name} + {activation}"


def _own(model: nn.Module, inplace: bool) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, and this is a {type(model).__name__}")
    if inplace:
        return model
    shared: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            shared.update({id(value): value for value in held.values() if isinstance(value, torch.Tensor)})
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise TypeError(
            f"the structure of this {type(model).__name__} cannot be copied ({error}); "
            "change the model itself: inplace=True"
        ) from error


def _choices(module: nn.Module) -> tuple[tuple[str, tuple[bool, ...]], ...]:
    """(name, which of its sites) for each method of the module's class that is to be rewritten."""
    choices = []
    for name, method in methods(module):
        if isinstance(method, str):
            continue
        wanted = tuple(_is_wanted(module, resolve(method, module, site.steps)) for site in method.sites)
        if any(wanted):
            choices.append((name, wanted))
    return tuple(choices)


def _is_wanted(module: nn.Module, steps: Sequence[Any]) -> bool:
    """Whether one of the steps may be a Linear layer, and the one after it its activation; now, or at a later call."""
    for layer, after in itertools.pairwise(steps):
        if type(layer) is nn.Linear and (after is UNKNOWN or activation_of(after)):
            return True
        if layer is UNKNOWN and after is not UNKNOWN and activation_of(after):
            return any(type(part) is nn.Linear for part in module.modules())
    return False


def _left(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, str]]:
    """(name, reason) for each Linear layer, or layer like one, that is not among those seen."""
    for path, parent in model.named_modules():
        for name, layer in parent.named_children():
            kind = layer.original_name if isinstance(layer, torch.jit.ScriptModule) else type(layer).__name__
            if id(layer) in seen or not (isinstance(layer, nn.Linear) or kind.endswith("Linear")):
                continue
            seen.add(id(layer))
            reason = why_no_twin(parent) or why_not_linear(layer) or refusals(parent).get(name)
            yield f"{path}.{name}".lstrip("."), reason or "no activation follows it at once"
