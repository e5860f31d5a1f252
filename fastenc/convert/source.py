"""A method's source as a syntax tree, and back: new code in place of the old, in the function's own surroundings."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import symtable
import types
from typing import cast

_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


class CannotRewriteError(Exception):
    """The message says why, in words that follow the method's name."""


def innermost(function: types.FunctionType) -> types.FunctionType:
    """What the function's decorators call in the end.

    Raises:
        CannotRewriteError: a decorator holds it elsewhere than in one of its variables, out of the reach of `replaced`.
    """
    while hasattr(function, "__wrapped__"):
        inner = function.__wrapped__
        if not isinstance(inner, types.FunctionType) or _holder(function, inner) is None:
            raise CannotRewriteError("has a decorator that does not show what it calls")
        function = inner
    return function


def _holder(wrapper: types.FunctionType, inner: types.FunctionType) -> int | None:
    """Which of the wrapper's variables holds what it wraps; None if that is not clear."""
    holding = []
    for i, cell in enumerate(wrapper.__closure__ or ()):
        try:
            if cell.cell_contents is inner:
                holding.append(i)
        except ValueError:  # empty
            continue
    return holding[0] if len(holding) == 1 else None


def replaced(function: types.FunctionType, code: types.CodeType, variables: dict[str, object]) -> types.FunctionType:
    """The function with other code in what its decorators call, which finds `variables` besides those it had."""
    if hasattr(function, "__wrapped__"):
        wrapped = replaced(function.__wrapped__, code, variables)
        closure = list(function.__closure__ or ())
        closure[cast(int, _holder(function, function.__wrapped__))] = types.CellType(wrapped)
        itself = _holder(function, function)  # some ask whether they are what is called
        if itself is not None:
            closure[itself] = types.CellType()
        outer = _like(function, function.__code__, tuple(closure))
        outer.__wrapped__ = wrapped  # type: ignore[attr-defined]
        if itself is not None:
            closure[itself].cell_contents = outer
        return outer
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update({name: types.CellType(value) for name, value in variables.items()})
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def _like(function: types.FunctionType, code: types.CodeType, closure: tuple) -> types.FunctionType:
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__module__ = function.__module__
    new.__doc__ = function.__doc__
    new.__annotations__ = function.__annotations__
    new.__dict__.update(function.__dict__)
    return new


def parsed(function: types.FunctionType) -> ast.FunctionDef:
    """The definition, without decorators, at the lines that it has in its file.

    Raises:
        CannotRewriteError: there is no source, or it compiles to other code than the function runs.
    """
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise CannotRewriteError("has no Python source") from None
    source = "".join(lines)
    indented = source[:1].isspace()
    try:
        tree = ast.parse(f"if 1:\n{source}" if indented else source)
    except SyntaxError:
        raise CannotRewriteError("has a source that cannot be read by itself") from None
    definition = cast(ast.If, tree.body[0]).body[0] if indented else tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise CannotRewriteError("is not written as a plain function")
    definition.decorator_list = []
    ast.increment_lineno(definition, first - 1 - indented)
    if not _same(compiled(definition, function), function.__code__):
        raise CannotRewriteError("runs other code than its source shows")
    return definition


def compiled(definition: ast.FunctionDef, function: types.FunctionType, *variables: str) -> types.CodeType:
    """Code of the definition, as in the function's class and with the variables around it, and further ones."""
    around = [name for name in function.__code__.co_freevars if name != "__class__"]
    # A call of what the file imports, as F.relu, compiles to other code than a method's.
    imports = "".join(f"import {name}\n" for name in _imported("".join(inspect.findsource(function)[0])))
    tree = ast.parse(f"{imports}def outer({', '.join([*around, *variables])}):\n  class {owner(function)}: pass")
    cast(ast.ClassDef, cast(ast.FunctionDef, tree.body[-1]).body[0]).body = [definition]
    flags = function.__code__.co_flags & _FUTURES
    ast.fix_missing_locations(tree)
    code = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for name in ("outer", owner(function), definition.name):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=function.__code__.co_qualname)
    return code


@functools.lru_cache(maxsize=32)
def _imported(source: str) -> tuple[str, ...]:
    table = symtable.symtable(source, "source", "exec")
    return tuple(sorted(symbol.get_name() for symbol in table.get_symbols() if symbol.is_imported()))


def owner(function: types.FunctionType) -> str:
    """The class that the function is written in: it is part of names as self.__private."""
    name = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return name if name.isidentifier() else "_"


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    fields = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    if any(getattr(a, field) != getattr(b, field) for field in fields) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        _same(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else repr(x) == repr(y)
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )
