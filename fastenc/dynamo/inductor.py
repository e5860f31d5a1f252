"""The backend itself: fuse, then Inductor with a pass that calls the CPU's kernels. Imported to compile a model."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .. import ops
from ..backends import BACKENDS
from . import rewrite
from .fusing import fuse_graph

_PRE, _POST = "pre_grad_custom_pass", "post_grad_custom_post_pass"


class _Pass(CustomGraphPass):
    """A pass of which Inductor's cache knows what it depends on."""

    def __init__(self, change: Callable[[fx.Graph], None]) -> None:
        self._change = change

    def __call__(self, graph: fx.Graph) -> None:
        self._change(graph)

    def uuid(self) -> bytes:
        # Asked for, too, where the cache has the compiled code: that calls kernels, which must have been loaded.
        cpu = BACKENDS["cpu"]
        state = cpu.why_unavailable() or cpu.describe()
        return _hash_of_sources() + f"{self._change.__name__} {ops.forced_backend()} {state}".encode()


@functools.cache
def _hash_of_sources() -> bytes:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).digest()


def options() -> dict[str, Any]:
    """See `fastenc.dynamo.inductor_options`."""
    return {_PRE: _Pass(fuse_graph), _POST: _Pass(rewrite.lower)}


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Tensor], mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="fastenc")` calls with each graph."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            fuse_graph(part.graph)
            part.recompile()
    devices = {tensor.device.type for tensor in inputs if isinstance(tensor, Tensor)}
    if reason := _why_no_inductor("cuda" in devices, "cpu" in devices):
        _warn_once(reason)
        return torch._dynamo.lookup_backend("aot_eager")(module, list(inputs))
    compiler = torch._TorchCompileInductorWrapper(mode, options, None)
    after = compiler.config.get(_POST)
    after = () if after is None else after if isinstance(after, (list, tuple)) else (after,)
    compiler.config[_POST] = [*after, _Pass(rewrite.lower)]
    return compiler(module, inputs)


@functools.cache
def _why_no_inductor(on_gpu: bool, on_cpu: bool) -> str | None:
    """Why Inductor cannot generate code here, in words; None if it can."""
    if on_gpu:
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Inductor needs Triton for this GPU"
    if on_cpu:
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "Inductor needs a C++ compiler (g++ or clang++) for the CPU"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"fastenc compiles without Inductor, with backend 'aot_eager': {reason}", RuntimeWarning, stacklevel=2
    )
