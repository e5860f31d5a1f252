"""Train the article's encoder on real handwritten digits, see what its 16 numbers keep, and how fast that went.

    python examples/digits.py                # a few seconds; everything goes to out/digits

Dense 128-64-32-16 with ReLU and its mirror image, MSE and Adam, on scikit-learn's 1,797 digits of 8 x 8 pixels. A fifth
of them is held out for the figures at the end and looked at only there; epochs, learning rate and batch size were
chosen by the loss on a validation part of the others.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import nn

from fastenc import AutoEncoder, EarlyStopping, Encoder, Trainer, explain, plots
from fastenc.data import Preprocessor, load
from fastenc.record import fingerprint, split_rows, write_record
from fastenc.report import dead_units, evaluate_codes, fit_pca, render_evaluation, table
from fastenc.vectors import write_vectors

SEED = 0
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15
LEARNING_RATE, BATCH_SIZE = 2e-3, 32
INK = 16  # pixels are 0 to 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an encoder on handwritten digits and show what came out.")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for all files (%(default)s)")
    parser.add_argument("--epochs", type=int, default=300, help="passes over the training rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each in the speed comparison (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of PyTorch; more do not help so small a model (%(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    digits = load("digits")
    # The range of a pixel is known, so the scale is fitted on a blank and a black image: it is pixel / 16 for all.
    scale = Preprocessor(scale="minmax").fit(np.array([[0.0] * 64, [INK] * 64]))
    x = scale.transform(digits.features).x
    rest, test = split_rows(len(x), TEST_SHARE, SEED)
    keep, validation = (rest[part] for part in split_rows(len(rest), VALIDATION_SHARE, SEED))

    model = article_autoencoder(x.shape[1])
    parts = f"{len(keep)} to train on, {len(validation)} to validate, {len(test)} held out"
    print(f"{len(x)} digits of {x.shape[1]} pixels: {parts}")
    print(f"Backend for {explain(model, torch.from_numpy(x[:BATCH_SIZE]))}")
    trainer = Trainer(model, "adam", LEARNING_RATE, "mse", seed=SEED)
    history = trainer.fit(
        x[keep],
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        validation_data=x[validation],
        callbacks=[EarlyStopping(patience=args.epochs)],  # never stops; gives back the best epoch's weights
        verbose=True,
    ).history
    best = int(np.argmin(history["val_loss"]))
    print(
        f"\nBest epoch {best + 1} of {args.epochs}: loss {history['loss'][best]:.5f}, "
        f"validation loss {history['val_loss'][best]:.5f}\n"
    )

    codes, reconstruction = trainer.encode(x), trainer.predict(x)
    evaluation = evaluate_codes(x, codes, reconstruction, digits.target, fit_rows=keep, score_rows=test)
    print(f"On the {len(test)} digits held out:\n\n{render_evaluation(evaluation)}\n")
    if dead := dead_units(codes):
        print(
            f"{len(dead)} of the 16 code units are 0 for every digit. A ReLU can die in training and then stays so;\n"
            'Encoder(..., final_activation="identity") has no such units. The article\'s encoder is left as it is.\n'
        )
    speeds = compare_speed(x[keep], args.rounds)
    ours = speeds["fastenc"]
    rows = [(name, f"{speed:,.0f}", f"{ours / speed:.2f} times") for name, speed in speeds.items()]
    threads = torch.get_num_threads()
    header = (f"Training on {threads} thread{'s' * (threads > 1)}", "steps per second", "fastenc against it")
    print(table(header, rows) + "\n")

    folder = args.out / "model"
    model.save_pretrained(folder, preprocessing=scale.to_dict())
    write_record(folder, fingerprint(x), rows=len(x), held_out=TEST_SHARE, seed=SEED, target=None, history=history)
    write_vectors(args.out / "vectors.npy", [codes])
    figures = {"best_epoch": best + 1, "loss": history["loss"][best], "val_loss": history["val_loss"][best]}
    figures |= {"dead_units": dead, "steps_per_second": speeds, **evaluation.to_dict()}
    (args.out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(args.out, x, codes, reconstruction, digits.target, history, keep, validation, test)
    print(f"Model, vectors and pictures are in {args.out} ({time.perf_counter() - began:.0f} s); look at overview.png.")


def article_autoencoder(pixels: int) -> AutoEncoder:
    """The article's encoder, with the start that it has in the article's Keras: Glorot's weights and no biases."""
    torch.manual_seed(SEED)
    model = AutoEncoder(Encoder(pixels, (128, 64, 32, 16), activation="relu"))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    return model


class EagerLoop:
    """The same autoencoder and the usual training loop in plain PyTorch."""

    def __init__(self, model: AutoEncoder, **options: bool) -> None:
        layers: list[nn.Module] = []
        for dense in (*model.encoder.layers, *model.decoder.layers):
            linear = nn.Linear(dense.in_features, dense.out_features)
            linear.load_state_dict(dense.state_dict())
            layers += [linear, nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])  # the reconstruction has no activation
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, **options)

    def epoch(self, x: torch.Tensor, order: torch.Tensor) -> float:
        """One pass over the rows of x in this order; the mean loss."""
        total = torch.zeros(())
        for rows in order.split(BATCH_SIZE):
            batch = x[rows]
            loss = nn.functional.mse_loss(self.model(batch), batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(rows)
        return float(total) / len(x)


def compare_speed(x: np.ndarray, rounds: int) -> dict[str, float]:
    """Steps per second of fastenc and of PyTorch on the same rows: medians of `rounds` turns, one after the other."""
    rows = torch.from_numpy(x)
    model = article_autoencoder(x.shape[1])
    loops = {"PyTorch, Adam": EagerLoop(model), "PyTorch, Adam(fused=True)": EagerLoop(model, fused=True)}
    trainer = Trainer(model, "adam", LEARNING_RATE, "mse", seed=SEED)

    losses = [loop.epoch(rows, torch.arange(len(rows))) for loop in loops.values()]
    loss = trainer.fit(x, epochs=1, batch_size=BATCH_SIZE, shuffle=False, verbose=False).history["loss"][0]
    if not np.allclose(losses, loss, rtol=1e-3):
        raise RuntimeError(f"fastenc and PyTorch do not train alike: losses {loss} and {losses} after one epoch")

    epochs = 5
    steps = epochs * -(-len(rows) // BATCH_SIZE)
    seconds: dict[str, list[float]] = {"fastenc": [], **{name: [] for name in loops}}
    for _ in range(rounds):
        began = time.perf_counter()
        trainer.fit(x, epochs=epochs, batch_size=BATCH_SIZE, verbose=False)
        seconds["fastenc"].append(time.perf_counter() - began)
        for name, loop in loops.items():
            began = time.perf_counter()
            for _ in range(epochs):
                loop.epoch(rows, torch.randperm(len(rows)))
            seconds[name].append(time.perf_counter() - began)
    return {name: steps / median(times) for name, times in seconds.items()}


def draw(
    out: Path,
    x: np.ndarray,
    codes: np.ndarray,
    reconstruction: np.ndarray,
    labels: np.ndarray,
    history: dict[str, list[float]],
    keep: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
) -> None:
    """Write the pictures."""
    pca = fit_pca(x[keep], codes.shape[1])
    by_pca = pca.inverse_transform(pca.transform(x[test]))
    pca_validation = float(np.square(pca.inverse_transform(pca.transform(x[validation])) - x[validation]).mean())
    shown = np.concatenate([np.flatnonzero(labels[test] == digit)[:1] for digit in range(10)])
    images = {
        "original": x[test][shown],
        "fastenc": reconstruction[test][shown],
        "PCA": by_pca[shown],
    }
    images = {name: pixels.reshape(-1, 8, 8).clip(0, 1) for name, pixels in images.items()}
    points = TSNE(init="pca", max_iter=500, random_state=SEED).fit_transform(codes)

    def losses(axes: object) -> None:
        plots.draw_losses(axes, history, ("PCA, 16 components, validation", pca_validation))

    def grid(axes: object) -> None:
        plots.draw_images(axes, images, "Held-out digits and what 16 numbers keep of them")

    def map_(axes: object) -> None:
        plots.draw_map(axes, points, labels, "The codes of all digits, by t-SNE")

    def overview(figure: object) -> None:
        grid_spec = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1.25, 1))
        losses(figure.add_subplot(grid_spec[0, 0]))
        grid(figure.add_subplot(grid_spec[1, 0]))
        map_(figure.add_subplot(grid_spec[:, 1]))

    plots.save_plot(losses, out / "losses.png")
    plots.save_plot(grid, out / "reconstructions.png", (9, 2.9))
    plots.save_plot(map_, out / "map.png", (8, 8))
    plots.save_figure(overview, out / "overview.png", (14, 7))


if __name__ == "__main__":
    main()
