"""What the steps of a site are in one module: `self.fc1` is that layer. Nothing is called to find out."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .rewrite import Loop, Method, Step

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "known when it runs"})()


def resolve(method: Method, module: nn.Module, steps: Sequence[Step]) -> list[Any]:
    """What chain() will be given, with UNKNOWN for what only the running method knows."""
    variables = dict.fromkeys(method.variables, UNKNOWN)
    return list(_resolved(steps, {**variables, method.self_name: module}, method.globals))


def _resolved(steps: Sequence[Step], variables: dict[str, Any], around: dict[str, Any]) -> Iterator[Any]:
    for step in steps:
        if not isinstance(step, Loop):
            yield _value(step, variables, around)
            continue
        target = step.statement.target
        items = _items(_value(step.statement.iter, variables, around))
        if items is None or not isinstance(target, ast.Name):
            for _ in range(2):  # one after the other
                yield from _resolved(step.steps, variables, around)
        else:
            for item in items:
                yield from _resolved(step.steps, {**variables, target.id: item}, around)


def _items(value: Any) -> list[Any] | None:
    if type(value) in (list, tuple):
        return list(value)
    if isinstance(value, nn.Sequential | nn.ModuleList):
        return list(value._modules.values())
    return None


def _value(node: ast.expr, variables: dict[str, Any], around: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id in variables:
            return variables[node.id]
        return around.get(node.id, getattr(builtins, node.id, UNKNOWN))
    if isinstance(node, ast.Tuple):
        parts = [_value(part, variables, around) for part in node.elts]
        return UNKNOWN if parts and parts[0] is UNKNOWN else tuple(parts)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(k, variables, around): _value(v, variables, around) for k, v in pairs if k is not None}
    if isinstance(node, ast.Attribute):
        return _attribute(_value(node.value, variables, around), node.attr)
    if isinstance(node, ast.Subscript):
        return _indexed(_value(node.value, variables, around), _value(node.slice, variables, around))
    return UNKNOWN


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, nn.Module):
        for held in (owner.__dict__, owner._modules):
            if name in held:
                return held[name]
        return UNKNOWN
    if isinstance(owner, type(ast)):  # a module of Python, as torch.nn.functional
        return owner.__dict__.get(name, UNKNOWN)
    return UNKNOWN


def _indexed(owner: Any, index: Any) -> Any:
    if isinstance(owner, nn.ModuleDict):
        return owner._modules.get(index, UNKNOWN)
    items = _items(owner)
    if items is not None and isinstance(index, int) and -len(items) <= index < len(items):
        return items[index]
    return UNKNOWN
