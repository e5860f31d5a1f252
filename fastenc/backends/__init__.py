"""The backends: one module each, in the order in which `auto` asks them.

A backend module has `NAME`, `why_unavailable() -> str | None` (in words, None if it can run in this process),
`why_not(x, weight, bias) -> str | None` (why it cannot take these arguments), and the four operators of `fastenc.ops`
without the prefix: `dense_forward`, `dense_backward`, `encoder_forward`, `encoder_backward`.
"""

from types import ModuleType

from . import cpu, reference

BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cpu, reference)}
