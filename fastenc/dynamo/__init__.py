"""`torch.compile(model, backend="fastenc")`: our operators where they are faster, Inductor for all the rest."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

_REGISTRY = "torch._dynamo.backends.registry"


def fastenc(module: Any, inputs: Sequence[Any], **arguments: Any) -> Callable[..., Any]:
    """The backend, as Dynamo calls it: with a graph, its inputs, and torch.compile's `mode` and `options`."""
    from .inductor import compile_graph

    return compile_graph(module, inputs, **arguments)


def inductor_options() -> dict[str, Any]:
    """For `torch.compile(model, options=...)`: the same as passes of Inductor, beside what else is in the options."""
    from .inductor import options

    return options()


class Report(tuple[Any, ...]):
    """What `explain` found: `Found`s, each with its `layers` and the `reason` why they were left, or None."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no linear layer in a graph"


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Trace `model(*args, **kwargs)`, run it once, and say what backend="fastenc" fuses for these arguments.

    The gradients' mode counts: what is fused may differ in `torch.no_grad()`.
    """
    import torch

    from .fusing import fuse_graph, record

    def fuse_only(module: Any, inputs: Sequence[Any]) -> Any:
        fuse_graph(module.graph)
        module.recompile()
        return module

    with record() as found:
        torch.compile(model, backend=fuse_only)(*args, **kwargs)
    return Report(found)


def _register() -> None:
    registry = sys.modules[_REGISTRY]
    if "fastenc" not in registry._COMPILER_FNS:
        registry.register_backend(fastenc, name="fastenc")


class _WhenDynamoComes(importlib.abc.MetaPathFinder):
    """Registers the backend after Dynamo's registry is imported: importing that takes seconds, for one string.

    An installed fastenc needs it not, having an entry point; a checkout on the path has no such thing.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def offer() -> None:
    """Make the name "fastenc" known to `torch.compile`, now or when Dynamo is imported."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenDynamoComes())
