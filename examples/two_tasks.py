"""Two tasks that share one encoder: which digit it is, and what its hidden pixels are, beside a model for each alone.

    python examples/two_tasks.py             # a minute; the pictures go to out/two_tasks

A third of scikit-learn's digits is held out. Of the others 100, ten of each class, are trained on. A third of their
pixels is hidden at random, as it is in what is scored.
"""

from __future__ import annotations

import numpy as np
import torch
from comparing import arguments, show

from fastenc import Encoder, MultiTask, Task, Trainer
from fastenc.data import load
from fastenc.record import split_rows

TEST_SHARE, LABELS_OF_EACH, HIDDEN = 1 / 3, 10, 1 / 3
TASKS = {"digit": Task(10, "cross_entropy"), "image": Task(64, "mse", weight=20.0)}
BOTH = "one encoder for both"


def main() -> None:
    args = arguments("Two tasks that share one encoder.", "two_tasks", epochs=100, seeds=5)
    digits = load("digits")
    x, y = (digits.features / 16).astype(np.float32), digits.target
    accuracy: dict[str, list[float]] = {BOTH: [], "digit alone": []}
    error: dict[str, list[float]] = {BOTH: [], "image alone": []}
    for seed in range(args.seeds):
        rest, test = split_rows(len(x), TEST_SHARE, seed)
        few = np.concatenate([rest[y[rest] == digit][:LABELS_OF_EACH] for digit in range(10)])
        hidden = np.where(np.random.default_rng(seed).random(x.shape) < HIDDEN, 0, x).astype(np.float32)
        for name, tasks in {BOTH: TASKS, "digit alone": ["digit"], "image alone": ["image"]}.items():
            torch.manual_seed(seed)
            model = MultiTask(Encoder(64, (64, 32)), {task: TASKS[task] for task in tasks})
            trainer = Trainer(model, lr=2e-3, loss=model.loss, seed=seed)
            targets = {"digit": y[few], "image": x[few]}
            trainer.fit(hidden[few], model.targets(**{t: targets[t] for t in tasks}), epochs=args.epochs, verbose=False)
            outputs = model.split(trainer.predict(hidden[test]))
            if "digit" in outputs:
                accuracy[name].append(float((outputs["digit"].argmax(1) == y[test]).mean()))
            if "image" in outputs:
                error[name].append(float(np.square(outputs["image"] - x[test]).mean()))
    print(f"{len(few)} rows to train on, scored on {len(test)}; {args.seeds} seeds\n")
    show(accuracy, "accuracy of the digit", args.out / "digit.png")
    print()
    show(error, "squared error of the image", args.out / "image.png", digits=4)


if __name__ == "__main__":
    main()
