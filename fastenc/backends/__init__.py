"""The backends: one module each.

A backend module has `NAME`, `DEVICE` (the kind of device whose tensors `auto` gives it; None: never),
`why_unavailable() -> str | None` (in words, None if it can run in this process), `why_not(x, weight, bias)` (why it
cannot take these arguments), and the four operators of `fastenc.ops` without the prefix: `dense_forward`,
`dense_backward`, `encoder_forward`, `encoder_backward`. It may have
- `verdict(x, weights, activations, training) -> (chosen, reason)`: whether `auto` should prefer it to eager PyTorch;
- `parts(x, weights, training) -> list[slice]`: a stack cut into what it runs, or should run, in one kernel;
- `describe() -> str`: what it runs on in this process.
"""

from types import ModuleType

from . import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cpu, cuda, triton, reference)}
