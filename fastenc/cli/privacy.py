"""What `fastenc train --private` and `fastenc finetune --private` share: options, what they refuse, what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..data import DataError, Preprocessor
from ..data.extras import require
from .options import Fitting, positive

# Options that private training does not have, and why, in words.
WITHOUT_PRIVACY = {
    "schedule": "private training keeps its learning rate",
    "accumulate": "the rows of each private step are drawn by chance; raise --batch-size",
    "precision": "the noise is added in the numbers of the weights",
    "l1": "private training has no penalty but --weight-decay",
    "clip_norm": "private training clips the gradient of each row, to --max-grad-norm",
    "clip_value": "private training clips the gradient of each row, to --max-grad-norm",
    "patience": "the noise is chosen for all of the epochs",
    "unfreeze_every": "the noise is chosen for all of the epochs and layers",
    "layer_decay": "private training has one learning rate",
    "lora_rank": "private training has no adapters",
    **dict.fromkeys(
        ("noise", "mask", "mixup", "image"), "private training clips the gradients of the rows as they are"
    ),
}


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of the weights in the training rows."""

    private: Annotated[
        bool, typer.Option("--private", help="Train with differential privacy: opacus clips and adds noise.")
    ] = False
    epsilon: Annotated[
        float | None, typer.Option(callback=positive, help="With --private: how much may be learned of a row, as 3.")
    ] = None
    delta: Annotated[
        float | None,
        typer.Option(callback=positive, max=1.0, help="Chance that epsilon does not hold; 1e-05 by default."),
    ] = None
    max_grad_norm: Annotated[
        float | None, typer.Option(callback=positive, help="What a row's gradient is clipped to; 1 by default.")
    ] = None
    noise_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Makes the noise repeatable, and so no secret: for tests. --seed does not."),
    ] = None

    def options(self, fitting: Fitting, *others: Any) -> dict[str, Any] | None:
        """The arguments of `fit_private`; None without --private.

        Args:
            others: more groups of options, in which none may be given that private training does not have.

        Raises:
            DataError: options of privacy without it, or of training that private training does not have.
            ModuleNotFoundError: opacus is missing.
        """
        given = {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.noise_seed,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not self.private:
            for name in given:
                option = "--noise-seed" if name == "seed" else f"--{name.replace('_', '-')}"
                raise DataError(f"{option} is of private training; give --private too, or leave it out")
            return None
        if self.epsilon is None:
            raise DataError("--private needs to know how much may be learned of a row; give --epsilon, for example 3")
        for group in (fitting, *others):
            defaults = type(group)()
            for name, reason in WITHOUT_PRIVACY.items():
                if getattr(group, name, None) != getattr(defaults, name, None):
                    raise DataError(f"--{name.replace('_', '-')} does not go with --private: {reason}; leave it out")
        require("opacus", "--private", "tools")
        names = ("optimizer", "lr", "momentum", "nesterov", "weight_decay", "epochs", "batch_size")
        return {**given, **{name: getattr(fitting, name) for name in names}}


def what_is_covered(preprocessor: Preprocessor | None, rows: int, classes: bool = False) -> str:
    """What the guarantee is about, and what it is not about.

    Args:
        preprocessor: None for one that learned from other rows.
        rows: that were trained on.
        classes: whether the model is saved with the names of the classes.
    """
    learned = ["the names of the classes"] if classes else []
    cure = ""
    if preprocessor is not None:
        has_text = len(preprocessor.feature_names) > len(preprocessor.number_names)
        steps = {
            "the scale of the columns": preprocessor.scale != "none",
            "medians of missing values": preprocessor.missing == "impute",
            "the categories": preprocessor.text == "one-hot" and has_text,
        }
        used = [name for name, is_used in steps.items() if is_used]
        cure = "; --scale none --missing error leaves columns of numbers as they are" if used else ""
        learned += used
    covered = f"covered: the weights, for each of the {rows} training rows"
    if learned:
        return f"{covered}. Not covered, learned without noise: {', '.join(learned)}{cure}"
    return f"{covered}; the preprocessing learned nothing from them"
