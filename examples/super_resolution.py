"""Photographs at twice their resolution by a dense encoder on patches, beside bicubic and a linear model of them.

    python examples/super_resolution.py      # half a minute; the picture goes to out/super_resolution

scikit-learn's two bundled photographs. The left two thirds of the temple are trained on; its right third and the
flower, which is another photograph, are scored. Each is first made half as large (bicubic, anti-aliased, rounded to 8
bits), and is then to be made what it was. Only its luma is learned, as usual since Dong et al. (arXiv:1501.00092); the
colours are bicubic. For each small pixel the model sees the 9 x 9 around it and says what bicubic misses in the 2 x 2
pixels that it becomes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comparing import Row, arguments, write_results
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fastenc import Encoder, Regressor, Trainer, plots
from fastenc.report import table

SIDE, WIDTHS = 9, (128, 128, 64)  # widths, rate and activation: the best on the last 126 of the columns trained on
CUT = 426  # the temple's column from which it is scored
SHOWN = ((176, 240), 112)  # of the flower: corner and side of the square in the picture, pixels
BICUBIC, LINEAR, OURS = "bicubic", "linear, of the same patches", "fused encoder"
TEMPLE, FLOWER = "temple, right third", "flower"


class Photograph:
    """One to be scored or learned from.

    high     [3, 2h, 2w] luma and two colour differences (JPEG's YCbCr) in 0 to 1, of 8 bits
    low      [3, h, w] the same at half the size, of 8 bits
    bicubic  [3, 2h, 2w] low made large again
    """

    def __init__(self, pixels: np.ndarray) -> None:
        height, width = (size // 2 * 2 for size in pixels.shape[:2])
        ycbcr = np.array(Image.fromarray(pixels[:height, :width]).convert("YCbCr"))
        self.high = torch.from_numpy(ycbcr).permute(2, 0, 1).float() / 255
        low = F.interpolate(self.high[None], scale_factor=0.5, mode="bicubic", antialias=True)[0]
        self.low = _rounded(low)
        self.bicubic = F.interpolate(self.low[None], scale_factor=2, mode="bicubic")[0]

    def patches(self) -> tuple[Tensor, Tensor]:
        """For each small pixel the luma of the SIDE x SIDE around it, less its own, and what bicubic misses.

        [h * w, SIDE**2] and [h * w, 4]; at the border the photograph is mirrored.
        """
        luma = self.low[None, :1]
        around = F.unfold(F.pad(luma, [SIDE // 2] * 4, mode="reflect"), SIDE)[0].T
        missing = F.pixel_unshuffle(self.high[None, :1] - self.bicubic[None, :1], 2)
        return around - luma.flatten()[:, None], missing[0].flatten(1).T

    def improved(self, missing: Tensor) -> Tensor:
        """The large luma [2h, 2w] with what a model says is missing [h * w, 4], of 8 bits."""
        height, width = self.low.shape[1:]
        return _rounded(self.bicubic[0] + F.pixel_shuffle(missing.T.reshape(1, 4, height, width), 2)[0, 0])

    def scores(self, luma: Tensor) -> tuple[float, float]:
        """PSNR in dB and SSIM (Wang et al. 2004) of a luma."""
        pair = luma[None, None], self.high[None, :1]
        psnr = peak_signal_noise_ratio(*pair, data_range=1.0)
        return float(psnr), float(structural_similarity_index_measure(*pair, data_range=1.0))

    def in_colour(self, luma: Tensor) -> np.ndarray:
        """uint8 [2h, 2w, 3], RGB, of a luma and bicubic's colours."""
        return _in_colour(torch.cat([luma[None], self.bicubic[1:]]))


def _rounded(values: Tensor) -> Tensor:
    return values.clamp(0, 1).mul(255).round() / 255


def _in_colour(ycbcr: Tensor) -> np.ndarray:
    pixels = (_rounded(ycbcr) * 255).round().byte().permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    return np.asarray(Image.frombytes("YCbCr", (width, height), pixels.tobytes()).convert("RGB"))


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Patches and targets in all eight ways to turn and mirror them."""
    squares, pairs = x.view(-1, SIDE, SIDE), y.view(-1, 2, 2)
    xs, ys = [], []
    for turns in range(4):
        for mirrored in (False, True):
            for given, found in ((squares, xs), (pairs, ys)):
                way = given.rot90(turns, (1, 2))
                found.append((way.flip(2) if mirrored else way).flatten(1))
    return torch.cat(xs), torch.cat(ys)


def main() -> None:
    args = arguments("Super-resolution of photographs.", "super_resolution", epochs=4, seeds=3)
    temple, flower = load_sample_images().images
    learned = Photograph(temple[:, :CUT])
    scored = {TEMPLE: Photograph(temple[:, CUT:]), FLOWER: Photograph(flower)}
    x, y = turned(*learned.patches())
    x_scale, y_scale = x.std(), y.std()
    wide = x.double()
    linear = (torch.linalg.pinv(wide.T @ wide, hermitian=True) @ (wide.T @ y.double())).float()  # least squares
    found: dict[str, dict[str, list[tuple[float, float]]]] = {
        place: {name: [] for name in (BICUBIC, LINEAR, OURS)} for place in scored
    }
    shown: dict[str, np.ndarray] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = Regressor(Encoder(SIDE**2, WIDTHS, "leaky_relu"), 4)
        trainer = Trainer(model, lr=2e-3, schedule="cosine", seed=seed)
        trainer.fit(x / x_scale, y / y_scale, epochs=args.epochs, batch_size=256, verbose=False)
        for place, photograph in scored.items():
            patches, _ = photograph.patches()
            improved = {
                BICUBIC: _rounded(photograph.bicubic[0]),
                LINEAR: photograph.improved(patches @ linear),
                OURS: photograph.improved(trainer.predict(patches / x_scale) * y_scale),
            }
            for name, luma in improved.items():
                found[place][name].append(photograph.scores(luma))
            if place == FLOWER and not shown:
                shown = {name: photograph.in_colour(luma) for name, luma in improved.items()}
    print(f"Trained on {len(x)} patches of the temple's left two thirds; {args.seeds} seeds")
    for place, of in found.items():
        print(f"\n{place}")
        rows = [
            (name, f"{psnr:.2f}", f"{spread:.2f}", f"{ssim:.4f}")
            for name, scores in of.items()
            for (psnr, ssim), (spread, _) in [(np.mean(scores, axis=0), np.std(scores, axis=0))]
        ]
        print(table(("", "PSNR, dB", "standard deviation", "SSIM"), rows))
    means = {place: {name: np.mean(scores, axis=0) for name, scores in of.items()} for place, of in found.items()}
    write_results(
        args.out,
        [
            Row(
                f"{place} at twice the size, {what}",
                float(means[place][OURS][i]),
                BICUBIC,
                float(means[place][BICUBIC][i]),
            )
            for place in scored
            for i, what in enumerate(("PSNR in dB", "SSIM"))
        ],
    )
    pictures = {
        "half the size": _in_colour(scored[FLOWER].low.repeat_interleave(2, 1).repeat_interleave(2, 2)),
        **{f"{name}, {found[FLOWER][name][0][0]:.2f} dB": shown[name] for name in (BICUBIC, OURS)},
        "original": _in_colour(scored[FLOWER].high),
    }
    path = args.out / "photograph.png"
    plots.save_figure(lambda figure: draw(figure, pictures), path, (16, 6.8))
    print(f"\nThe picture is {path}.")


def draw(figure: Any, pictures: dict[str, np.ndarray]) -> None:
    """Each of the pictures, and below it a part of it enlarged."""
    (top, left), side = SHOWN
    for places, part in zip(figure.subplots(2, len(pictures), height_ratios=(2, 3)), (False, True), strict=True):
        for axes, (name, picture) in zip(places, pictures.items(), strict=True):
            axes.imshow(picture[top : top + side, left : left + side] if part else picture, interpolation="nearest")
            axes.set_title("" if part else name)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(visible=False)
            if not part:
                xs, ys = [left, left + side], [top, top + side]
                axes.plot(
                    [xs[0], xs[1], xs[1], xs[0], xs[0]],
                    [ys[0], ys[0], ys[1], ys[1], ys[0]],
                    color="white",
                    linewidth=1.5,
                )


if __name__ == "__main__":
    main()
