"""Method: where a method only passes a value from one call to the next, and the same method with `chain` there.

That is `F.relu(self.fc1(x))`, the same in two statements, `self.fc1(x).relu()`, or a loop over layers. All else,
control flow and side effects among it, stays as it is written.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

from .chain import METHODS, chain
from .source import compiled, innermost, owner, parsed, replaced

CHAIN = "__fastenc_chain__"
# With one of these a method can see its own variables by name.
_SEES_VARIABLES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"}
_ITERATES = {"range", "enumerate", "zip", "reversed"}


class Loop(NamedTuple):
    """Steps that a `for` statement repeats."""

    statement: ast.For
    steps: Sequence[Step]


# A step: the callee; a Constant with a method's name; a Tuple as chain takes it; a loop of steps.
Step = ast.expr | Loop


class Site(NamedTuple):
    """A place in a method where a value goes from one step to the next."""

    steps: Sequence[Step]
    line: int


class Method:
    """A method, and the `sites` in it that `chain` could take over.

    Raises:
        CannotRewriteError: the source is not to be had, or not to be trusted.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self._inner = innermost(function)
        self._tree = parsed(self._inner)
        arguments = [*self._tree.args.posonlyargs, *self._tree.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.owner = owner(self._inner)
        self.sites: list[Site] = []

        def note(site: Site) -> bool:
            self.sites.append(site)
            return False

        _Transformer(copy.deepcopy(self._tree), note).run()

    @property
    def globals(self) -> dict[str, object]:
        return self._inner.__globals__

    @property
    def variables(self) -> tuple[str, ...]:
        """Names that are the method's own, whatever they are elsewhere."""
        code = self._inner.__code__
        return (*code.co_varnames, *code.co_cellvars, *code.co_freevars)

    def rewritten(self, wanted: Sequence[bool]) -> types.FunctionType:
        """The method with those of its sites changed, in the same decorators."""
        choice = iter(wanted)
        tree = copy.deepcopy(self._tree)
        _Transformer(tree, lambda site: next(choice)).run()
        return replaced(self.function, compiled(tree, self._inner, CHAIN), {CHAIN: chain})


def is_simple(node: ast.expr | None) -> bool:
    """Whether looking this up runs no code but attribute look-ups and indexing: `self.layers[i + 1]`."""
    if isinstance(node, ast.Attribute | ast.Starred):
        return is_simple(node.value)
    if isinstance(node, ast.Subscript):
        return is_simple(node.value) and is_simple(node.slice)
    if isinstance(node, ast.Slice):
        return all(map(is_simple, (node.lower, node.upper, node.step)))
    if isinstance(node, ast.BinOp):
        return is_simple(node.left) and is_simple(node.right)
    if isinstance(node, ast.UnaryOp):
        return is_simple(node.operand)
    return node is None or isinstance(node, ast.Name | ast.Constant)


def _iterates(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ITERATES:
        return not node.keywords and all(_iterates(arg) for arg in node.args)
    return is_simple(node)


def _link(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """(step, its input) if the node calls one thing on one value."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args and not node.keywords:
        return ast.copy_location(ast.Constant(node.func.attr), node), node.func.value
    if not node.args or not is_simple(node.func) or isinstance(node.func, ast.Constant):
        return None
    x, *more = node.args
    if isinstance(x, ast.Starred) or not all(isinstance(arg, ast.Constant) for arg in more):
        return None
    if not all(isinstance(keyword.value, ast.Constant) and keyword.arg for keyword in node.keywords):
        return None
    if not more and not node.keywords:
        return node.func, x
    names: list[ast.expr | None] = [ast.Constant(keyword.arg) for keyword in node.keywords]
    keywords = ast.Dict(names, [keyword.value for keyword in node.keywords])
    return ast.copy_location(ast.Tuple([node.func, ast.Tuple(more, ast.Load()), keywords], ast.Load()), node), x


def _unroll(node: ast.expr | None) -> tuple[list[Step], ast.expr | None]:
    """The steps that end in this value, first one first, and what goes into the first."""
    steps: list[Step] = []
    while node is not None and (link := _link(node)) is not None:
        steps.insert(0, link[0])
        node = link[1]
    return steps, node


def _names(*nodes: ast.AST) -> Iterator[str]:
    return (n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name))


def _expressions(steps: Sequence[Step]) -> Iterator[ast.expr]:
    for step in steps:
        if isinstance(step, Loop):
            yield step.statement.iter
            yield from _expressions(step.steps)
        else:
            yield step


def _assigned(statement: ast.stmt) -> str | None:
    """The one name that the statement gives a value to, if it does nothing else with it."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.simple:
        target = statement.target
    elif isinstance(statement, ast.For):
        return _assigned(statement.body[-1])
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


class _Transformer(ast.NodeTransformer):
    """Changes the wanted sites of a function. It asks for each once, in an order that is always the same."""

    def __init__(self, function: ast.FunctionDef, wanted: Callable[[Site], bool]) -> None:
        self.function = function
        self.wanted = wanted
        self.done: set[ast.stmt] = set()
        self.guarded = 0  # within how many blocks that may go on after an exception
        nodes = [node for statement in function.body for node in ast.walk(statement)]
        self.looping = 0
        self.loads: dict[str, list[tuple[int, int]]] = {}  # where each variable is read
        for n in nodes:
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
                self.loads.setdefault(n.id, []).append((n.lineno, n.col_offset))
        inner = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        self.shared = set(_names(*(n for n in nodes if isinstance(n, inner))))  # seen from other functions, too
        for n in nodes:
            if isinstance(n, ast.Global | ast.Nonlocal):
                self.shared.update(n.names)
        used = {n.id for n in nodes if isinstance(n, ast.Name)} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }
        self.merges = not used & _SEES_VARIABLES

    def run(self) -> None:
        self.function.body = self._block(self.function.body)

    def visit(self, node: ast.AST) -> ast.AST:
        return node if node in self.done else super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        steps, base = _unroll(node)
        if len(steps) < 2 or base is None:
            return self.generic_visit(node)
        return self._asked(node, steps, base) or node  # a part of a site is no site of its own

    def _visit_try(self, node: ast.AST) -> ast.AST:
        self.guarded += 1
        self.generic_visit(node)
        self.guarded -= 1
        return node

    def _visit_loop(self, node: ast.AST) -> ast.AST:
        self.looping += 1
        self.generic_visit(node)
        self.looping -= 1
        return node

    visit_For = visit_While = _visit_loop  # noqa: N815
    visit_Try = visit_TryStar = _visit_try  # noqa: N815

    def visit_With(self, node: ast.With) -> ast.AST:
        # PyTorch's own contexts swallow no exceptions.
        guards = not all(ast.unparse(item.context_expr).startswith("torch.") for item in node.items)
        self.guarded += guards
        self.generic_visit(node)
        self.guarded -= guards
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, self._block(block))
        return super().generic_visit(node)

    def _block(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, with those that only hand a value on to the next made one."""
        out: list[ast.stmt] = []
        i = 0
        while i < len(block):
            end, steps, base = self._run_from(block, i) if self.merges and not self.guarded else (i, [], None)
            run = block[i : end + 1]
            if base is not None and (len(run) > 1 or isinstance(run[0], ast.For)):
                call = self._asked(run[-1], steps, base)
                if call is not None:
                    run = [_with_value(run[-1], call)]
                self.done.update(run)
            else:
                run = [cast(ast.stmt, self.visit(run[0]))]
                self.done.update(run)
            out += run
            i = end + 1
        return out

    def _asked(self, node: ast.expr | ast.stmt, steps: Sequence[Step], base: ast.expr) -> ast.Call | None:
        """The call of chain, if it is wanted here. Either way, what goes into the first step is visited."""
        wanted = self.wanted(Site(tuple(steps), node.lineno))
        self.visit(base)
        if not wanted:
            return None
        call = ast.Call(ast.Name(CHAIN, ast.Load()), [base, *map(_argument, steps)], [])
        return ast.copy_location(call, node)

    def _run_from(self, block: list[ast.stmt], i: int) -> tuple[int, list[Step], ast.expr | None]:
        """(last statement, steps, what goes in) of the longest run of statements from the i-th. No base: it is none."""
        steps, base = self._handed(block[i])
        if not steps:
            return i, [], None
        end = i
        while end + 1 < len(block) and (name := _assigned(block[end])) is not None:
            following, given = self._handed(block[end + 1])
            if not following or not (isinstance(given, ast.Name) and given.id == name):
                break
            if name in self.shared or name in _names(*_expressions(following)):
                break
            if name != _assigned(block[end + 1]) and self._read_after(name, block[end + 1]):
                break
            steps = [*steps, *following]
            end += 1
        return end, steps, base

    def _read_after(self, name: str, statement: ast.stmt) -> bool:
        """Whether anything but this statement may still read the variable."""
        if isinstance(statement, ast.Return):
            return False
        if self.looping:
            return len(self.loads[name]) > 1
        return max(self.loads[name]) > (statement.end_lineno, statement.end_col_offset)  # in the order of the source

    def _handed(self, statement: ast.stmt) -> tuple[list[Step], ast.expr | None]:
        """(steps, what goes in) if all that the statement does is to keep or return what comes out of them."""
        if isinstance(statement, ast.For):
            return self._looped(statement)
        if isinstance(statement, ast.Return | ast.Assign | ast.AnnAssign):
            return _unroll(statement.value)
        return [], None

    def _looped(self, loop: ast.For) -> tuple[list[Step], ast.expr | None]:
        """`for layer in self.layers: x = F.relu(layer(x))`, with nothing else in it."""
        targets = list(_names(loop.target))
        if loop.orelse or not _iterates(loop.iter) or not isinstance(loop.target, ast.Name | ast.Tuple):
            return [], None
        self.looping += 1
        end, steps, base = self._run_from(loop.body, 0)
        self.looping -= 1
        x = _assigned(loop.body[end])
        if end != len(loop.body) - 1 or not isinstance(base, ast.Name) or base.id != x or x in self.shared:
            return [], None
        looked_up = list(_names(*_expressions(steps)))
        if x in targets or x in looked_up or x in _names(loop.iter) or any(isinstance(step, Loop) for step in steps):
            return [], None
        # The comprehension keeps its variables to itself.
        if any(name in self.shared or len(self.loads.get(name, ())) != looked_up.count(name) for name in targets):
            return [], None
        return [Loop(loop, steps)], base


def _argument(step: Step) -> ast.expr:
    """The step as an argument of chain()."""
    if not isinstance(step, Loop):
        return step
    # *[step for layer in layers for step in (layer, F.relu)]
    name = "__fastenc_step__"
    steps = ast.Tuple([_argument(s) for s in step.steps], ast.Load())
    outer = ast.comprehension(step.statement.target, step.statement.iter, [], 0)
    inner = ast.comprehension(ast.Name(name, ast.Store()), steps, [], 0)
    return ast.Starred(ast.ListComp(ast.Name(name, ast.Load()), [outer, inner]), ast.Load())


def _with_value(last: ast.stmt, call: ast.Call) -> ast.stmt:
    """The last statement of a run, which keeps or returns the call's value."""
    if isinstance(last, ast.For):
        return ast.copy_location(ast.Assign([ast.Name(cast(str, _assigned(last)), ast.Store())], call), last)
    cast(ast.Return, last).value = call
    return last
