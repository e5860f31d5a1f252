"""The article's linear encoder (its section 5.2): one Dense layer, 100 -> 10, without an activation.

python examples/article_linear.py
python examples/article_linear.py --epochs 10
"""

from __future__ import annotations

import argparse

import torch

from fastenc import Encoder, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the article's linear encoder to noisy targets.")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the rows (%(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(1000, 100)
    # The article adds noise of 1,000 x 10 to X of 1,000 x 100, which no library can do. What it means is a target that
    # depends on X and has 10 columns: here a fixed linear map of X, and the noise.
    linear_map = torch.randn(100, 10) / 10
    y = x @ linear_map + 0.1 * torch.randn(1000, 10)

    encoder = Encoder(100, (10,), activation="identity")
    trainer = Trainer(encoder, optimizer="adam", loss="mse", seed=0)
    history = trainer.fit(x, y, epochs=args.epochs, batch_size=32).history
    predicted = trainer.predict(x)

    print(f"loss: {history['loss'][0]:.5f} after the first epoch, {history['loss'][-1]:.5f} after the last")
    print(f"predicted encoded data shape: {tuple(predicted.shape)}")


if __name__ == "__main__":
    main()
