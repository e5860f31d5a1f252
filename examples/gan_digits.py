"""New handwritten digits from a GAN with an encoder, beside a Gaussian in pixel space, noise, and real digits.

    python examples/gan_digits.py            # a minute; the picture goes to out/gan_digits

A VAE-GAN (Larsen et al., arXiv:1512.09300) on scikit-learn's 1,797 digits of 8 x 8 pixels, a third of them held out.
The encoder gives the mean and the variance of a code, the generator makes a digit of a code, and both reconstruct as a
variational autoencoder; a critic tells real digits from those made of random codes, and its judgement is added to the
generator's loss. The critic is that of WGAN-GP (Gulrajani et al., arXiv:1704.00028): its penalty is a loss on its own
gradient by the images, so training it differentiates the fused layers twice. All three are stacks of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comparing import Row, arguments, write_results
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor, nn

from fastenc import Encoder, plots
from fastenc.data import load
from fastenc.record import split_rows
from fastenc.report import table

TEST_SHARE, BATCH, LEARNING_RATE = 1 / 3, 64, 1e-3
CODE, WIDTHS = 16, (256, 128)
CRITIC_STEPS, PENALTY = 3, 10.0
DIVERGENCE, JUDGEMENT = 0.3, 3.0  # weights in the loss, beside a squared error of the pixels of weight 1
HALVES = (0.25, 0.5, 1.0)  # widths of the kernel, of the median distance
OURS, PLAIN, GAUSSIAN, NOISE, REAL = (
    "VAE-GAN",
    "the same without critic",
    "Gaussian in pixel space",
    "uniform noise",
    "real, the training digits",
)


class Model(nn.Module):
    """Encoder, generator and critic of images `[B, 64]` in 0 to 1 and codes `[B, CODE]`."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = Encoder(pixels, (*WIDTHS, 2 * CODE), final_activation="identity")
        self.generator = Encoder(CODE, (*reversed(WIDTHS), pixels), final_activation="sigmoid")
        self.critic = Encoder(pixels, (*WIDTHS, 1), "leaky_relu", "identity")

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the variance of the codes of x, each [B, CODE]."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def sample(self, rows: int) -> Tensor:
        return self.generator(torch.randn(rows, CODE))


def critic_loss(critic: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """WGAN-GP: how far the critic sets made images above real ones, and how far its slope between them is from 1."""
    between = torch.lerp(real, made, torch.rand(len(real), 1)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return critic(made).mean() - critic(real).mean() + PENALTY * penalty


def generator_loss(model: Model, x: Tensor, judgement: float) -> Tensor:
    """The variational autoencoder's loss of a row, and less the critic's value of images from random codes."""
    mean, log_variance = model.code(x)
    made = model.generator(mean + torch.exp(log_variance / 2) * torch.randn_like(mean))
    error = (made - x).square().sum(1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2  # of N(mean, variance) from N(0, 1)
    loss = (error + DIVERGENCE * divergence).mean()
    return loss - judgement * model.critic(model.sample(len(x))).mean() if judgement else loss


def train(x: Tensor, epochs: int, seed: int, judgement: float) -> Model:
    """The two sides take turns, which no loss of one model is; so this is a loop of its own and not a Trainer."""
    torch.manual_seed(seed)
    model = Model(x.shape[1])
    ours = [*model.encoder.parameters(), *model.generator.parameters()]
    optimizer = torch.optim.Adam(ours, LEARNING_RATE, (0.5, 0.9))
    of_critic = torch.optim.Adam(model.critic.parameters(), LEARNING_RATE, (0.5, 0.9))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            for _ in range(CRITIC_STEPS if judgement else 0):
                with torch.no_grad():
                    made = model.sample(BATCH)
                of_critic.zero_grad()
                critic_loss(model.critic, x[torch.randint(len(x), (BATCH,))], made).backward()
                of_critic.step()
            optimizer.zero_grad()
            generator_loss(model, x[rows], judgement).backward()
            optimizer.step()
    return model


def squared_mmd(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """The squared maximum mean discrepancy of two samples [rows, features], by the unbiased estimate.

    Gretton et al., "A kernel two-sample test", JMLR 13 (2012), lemma 6: of samples of one distribution it is 0 in the
    mean, and may be less. The kernel is the mean of exp(-d^2 / (2 w^2)) over widths w that are HALVES of `width`.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.mean([rbf_kernel(a, b, 1 / (2 * (share * width) ** 2)) for share in HALVES], axis=0)

    def within(a: np.ndarray) -> float:
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))  # the kernel of an image and itself is 1

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def main() -> None:
    args = arguments("A GAN with an encoder, on digits.", "gan_digits", epochs=50, seeds=3)
    digits = (load("digits").features / 16).astype(np.float32)
    distances: dict[str, list[float]] = {name: [] for name in (OURS, PLAIN, GAUSSIAN, NOISE, REAL)}
    errors, near, near_real = [], [], []
    pictures: dict[str, np.ndarray] = {}
    for seed in range(args.seeds):
        rest, test = split_rows(len(digits), TEST_SHARE, seed)
        x, held_out = digits[rest], digits[test]
        models = {
            name: train(torch.from_numpy(x), args.epochs, seed, weight)
            for name, weight in ((OURS, JUDGEMENT), (PLAIN, 0.0))
        }
        random = np.random.default_rng(seed)
        with torch.inference_mode():
            made = {name: model.sample(len(test)).numpy() for name, model in models.items()}
            again = models[OURS].generator(models[OURS].code(torch.from_numpy(held_out))[0]).numpy()
        made[GAUSSIAN] = random.multivariate_normal(x.mean(0), np.cov(x.T), len(test)).clip(0, 1).astype(np.float32)
        made[NOISE] = random.random(held_out.shape, np.float32)
        made[REAL] = x[random.choice(len(x), len(test), replace=False)]
        width = float(np.median(pdist(held_out)))
        for name, images in made.items():
            distances[name].append(squared_mmd(images, held_out, width))
        errors.append(float(np.square(again - held_out).mean() / held_out.var(0).mean()))
        near.append(cdist(made[OURS], x).min(1).mean())
        near_real.append(cdist(held_out, x).min(1).mean())
        if not pictures:
            pictures = {"held out": held_out, "reconstructed": again, **{n: made[n] for n in (OURS, PLAIN, GAUSSIAN)}}
    print(f"Trained on {len(rest)} digits, compared with {len(test)} that were held out; {args.seeds} seeds\n")
    rows = [(name, f"{np.mean(of):.5f}", f"{np.std(of):.5f}") for name, of in distances.items()]
    print(table(("", "squared MMD to the held-out digits", "standard deviation"), rows))
    print(f"\nError of reconstructing held-out digits, as a share of their variance: {np.mean(errors):.3f}")
    print(f"Distance to the nearest training digit: generated {np.mean(near):.2f}, held out {np.mean(near_real):.2f}")
    write_results(
        args.out,
        [
            Row(
                "generated digits, squared MMD x 1000 to held-out ones",
                1000 * float(np.mean(distances[OURS])),
                "Gaussian in pixel space",
                1000 * float(np.mean(distances[GAUSSIAN])),
                higher=False,
            ),
        ],
    )
    plots.save_figure(lambda figure: draw(figure, pictures, distances), args.out / "digits.png", (12, 9))
    print(f"\nThe picture is {args.out / 'digits.png'}.")


def draw(figure: Any, pictures: dict[str, np.ndarray], distances: dict[str, list[float]]) -> None:
    images, bars = figure.subplots(2, 1, height_ratios=(2.2, 1))
    rows: dict[str, np.ndarray] = {}
    for name, of in pictures.items():
        for line in range(1 if name in ("held out", "reconstructed") else 2):
            rows[name if line == 0 else " " * len(rows)] = of[16 * line : 16 * (line + 1)].reshape(-1, 8, 8).clip(0, 1)
    plots.draw_images(images, rows, "Held-out digits, their reconstructions, and new ones")
    for place, values in enumerate(distances.values()):
        bars.barh(place, max(np.mean(values), 0), color=plots.BLUE, height=0.55, alpha=0.85)
        bars.plot(values, [place] * len(values), "o", color=plots.ORANGE, markersize=5)
    bars.set_yticks(range(len(distances)), list(distances))
    bars.invert_yaxis()
    bars.set_xscale("symlog", linthresh=1e-3)
    bars.grid(axis="x")
    bars.grid(visible=False, axis="y")
    bars.set(title="Squared MMD to held-out digits: mean, and each seed", xlim=(0, 0.5))


if __name__ == "__main__":
    main()
