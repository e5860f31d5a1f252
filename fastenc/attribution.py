"""Which inputs drive which codes: captum's attributions over many rows, as a table and a picture."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .activation import ACTIVATIONS
from .data import DataError, as_rows
from .data.extras import require
from .files import replacing
from .modules import FusedDense
from .plain import to_plain
from .report import table
from .training.inputs import in_features, place_of
from .training.weights import mode

STEPS = 64  # of the integral; Gauss-Legendre, exact for smooth functions long before
_BATCH = 1 << 14  # points of the integral computed at a time
_SHOWN = 40  # features in a picture
# What captum's DeepLift has a rule for; of others it takes the gradient, and says nothing.
DEEP_LIFT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")


def _integrated_gradients(model: nn.Module, x: Tensor, baseline: Tensor, code: int) -> Tensor:
    method = require("captum.attr", "attribution", "tools").IntegratedGradients(model)
    batch = max(_BATCH, len(x))
    return method.attribute(x, baseline, target=code, n_steps=STEPS, internal_batch_size=batch)


def _deep_lift(model: nn.Module, x: Tensor, baseline: Tensor, code: int) -> Tensor:
    return require("captum.attr", "attribution", "tools").DeepLift(model).attribute(x, baseline, target=code)


def _gradient(model: nn.Module, x: Tensor, baseline: Tensor, code: int) -> Tensor:
    return require("captum.attr", "attribution", "tools").Saliency(model).attribute(x, target=code, abs=False)


def _ablation(model: nn.Module, x: Tensor, baseline: Tensor, code: int) -> Tensor:
    return require("captum.attr", "attribution", "tools").FeatureAblation(model).attribute(x, baseline, target=code)


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, int], Tensor]] = {
    "integrated-gradients": _integrated_gradients,
    "deep-lift": _deep_lift,
    "gradient": _gradient,
    "ablation": _ablation,
}


@dataclass(frozen=True, eq=False)
class Attributions:
    """What `feature_attributions` found.

    Attributes:
        size: float64 [codes, features], the mean over the rows of an attribution's size, in units of the code: how much
            of a code goes back to a feature. (For "gradient" in units of the code per unit of the feature.)
        slope: float64 [codes, features], by how much a code goes up with one unit of the feature, on average. Of a
            linear model it is the weight. 0 of a feature that is as in the baseline everywhere.
        feature_names: of each feature.
        codes: which outputs of the model these are.
        method: a name of METHODS.
        rows: how many rows were looked at.
    """

    size: np.ndarray
    slope: np.ndarray
    feature_names: list[str]
    codes: list[int]
    method: str
    rows: int

    @property
    def dead(self) -> list[int]:
        """The codes that no input drives."""
        return [code for code, size in zip(self.codes, self.size, strict=True) if not size.any()]

    def top(self, number: int) -> dict[int, list[int]]:
        """Of each code the features that drive it most, at most `number`, those of size 0 left out."""
        ranked = {}
        for code, size in zip(self.codes, self.size, strict=True):
            order = np.argsort(-size, kind="stable")[:number]
            ranked[code] = [int(feature) for feature in order if size[feature] > 0]
        return ranked

    def table(self, number: int = 5) -> str:
        """For people: of each code the features that drive it most, their share of all, and which way."""
        rows = []
        for place, (code, features) in enumerate(self.top(number).items()):
            whole = self.size[place].sum()
            for rank, feature in enumerate(features):
                slope = self.slope[place, feature]
                name = f"code {code}" if rank == 0 else ""
                share = f"{self.size[place, feature] / whole:.1%}"
                rows.append((name, self.feature_names[feature], share, "up" if slope > 0 else "down", f"{slope:.3g}"))
        return table(("", "feature", "share", "goes", "per unit"), rows)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """A line for each code and feature: code, feature, size, slope."""
        with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(("code", "feature", "size", "slope"))
            for place, code in enumerate(self.codes):
                for feature, name in enumerate(self.feature_names):
                    # 17 digits give every float64 back.
                    figures = (f"{each[place, feature]:.17g}" for each in (self.size, self.slope))
                    lines.writerow((code, name, *figures))

    def draw(self, axes: Any) -> None:
        """A heat map of features by codes into a matplotlib Axes: colour is the size, with the slope's sign.

        Of many features those that drive the codes most are shown, in the order in which the model takes them.
        """
        signed = (self.size * np.sign(self.slope)).T
        shown = np.sort(np.argsort(-self.size.sum(0), kind="stable")[:_SHOWN])
        most = np.abs(signed).max() or 1.0
        image = axes.imshow(signed[shown], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(shown)), [self.feature_names[feature] for feature in shown], fontsize=9)
        axes.set_xticks(range(len(self.codes)), [str(code) for code in self.codes])
        left_out = len(self.feature_names) - len(shown)
        more = f" ({left_out} with less are left out)" if left_out else ""
        axes.set_title(f"Which features drive which code{more}")
        axes.set_xlabel("code")
        axes.grid(False)
        unit = "of the code per unit" if self.method == "gradient" else "of the code"
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label(f"mean part {unit}\nred: up with the feature, blue: down", fontsize=10)

    def picture_size(self) -> tuple[float, float]:
        """In inches, for `fastenc.plots.save_plot`."""
        return 4.5 + 0.45 * len(self.codes), 2.2 + 0.24 * min(_SHOWN, len(self.feature_names))


def feature_attributions(
    model: nn.Module,
    x: Any,
    baseline: Any = None,
    method: str = "integrated-gradients",
    *,
    codes: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
) -> Attributions:
    """Which inputs drive which outputs of a model, over some rows, by captum.

    Args:
        model: any module from [rows, features] to [rows, codes]: an encoder, `model.encoder`, for its codes.
        x: [rows, features] of any kind; some hundred rows are enough, and time grows with rows x codes.
        baseline: [features], what an input is compared with; None for the mean of x, so that what tells a row from the
            average one is explained.
        method: "integrated-gradients" (Sundararajan et al., 2017) and "deep-lift" (Shrikumar et al., 2017) share each
            code's difference from that of the baseline among the features; "ablation" puts one feature after the
            other to the baseline; "gradient" is the derivative at the rows, without a baseline.
        codes: which outputs; None for all.
        feature_names: of each column; None to number them.

    Raises:
        DataError: bad rows, a baseline or names of another length, or a code that is not there.
        ValueError: an unknown method, "deep-lift" with an activation that it has no rule for, or a model that gives
            something else than [rows, codes].
        ModuleNotFoundError: captum is missing.
    """
    parts = row_attributions(model, x, baseline, method, codes=codes)
    width = parts.x.shape[1]
    names = [f"feature {column}" for column in range(width)] if feature_names is None else list(feature_names)
    if len(names) != width:
        raise DataError(f"there are {len(names)} feature names and {width} columns; give one for each")
    away = (parts.x - parts.baseline).numpy()
    sizes, slopes = [], []
    for of_code in parts.of_codes:
        sizes.append(np.abs(of_code).mean(0))
        if method == "gradient":
            slopes.append(of_code.mean(0))
        else:
            spread = np.square(away).sum(0)
            slopes.append(np.divide((of_code * away).sum(0), spread, out=np.zeros(width), where=spread > 0))
    return Attributions(np.array(sizes), np.array(slopes), names, parts.codes, method, len(parts.x))


@dataclass(frozen=True, eq=False)
class RowAttributions:
    """Attributions of each row.

    of_codes    float64 [codes, rows, features]
    codes       which outputs of the model these are
    x           float64 [rows, features], the rows; baseline [features]
    """

    of_codes: np.ndarray
    codes: list[int]
    x: Tensor
    baseline: Tensor


def row_attributions(
    model: nn.Module,
    x: Any,
    baseline: Any = None,
    method: str = "integrated-gradients",
    *,
    codes: Sequence[int] | None = None,
) -> RowAttributions:
    """What `feature_attributions` takes the means of. Arguments and errors as there."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; give one of {', '.join(METHODS)}")
    require("captum", "attribution", "tools")
    place = place_of(model)
    rows = as_rows(x, dtype=place.dtype, features=in_features(model))
    start = rows.double().mean(0) if baseline is None else _baseline(baseline, rows.shape[1])
    inputs, origin = rows.to(place.device), start.to(place.device, place.dtype).expand(1, -1)
    if method == "deep-lift":
        _check_deep_lift(model)
        model = to_plain(model)  # captum looks for the activations' modules
    found = []
    with mode(model, training=False), warnings.catch_warnings():
        # captum tells of what it does to inputs and modules, and takes back afterwards.
        warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients", UserWarning)
        warnings.filterwarnings("ignore", "Setting (forward, )?backward hooks", UserWarning)
        with torch.no_grad():
            width = _outputs(model(inputs[:1]))
        chosen = list(range(width)) if codes is None else list(codes)
        if wrong := [code for code in chosen if not 0 <= code < width]:
            raise DataError(f"there is no code {wrong[0]}; the model has codes 0 to {width - 1}")
        for code in chosen:
            of_code = METHODS[method](model, inputs.clone(), origin, code)
            found.append(of_code.detach().cpu().double().numpy())
    return RowAttributions(np.array(found), chosen, rows.double(), start)


def _baseline(baseline: Any, features: int) -> Tensor:
    start = torch.as_tensor(baseline).detach().cpu().double()
    if start.shape != (features,) or not start.isfinite().all():
        raise DataError(
            f"the baseline has shape {list(start.shape)}, or NaN or Inf; give [{features}], one number for each column"
        )
    return start


def _outputs(output: Any) -> int:
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model gives {shape} for one row; attribution needs [rows, codes]")
    return output.shape[1]


def _check_deep_lift(model: nn.Module) -> None:
    used = {module.activation for module in model.modules() if isinstance(module, FusedDense)}
    if unknown := [name for name in ACTIVATIONS if name in used and name not in DEEP_LIFT]:
        raise ValueError(
            f"deep-lift has no rule for {' and '.join(unknown)}, only for {', '.join(DEEP_LIFT)}; use "
            "integrated-gradients"
        )
