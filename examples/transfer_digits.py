"""Does an encoder that knows the digits 0 to 4 help to learn 5 to 9 from few labels, and what does freezing it cost?

    python examples/transfer_digits.py       # a minute; the picture goes to out/transfer_digits

One encoder is trained on the rows of 0 to 4 with their labels, another one on the same rows without, as a denoising
autoencoder. From each of them, and from scratch, 5 to 9 are learned from five labels each. The times are of training
only, medians over the seeds, and include what every fit costs beside its steps.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch
from comparing import arguments, show

from fastenc import Encoder, finetune
from fastenc.data import load
from fastenc.finetuning import pretrain
from fastenc.record import split_rows

LABELS_OF_EACH, TEST_SHARE, BATCH_SIZE = 5, 0.5, 10
WIDTHS = (128, 64)
SOURCES = ("labels", "no labels")  # that the first encoder was trained with
WAYS = {
    "all trained": {"frozen": 0},
    "first layer frozen": {"frozen": 1},
    "both layers frozen": {"frozen": 2},
    "thawed from the top": {"unfreeze_every": 30},
    "adapters of rank 4": {"lora_rank": 4},
}


def main() -> None:
    args = arguments("Transfer from one half of the digits to the other.", "transfer_digits", epochs=100, seeds=5)
    digits = load("digits")
    x, y = (digits.features / 16).astype(np.float32), digits.target
    low = y < 5
    ways = {"from scratch": {"widths": WIDTHS}}
    ways |= {f"{source}, {name}": {"strategy": "transfer", **way} for source in SOURCES for name, way in WAYS.items()}
    accuracy: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    how: dict[str, str] = {}
    for seed in range(args.seeds):
        options = {"epochs": args.epochs, "seed": seed, "verbose": False}
        torch.manual_seed(seed)
        without = Encoder(x.shape[1], WIDTHS)
        pretrain(without, x[low], method="denoising", noise=0.3, **options)
        known = {"labels": finetune(x[low], y[low], widths=WIDTHS, **options).model, "no labels": without}
        high = np.flatnonzero(~low)
        rest, test = (high[part] for part in split_rows(len(high), TEST_SHARE, seed))
        few = np.concatenate([rest[y[rest] == digit][:LABELS_OF_EACH] for digit in range(5, 10)])
        for name, way in ways.items():
            encoder = known.get(name.partition(",")[0])
            began = time.perf_counter()
            result = finetune(x[few], y[few], encoder=encoder, **way, batch_size=BATCH_SIZE, **options)
            seconds[name].append(time.perf_counter() - began)
            accuracy[name].append(float((result.predict(x[test]) == y[test]).mean()))
            how[name] = "whole, in C++" if "C++ engine" in result.how else "one by one"
    print(f"{len(few)} labels of 5 to 9, scored on {len(test)}; {args.seeds} seeds, {args.epochs} epochs\n")
    times = {name: f"{1000 * median(values):.0f} ms" for name, values in seconds.items()}
    show(accuracy, "accuracy", args.out / "accuracy.png", time=times, steps=how)


if __name__ == "__main__":
    main()
