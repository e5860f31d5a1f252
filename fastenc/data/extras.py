"""Packages that only the tables, the preprocessing and the command line need: imported when first used."""

from __future__ import annotations

import importlib
from types import ModuleType

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow", "Bio": "biopython"}  # where pip's name is not the module's
_ALONE = {"torchvision"}  # in none of fastenc's extras


def require(module: str, purpose: str, extra: str = "app") -> ModuleType:
    """The imported `module`; if its package is missing, ModuleNotFoundError that says how to install it.

    Args:
        module: for example "pandas" or "sklearn.impute".
        purpose: the subject of the error's sentence, for example "reading tables".
        extra: which of the extras in pyproject.toml brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name != top:  # the package is there, and something that it needs is not
            raise
        package = _PACKAGES.get(top, top)
        install = package if top in _ALONE else f'"fastenc[{extra}]"'
        raise ModuleNotFoundError(f"{purpose} needs {package}; run: pip install {install}", name=top) from None
