"""Pictures of any size in folders of their classes: which digit it is, beside logistic regression on resized pixels.

    python examples/images.py                # half a minute; pictures and figures go to out/images

scikit-learn's digits are drawn 14 to 32 pixels large, at a random place of a grey canvas that is up to a third larger
each way, and written as PNG files into a folder for each class, as `fastenc finetune FOLDER` takes them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from comparing import Row, arguments, show, write_results
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fastenc import Classifier, Encoder, Trainer, plots
from fastenc.data import load
from fastenc.frontends import FrontEncoder, Items, collect, encode_items, make_loader
from fastenc.frontends.images import ImageReader
from fastenc.record import split_rows

TEST_SHARE, SIDE = 0.3, 16
OURS, THEIRS = "convolutional stem and dense encoder", f"logistic regression on {SIDE} x {SIDE} pixels"


def draw(digit: np.ndarray, random: np.random.Generator) -> Image.Image:
    """A digit, [64] in 0 to 16, somewhere on a canvas of 14 to 42 pixels a side."""
    side = int(random.integers(14, 33))
    height, width = side + random.integers(0, side // 3 + 1, 2)
    image = Image.fromarray((digit.reshape(8, 8) / 16 * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    canvas = np.full((height, width), random.integers(0, 60), np.uint8)
    top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    canvas[top : top + side, left : left + side] = np.maximum(canvas[top : top + side, left : left + side], image)
    return Image.fromarray(canvas)


def write_folder(folder: Path, rows: int, seed: int) -> None:
    """PNG files, at least one of each class, in a folder for each class."""
    digits, random = load("digits"), np.random.default_rng(seed)
    for number in range(rows):
        path = folder / f"digit {digits.target[number]}" / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        draw(digits.features[number], random).save(path)


def main() -> None:
    args = arguments("Pictures of any size in folders of their classes.", "images", epochs=12, seeds=3, rows=1797)
    accuracy: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), args.rows, seed)
            found = collect(folder, "image")
            kept, test = split_rows(len(found), TEST_SHARE, seed)
            items = Items(ImageReader().fit([found.items[number] for number in kept]), found.items)
            pixels = np.stack([np.asarray(Image.open(path).resize((SIDE, SIDE))) for path in found.items]) / 255
        classes, labels = np.unique(found.labels, return_inverse=True)
        target = torch.from_numpy(labels)
        torch.manual_seed(seed)
        frontend = items.reader.front_end()
        model = Classifier(FrontEncoder(frontend, Encoder(frontend.out_features, (128, 32))), len(classes))
        Trainer(model, lr=2e-3, loss="cross_entropy", schedule="cosine", seed=seed).fit(
            make_loader(items, kept, target, seed=seed), epochs=args.epochs, verbose=False
        )
        logits = encode_items(model, items)[test]
        accuracy[OURS].append(float((logits.argmax(1) == labels[test]).mean()))
        flat = pixels.reshape(len(pixels), -1)
        baseline = LogisticRegression(max_iter=1000).fit(flat[kept], labels[kept])
        accuracy[THEIRS].append(float(baseline.score(flat[test], labels[test])))
    print(f"{len(kept)} pictures of 14 to 42 pixels a side to train on, scored on {len(test)}; {args.seeds} seeds\n")
    show(accuracy, "accuracy", args.out / "accuracy.png")

    draw_some(items, test, classes[logits.argmax(1)], args.out / "pictures.png")
    ours, theirs = (float(np.mean(accuracy[name])) for name in (OURS, THEIRS))
    write_results(args.out, [Row("pictures of any size: accuracy", ours, THEIRS, theirs)])


def draw_some(items: Items, rows: np.ndarray, answers: np.ndarray, path: Path) -> None:
    """Twelve pictures at the same scale, and what the model takes them for."""

    def draw(figure: Figure) -> None:
        for axes, row, answer in zip(figure.subplots(2, 6).flat, rows, answers, strict=False):
            axes.imshow(items[int(row)][1][0], cmap="gray", vmin=0, vmax=255)
            axes.set(xlim=(-0.5, 41.5), ylim=(41.5, -0.5), xticks=[], yticks=[])
            axes.set_title(answer, fontsize=11)
            axes.set_facecolor("#dfe8ef")
            axes.spines[:].set_visible(False)

    plots.save_figure(draw, path, (11, 4.2))


if __name__ == "__main__":
    main()
