"""The article's encoder (its section 3.2): Dense 128-64-32-16 with ReLU, Adam and MSE, then predict.

python examples/article_encoder.py
python examples/article_encoder.py --epochs 10
"""

from __future__ import annotations

import argparse

import torch

from fastenc import AutoEncoder, Encoder, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the article's encoder on random rows, then encode them.")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the rows (%(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    input_data = torch.rand(1000, 100)

    # The article calls encoder.fit(input_data, input_data), which cannot work: the encoder gives 16 numbers for a row,
    # and the target has 100. The nearest thing that does what the article means is to train the encoder together with
    # its mirror image, which turns the 16 numbers back into 100.
    encoder = Encoder(100, (128, 64, 32, 16), activation="relu")
    trainer = Trainer(AutoEncoder(encoder), optimizer="adam", loss="mse", seed=0)
    history = trainer.fit(input_data, input_data, epochs=args.epochs, batch_size=32).history
    encoded_vector = trainer.encode(input_data)

    print(f"loss: {history['loss'][0]:.5f} after the first epoch, {history['loss'][-1]:.5f} after the last")
    print(f"encoded vectors: {tuple(encoded_vector.shape)}")


if __name__ == "__main__":
    main()
