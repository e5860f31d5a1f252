"""What the steps of a site are in one module: `self.fc1` is that layer. Nothing is called to find out."""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .rewrite import Loop, Method, Step

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "known when it runs"})()


def resolve(method: Method, module: nn.Module, steps: Sequence[Step]) -> list[Any]:
    """What chain() will be given, with UNKNOWN for what only the running method knows."""
    names = {**method.globals, **dict.fromkeys(method.variables, UNKNOWN), method.self_name: module}
    return list(_Resolver(names, method.owner).steps(steps))


class _Resolver:
    def __init__(self, names: dict[str, Any], owner: str) -> None:
        self.names = names
        self.owner = owner.lstrip("_")

    def steps(self, steps: Sequence[Step]) -> Iterator[Any]:
        for step in steps:
            if not isinstance(step, Loop):
                yield self.value(step)
                continue
            target = step.statement.target
            items = _items(self.value(step.statement.iter))
            if items is None or not isinstance(target, ast.Name):
                items = [UNKNOWN, UNKNOWN]  # one after the other
            for item in items:
                names = self.names | ({target.id: item} if isinstance(target, ast.Name) else {})
                yield from _Resolver(names, self.owner).steps(step.steps)

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.names.get(node.id, getattr(builtins, node.id, UNKNOWN))
        if isinstance(node, ast.Tuple):
            parts = [self.value(part) for part in node.elts]
            return UNKNOWN if parts and parts[0] is UNKNOWN else tuple(parts)
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {self.value(key): self.value(value) for key, value in pairs if key is not None}
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("__") and not node.attr.endswith("__")
            return _attribute(self.value(node.value), f"_{self.owner}{node.attr}" if private else node.attr)
        if isinstance(node, ast.Subscript):
            return _indexed(self.value(node.value), self.value(node.slice))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return -node.operand.value  # type: ignore[operator]
        if isinstance(node, ast.Slice):
            return slice(*(part and self.value(part) for part in (node.lower, node.upper, node.step)))
        return UNKNOWN


def _items(value: Any) -> list[Any] | None:
    if type(value) in (list, tuple):
        return list(value)
    if isinstance(value, nn.Sequential | nn.ModuleList):
        return list(value._modules.values())
    return None


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, nn.Module):
        for held in (owner.__dict__, owner._modules):
            if name in held:
                return held[name]
    if isinstance(owner, types.ModuleType):  # as torch.nn.functional
        return owner.__dict__.get(name, UNKNOWN)
    return UNKNOWN


def _indexed(owner: Any, index: Any) -> Any:
    if isinstance(owner, nn.ModuleDict):
        return owner._modules.get(index, UNKNOWN)
    items = _items(owner)
    if items is None or not isinstance(index, int | slice):
        return UNKNOWN
    try:
        return items[index]
    except (IndexError, TypeError, ValueError):
        return UNKNOWN
