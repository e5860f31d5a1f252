"""Twins: classes derived from a module's own, of the same name, with some methods rewritten."""

from __future__ import annotations

import abc
import copyreg
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .rewrite import Method
from .source import CannotRewriteError

_ORIGINAL = "__fastenc_original__"
# Methods of these hand no layer's output to anything.
_BASES = (nn.Module, object)


def original(cls: type) -> type:
    """The class that a twin was made of; any other class itself."""
    return cls.__dict__.get(_ORIGINAL, cls)


def why_no_twin(module: nn.Module) -> str | None:
    """Why the module cannot get another class, in words; None if it can."""
    cls = original(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        return "is in a scripted module"
    if "forward" in module.__dict__:
        return f"is in a {cls.__name__} whose forward was replaced"
    if type(cls) not in (type, abc.ABCMeta):
        return f"is in a {cls.__name__}, which is made by a metaclass"
    return None


def methods(module: nn.Module) -> Iterator[tuple[str, Method | str]]:
    """(name, method) for each in the module's class that may call its children; in place of one that cannot be
    rewritten, the reason."""
    children = {name for name, child in module._modules.items() if child is not None}
    children |= {name for name, value in module.__dict__.items() if type(value) in (list, tuple)}
    for name, function in _functions(original(type(module))).items():
        if isinstance(module, nn.Sequential | nn.ModuleList) or children & _mentioned(function):
            yield name, _method(function)


def refusals(module: nn.Module) -> dict[str, str]:
    """Child -> why the method that uses it cannot be rewritten."""
    functions = _functions(original(type(module)))
    return {
        child: f"is used in {type(module).__name__}.{name}, which {method}"
        for name, method in methods(module)
        if isinstance(method, str)
        for child in module._modules.keys() & _mentioned(functions[name])
    }


@functools.cache
def _functions(cls: type) -> dict[str, types.FunctionType]:
    """What is called when an attribute of an instance is: of each name the first in the order of inheritance."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base not in _BASES:
            for name, value in vars(base).items():
                found.setdefault(name, value)
    is_function = types.FunctionType
    return {name: f for name, f in found.items() if isinstance(f, is_function) and not name.startswith("__")}


@functools.cache
def _method(function: types.FunctionType) -> Method | str:
    try:
        return Method(function)
    except CannotRewriteError as reason:
        return str(reason)


@functools.cache
def _mentioned(function: types.FunctionType) -> frozenset[str]:
    """Names of attributes and globals that the function's code uses, in decorators too."""
    names: set[str] = set()
    pending: list[Any] = [inspect.unwrap(function).__code__]
    while pending:
        code = pending.pop()
        names.update(code.co_names)
        pending += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return frozenset(names)


@functools.cache
def twin(cls: type, choices: tuple[tuple[str, tuple[bool, ...]], ...]) -> type:
    """The class with the sites of the methods so named rewritten, each True one."""

    new: Any = None

    def reduce(self: nn.Module, protocol: Any) -> Any:
        function, args, *state = super(new, self).__reduce_ex__(max(int(protocol), 2))
        if function is copyreg.__newobj__ and args[0] is new:  # type: ignore[attr-defined]
            return (unpickled, (cls, choices, *args[1:]), *state)
        return (function, args, *state)

    body: dict[str, Any] = {name: _known(cls, name).rewritten(wanted) for name, wanted in choices}
    body.update({"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__})
    body.update({"__reduce_ex__": reduce, _ORIGINAL: cls})
    new = type(cls)(cls.__name__, (nn.Module,), body)
    new.__bases__ = (cls,)  # later, so that no __init_subclass__ takes the twin for a class of its own kind
    return new


def _known(cls: type, name: str) -> Method:
    method = _method(_functions(cls)[name])
    assert isinstance(method, Method)
    return method


def unpickled(cls: type, choices: tuple[tuple[str, tuple[bool, ...]], ...], *args: Any) -> nn.Module:
    """An instance of the twin, to be filled with its state; of the class itself where its source is now another."""
    found = _functions(cls)
    read = [(_method(found[name]) if name in found else "is gone", wanted) for name, wanted in choices]
    same = all(isinstance(method, Method) and len(method.sites) == len(wanted) for method, wanted in read)
    kind = twin(cls, choices) if same else cls
    return kind.__new__(kind, *args)
