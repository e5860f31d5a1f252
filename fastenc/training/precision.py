"""Number formats to compute in: autocast's, and what scales the loss for float16."""

from __future__ import annotations

import torch
from torch.amp import GradScaler

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_scaler(precision: str, device: torch.device) -> GradScaler | None:
    """What scales the loss where gradients in the precision need that; None where they do not.

    Raises:
        ValueError: an unknown precision, or fp16 on a device that is no GPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}")
    if precision != "fp16":
        return None
    if device.type != "cuda":
        raise ValueError(f"precision='fp16' needs a GPU, and the model is on {device}; use precision='bf16'")
    return GradScaler(device.type)
