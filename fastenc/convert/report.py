"""FusionReport: what runs fused in a model, what does not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` does with a model. `str()` of it is for people.

    Attributes:
        fused: each run of layers that becomes one, as "fc1 + relu -> fc2".
        decided_later: places where only the running model knows which layers meet which activation.
        left: name of each other layer that multiplies by a weight -> why it is left alone.
    """

    fused: tuple[str, ...]
    decided_later: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        count = sum(run.count(" -> ") + 1 for run in self.fused)
        lines = [f"fastenc.fuse: {count} layers fused:" if count else "fastenc.fuse: nothing to fuse"]
        lines += [f"  {entry}" for entry in _alike(self.fused)]
        if self.decided_later:
            lines += ["decided at each call:", *(f"  {entry}" for entry in _alike(self.decided_later))]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += ["left alone:"] if by_reason else []
        lines += [f"  {', '.join(_alike(names))}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _alike(entries: Iterable[str]) -> list[str]:
    """The entries, with those that differ in numbers alone, as of a model's many blocks, made one."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(re.sub(r"\b\d+(?=\.)", "*", entry), []).append(entry)
    return [alike[0] if len(alike) == 1 else f"{pattern} (x{len(alike)})" for pattern, alike in groups.items()]
