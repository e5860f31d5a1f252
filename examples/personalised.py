"""One encoder for all, and a small adapter for each user: what it buys beside a shared model and a model for each.

    python examples/personalised.py        # half a minute; the picture goes to out/personalised

Twelve users write scikit-learn's digits, each in a hand of their own: turned, slanted and stretched by an affine map
that is drawn once for each user. And each has names of their own for four of the digits: two pairs are exchanged, drawn
for each user. A shared classifier is trained on half of the digits, as they are. The others are dealt out to the users,
who label a few of their own rows and are scored on the rest. All ways to learn from these few rows get the same rows,
and as many passes over them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from comparing import Row, arguments, write_results
from scipy.ndimage import affine_transform

from fastenc import Classifier, Encoder, Trainer, plots
from fastenc.data import load
from fastenc.personal import PersonalModel
from fastenc.record import split_rows
from fastenc.report import table

USERS, OWN_ROWS, RANK = 12, 30, 4
TURN, SLANT, STRETCH = 0.5, 0.3, 0.2  # radians, and shares, at the most
NAMES = [f"user {number}" for number in range(USERS)]
SHARED = "shared model"
ADAPTERS = f"shared model and adapters of rank {RANK}"
TOGETHER = "shared model, trained further on all users' rows"
WHOLE = "a whole copy for each user, trained further"
SCRATCH = "a model for each user, from scratch"


def hand(random: np.random.Generator) -> np.ndarray:
    """The 2 x 2 matrix of how a user writes: a turn, a slant and a stretch."""
    turn, slant = random.uniform(-TURN, TURN), random.uniform(-SLANT, SLANT)
    stretch = 1.0 + random.uniform(-STRETCH, STRETCH, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return rotation @ np.array([[1.0, slant], [0.0, 1.0]]) @ np.diag(stretch)


def names(random: np.random.Generator) -> np.ndarray:
    """What a user calls each digit: two pairs of them exchanged."""
    called = np.arange(10)
    a, b, c, d = random.choice(10, 4, replace=False)
    called[[a, b, c, d]] = b, a, d, c
    return called


def written(images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Images [n, 64] as a user would write them, about their middle."""
    offset = 3.5 - matrix @ np.array([3.5, 3.5])
    moved = [affine_transform(image, matrix, offset, order=1) for image in images.reshape(-1, 8, 8)]
    return np.stack(moved).reshape(-1, 64).astype(np.float32)


def accuracy(outputs: Any, y: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Of each user: [users]."""
    right = np.asarray(outputs).argmax(1) == y
    return np.array([right[user == number].mean() for number in range(USERS)])


def fitted(model: torch.nn.Module, x: Any, y: Any, epochs: int, seed: int, lr: float = 3e-3) -> Trainer:
    trainer = Trainer(model, lr=lr, loss="cross_entropy", seed=seed)
    trainer.fit(x, y, epochs=epochs, batch_size=32, verbose=False)
    return trainer


def one_seed(epochs: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, int], list[np.ndarray]]:
    """Of each way the accuracy of each user and the bytes that each costs; and some images."""
    digits = load("digits")
    x, y = (digits.features / 16).astype(np.float32), digits.target
    public, private = split_rows(len(x), 0.5, seed)
    random = np.random.default_rng(seed)
    user = np.arange(len(private)) % USERS
    hands = [hand(random) for _ in range(USERS)]
    own = x[private].copy()
    for number in range(USERS):
        own[user == number] = written(own[user == number], hands[number])
    labels = y[private].copy()
    for number in range(USERS):
        labels[user == number] = names(random)[labels[user == number]]
    few = np.arange(len(private)) // USERS < OWN_ROWS  # of each user as many
    torch.manual_seed(seed)
    shared = Classifier(Encoder(64, (64, 32)), 10)
    fitted(shared, x[public], y[public], epochs, seed)

    found = {SHARED: accuracy(Trainer(shared).predict(own[~few]), labels[~few], user[~few])}
    personal = PersonalModel(copy.deepcopy(shared), NAMES, RANK)
    numbers = torch.from_numpy(user)
    joined = personal.joined(torch.from_numpy(own), numbers)
    trainer = fitted(personal, joined[few], labels[few], epochs, seed)
    found[ADAPTERS] = accuracy(trainer.predict(joined[~few]), labels[~few], user[~few])
    together = fitted(copy.deepcopy(shared), own[few], labels[few], epochs, seed)
    found[TOGETHER] = accuracy(together.predict(own[~few]), labels[~few], user[~few])
    for name, begin in (
        (WHOLE, lambda: copy.deepcopy(shared)),
        (SCRATCH, lambda: Classifier(Encoder(64, (64, 32)), 10)),
    ):
        outputs = np.empty((int((~few).sum()), 10), np.float32)
        for number in range(USERS):
            torch.manual_seed(seed)
            one = fitted(begin(), own[few & (user == number)], labels[few & (user == number)], epochs, seed)
            outputs[user[~few] == number] = one.predict(own[~few & (user == number)])
        found[name] = accuracy(outputs, labels[~few], user[~few])
    whole = sum(parameter.numel() * parameter.element_size() for parameter in shared.parameters())
    costs = {SHARED: 0, ADAPTERS: personal.bytes_per_user, TOGETHER: 0, WHOLE: whole, SCRATCH: whole}
    example = x[public][y[public] == 4][:1]
    return found, costs, [example, *(written(example, each) for each in hands)]


def main() -> None:
    args = arguments("One encoder, an adapter for each user.", "personalised", epochs=60, seeds=3)
    runs = [one_seed(args.epochs, seed) for seed in range(args.seeds)]
    costs = runs[0][1]
    figures = {name: np.stack([found[name] for found, _, _ in runs]) for name in costs}  # [seeds, users]
    print(f"{USERS} users with {OWN_ROWS} rows each; accuracy on their other rows; {args.seeds} seeds\n")
    rows = [
        (
            name,
            f"{each.mean():.3f}",
            f"{each.mean(1).std():.3f}" if len(each) > 1 else "",
            f"{each.min():.3f}",
            f"{costs[name]:,}",
        )
        for name, each in figures.items()
    ]
    print(table(("", "accuracy", "standard deviation", "the worst user", "bytes for each user"), rows))
    plots.save_figure(lambda figure: draw(figure, figures, costs, runs[0][2]), args.out / "users.png", (12, 6.2))
    print(f"\nThe picture is {args.out / 'users.png'}.")
    ours = float(figures[ADAPTERS].mean())
    write_results(
        args.out,
        [
            Row("users' accuracy, an adapter for each", ours, SHARED, float(figures[SHARED].mean())),
            Row("users' accuracy, an adapter for each", ours, SCRATCH, float(figures[SCRATCH].mean())),
            Row("bytes for each user", costs[ADAPTERS], "a whole model", costs[WHOLE], higher=False),
        ],
    )


def draw(figure: Any, figures: dict[str, np.ndarray], costs: dict[str, int], images: list[np.ndarray]) -> None:
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 3))
    pictures = np.stack(images).reshape(1, -1, 8, 8)[0]
    plots.draw_images(top, {"one 4": pictures}, "As it is, and as each of the users writes it")
    for place, (name, each) in enumerate(figures.items()):
        colour = plots.ORANGE if name == ADAPTERS else plots.BLUE
        bottom.barh(place, each.mean(), color=colour, height=0.55, alpha=0.75)
        bottom.plot(each.mean(0), [place] * USERS, "o", color="#333333", markersize=4)
        bottom.text(1.01, place, f"{each.mean():.3f}   {costs[name]:,} bytes a user", va="center", fontsize=11)
    bottom.set_yticks(range(len(figures)), list(figures))
    bottom.invert_yaxis()
    bottom.grid(axis="x")
    bottom.grid(visible=False, axis="y")
    bottom.set(title="Accuracy on users' own rows: the mean, and each user", xlabel="accuracy", xlim=(0, 1))


if __name__ == "__main__":
    main()
