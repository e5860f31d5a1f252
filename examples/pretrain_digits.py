"""Does pre-training without labels help where labels are few? 50 labelled digits, and all the others without.

    python examples/pretrain_digits.py       # a minute; the picture goes to out/pretrain_digits

Of scikit-learn's 1,797 digits a third is held out for the accuracy. Of the others 50, five of each class, have labels;
all of them are there without. Everything but where the encoder starts is the same for all.
"""

from __future__ import annotations

import numpy as np
from comparing import arguments, show

from fastenc import finetune
from fastenc.data import load
from fastenc.record import split_rows

LABELS_OF_EACH, TEST_SHARE = 5, 1 / 3
ROUNDS_WITHOUT = 0.5  # passes over the rows without labels, of those over the rows with
ENCODER = {"widths": (128, 64, 32), "activation": "relu"}
WAYS = {
    "from scratch": {},
    "pre-trained as an autoencoder": {"pretraining": "autoencoder"},
    "pre-trained as a denoising autoencoder": {"pretraining": "denoising", "noise": 0.3},
    "pre-trained with masked pixels": {"pretraining": "masking", "mask": 0.3},
    "pre-trained by contrast (InfoNCE)": {"pretraining": "contrastive", "noise": 0.1, "mask": 0.3, "batch_size": 128},
}


def main() -> None:
    args = arguments("Pre-training beside training from scratch.", "pretrain_digits", epochs=100, seeds=5)
    digits = load("digits")
    x, y = (digits.features / 16).astype(np.float32), digits.target
    accuracy: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(args.seeds):
        rest, test = split_rows(len(x), TEST_SHARE, seed)
        few = np.concatenate([rest[y[rest] == digit][:LABELS_OF_EACH] for digit in range(10)])
        for name, way in WAYS.items():
            options = dict(way)
            method = options.pop("pretraining", None)
            before = {}
            if method is not None:
                options["epochs"] = max(1, round(ROUNDS_WITHOUT * args.epochs))
                before = {"strategy": "pretrain", "unlabelled": x[rest], "pretraining": method}
                before["pretraining_options"] = options
            result = finetune(
                x[few], y[few], **ENCODER, **before, epochs=args.epochs, batch_size=10, seed=seed, verbose=False
            )
            accuracy[name].append(float((result.predict(x[test]) == y[test]).mean()))
    print(f"{len(few)} labels, {len(rest)} rows without, scored on {len(test)}; {args.seeds} seeds\n")
    show(accuracy, "accuracy", args.out / "accuracy.png")


if __name__ == "__main__":
    main()
