"""load_pretrained: a folder to whichever model of this package it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .frontends import FrontEncoder
from .multitask import MultiTask
from .pretrained import load_as

CLASSES: dict[str, type] = {
    each.__name__: each for each in (Encoder, FrontEncoder, AutoEncoder, Classifier, Regressor, MultiTask)
}


def load_pretrained(folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
    """Load whichever fastenc model `folder` holds: an Encoder or FrontEncoder, AutoEncoder, Classifier, Regressor or
    MultiTask, in eval mode.

    Raises:
        ModelFileError: as `Pretrained.from_pretrained`.
    """
    return load_with_preprocessing(folder, device=device)[0]


def load_with_preprocessing(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> tuple[Any, dict[str, Any] | None]:
    """What `load_pretrained` and `load_preprocessing` give, both of one save.

    Called one after the other these two may come from before and after a save of another process; here the file is
    opened once.

    Raises:
        ModelFileError: as `Pretrained.from_pretrained`.
    """
    return load_as(Path(folder), device, CLASSES)
