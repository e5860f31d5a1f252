"""What differential privacy costs in accuracy, and what it takes from one who asks whether a row was trained on.

    python examples/privacy.py             # a minute; the pictures go to out/privacy

Needs opacus (pip install "fastenc[tools]"). Half of scikit-learn's digits is trained on, the other half is not. The
same classifier is trained as ever, and by DP-SGD for several epsilons. Membership inference is the loss-threshold
attack of Yeom et al. (2018): rows with a smaller loss are taken for training rows; its ROC AUC is 0.5 for a guess and 1
for one who knows. As a second question one in five labels is made wrong, so that an ordinary model has to learn rows by
heart: that is where it gives them away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comparing import Row, arguments, write_results
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from fastenc import Classifier, Encoder, Trainer, plots
from fastenc.data import load
from fastenc.private import fit_private
from fastenc.record import split_rows
from fastenc.report import table

EPSILONS = (0.5, 1.0, 3.0, 8.0)
WITHOUT = "none"
WRONG = 0.2  # of the labels, in the second question
BATCH = 256  # of private training, which larger ones suit
DELTA = 1e-4  # there are some 900 training rows


def membership(model: Classifier, inside: tuple[Any, Any], outside: tuple[Any, Any]) -> float:
    """The ROC AUC of telling rows that were trained on from others by their losses."""
    with torch.inference_mode():
        losses = [F.cross_entropy(model(x), y, reduction="none").numpy() for x, y in (inside, outside)]
    return float(roc_auc_score(np.repeat([1, 0], [len(each) for each in losses]), -np.concatenate(losses)))


def spoiled(y: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels of which a share is another digit."""
    random = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=random) < WRONG
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=random)) % 10, y)


def train(x: torch.Tensor, y: torch.Tensor, epsilon: float | None, epochs: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(Encoder(64, (64,), "tanh"), 10)
    if epsilon is None:
        Trainer(model, lr=5e-3, loss="cross_entropy", seed=seed).fit(x, y, epochs=3 * epochs, verbose=False)
    else:
        options = {"loss": "cross_entropy", "lr": 1e-2, "epochs": epochs, "batch_size": BATCH, "seed": seed}
        fit_private(model, x, y, epsilon=epsilon, delta=DELTA, **options)
    return model.eval()


def main() -> None:
    args = arguments("The cost of privacy, and membership inference.", "privacy", epochs=30, seeds=3)
    digits = load("digits")
    x = torch.from_numpy((digits.features / 16).astype(np.float32))
    y = torch.from_numpy(digits.target)
    levels = {f"{epsilon:g}": epsilon for epsilon in EPSILONS} | {WITHOUT: None}
    accuracy: dict[str, list[float]] = {name: [] for name in levels}
    attack: dict[str, list[float]] = {name: [] for name in levels}
    spoiled_attack: dict[str, list[float]] = {name: [] for name in levels}
    for seed in range(args.seeds):
        kept, others = (torch.from_numpy(rows) for rows in split_rows(len(x), 0.5, seed))
        labels = spoiled(y, seed)
        for name, epsilon in levels.items():
            model = train(x[kept], y[kept], epsilon, args.epochs, seed)
            with torch.inference_mode():
                accuracy[name].append(float((model(x[others]).argmax(1) == y[others]).float().mean()))
            attack[name].append(membership(model, (x[kept], y[kept]), (x[others], y[others])))
            model = train(x[kept], labels[kept], epsilon, args.epochs, seed)
            spoiled_attack[name].append(membership(model, (x[kept], labels[kept]), (x[others], labels[others])))
    print(f"{len(kept)} rows trained on, {len(others)} not; {args.seeds} seeds; delta {DELTA:g}\n")
    figures = (accuracy, attack, spoiled_attack)
    rows = [
        (f"epsilon {name}", *(f"{np.mean(each[name]):.3f} ± {np.std(each[name]):.3f}" for each in figures))
        for name in levels
    ]
    print(table(("", "accuracy on other rows", "attack's AUC", "attack's AUC, wrong labels"), rows))
    plots.save_figure(lambda figure: draw(figure, *figures), args.out / "privacy.png", (12, 4.8))
    print(f"\nThe picture is {args.out / 'privacy.png'}.")
    write_results(
        args.out,
        [
            Row(
                "accuracy at epsilon 3", float(np.mean(accuracy["3"])), "no privacy", float(np.mean(accuracy[WITHOUT]))
            ),
            Row(
                "membership attack's AUC at epsilon 3, a fifth of the labels wrong",
                float(np.mean(spoiled_attack["3"])),
                "no privacy",
                float(np.mean(spoiled_attack[WITHOUT])),
                higher=False,
            ),
        ],
    )


def draw(figure: Any, accuracy: dict, attack: dict, spoiled_attack: dict) -> None:
    left, right = figure.subplots(1, 2)
    names = list(accuracy)
    curve(left, accuracy, plots.BLUE, "test rows")
    left.axhline(0.1, color="#555555", linestyle=(0, (4, 3)), linewidth=1.5, label="a guess")
    left.set(title="What privacy costs", ylabel="accuracy", ylim=(0, 1.02))
    curve(right, spoiled_attack, plots.ORANGE, "a fifth of the labels wrong")
    curve(right, attack, plots.BLUE, "right labels")
    right.axhline(0.5, color="#555555", linestyle=(0, (4, 3)), linewidth=1.5, label="a guess")
    right.set(title="What it takes from the attack", ylabel="ROC AUC of membership inference", ylim=(0.45, 0.8))
    for axes in (left, right):
        axes.set_xlabel("epsilon (smaller: more private)")
        axes.set_xticks(range(len(names)), names)
        axes.legend()


def curve(axes: Any, figures: dict[str, list[float]], colour: str, label: str) -> None:
    """The means joined by a line, and a dot for each seed."""
    axes.plot(range(len(figures)), [np.mean(each) for each in figures.values()], color=colour, linewidth=2, label=label)
    for place, values in enumerate(figures.values()):
        axes.plot([place] * len(values), values, "o", color=colour, markersize=5, alpha=0.6)


if __name__ == "__main__":
    main()
