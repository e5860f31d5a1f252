"""Log-mel spectra: how loud each band of each short frame of a sound is, beside the mean of that sound."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOOR = 1e-5  # beside a row's mean power, 50 dB below it: what is quieter counts as silence


def hertz_to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Pitch as it is heard: 2595 log10(1 + f / 700) (O'Shaughnessy, Speech Communication, 1987, as HTK has it)."""
    return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)


def mel_to_hertz(mel: np.ndarray | float) -> np.ndarray:
    """The inverse of `hertz_to_mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel) / 2595.0) - 1.0)


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """What each bin of a spectrum adds to each band: float64 [n_mels, n_fft // 2 + 1].

    Triangles of height 1, each from the peak of the band below to the peak of the band above, their peaks equally far
    apart on the mel scale. The lowest begins at the first bin above 0 Hz and the highest ends at half the sample rate:
    a constant offset, which a Hann window spreads over the bins 0 and 1, is in no band.
    """
    lowest, highest = hertz_to_mel(sample_rate / n_fft), hertz_to_mel(sample_rate / 2)
    edges = mel_to_hertz(np.linspace(lowest, highest, n_mels + 2))
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    below, peak, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.maximum(0.0, np.minimum((bins - below) / (peak - below), (above - bins) / (above - peak)))
    filters[:, [0, 1, -1]] = 0.0  # the ends of the range, where rounding may leave a trace
    return filters


def most_bands(sample_rate: int, n_fft: int, wanted: int) -> int:
    """How many bands, up to `wanted`, there can be with at least one bin in each."""
    return next(n for n in range(wanted, 0, -1) if mel_filters(sample_rate, n_fft, n).any(1).all())


def inside(frames: Tensor, T: int) -> Tensor:
    """Whether each of T frames is within its row: bool [B, T, 1], of `frames` [B]."""
    return (torch.arange(T, device=frames.device) < frames[:, None]).unsqueeze(-1)


class LogMel(nn.Module):
    """Sounds [B, samples], NaN behind the end of each -> (spectra [B, T, n_mels], frames [B]).

    Frames are `n_fft` samples long, `hop` apart, under a Hann window. Those that reach beyond a row's end are 0 and not
    counted; a row shorter than one frame has one, filled up with zeros. In the others is (log10(p + FLOOR) + 2) / 2, p
    being the power in a band beside the mean of all bands and frames of the row: loudness does not matter, and values
    are from -1.5 to about 2.

    Computed in float32, or in float64 where x is, whatever autocast says.

    Args:
        sample_rate: in hertz.
        n_fft, hop: in samples.
        n_mels: bands.

    Raises:
        ValueError: sizes that make no frames, or more bands than bins.
    """

    filters: Tensor

    def __init__(self, sample_rate: int, n_fft: int, hop: int, n_mels: int) -> None:
        super().__init__()
        if sample_rate < 1 or n_fft < 8 or n_fft % 2 or hop < 1 or n_mels < 1:
            raise ValueError(
                f"sample_rate={sample_rate}, n_fft={n_fft}, hop={hop}, n_mels={n_mels} make no spectra; give positive "
                "numbers, and an even n_fft of at least 8"
            )
        if (most := most_bands(sample_rate, n_fft, n_mels)) < n_mels:
            raise ValueError(
                f"{n_mels} bands are more than frames of {n_fft} samples can tell apart; give an n_mels of at most "
                f"{most}, or a larger n_fft"
            )
        self.n_fft, self.hop = n_fft, hop
        filters = mel_filters(sample_rate, n_fft, n_mels)
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            if x.shape[1] < self.n_fft:
                x = F.pad(x, (0, self.n_fft - x.shape[1]), value=torch.nan)
            there = ~x.isnan()
            ends = (there * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1)  # behind the last sample
            frames = (ends - self.n_fft).clamp(min=0) // self.hop + 1
            x = torch.where(there, x, 0.0)
            tiny = torch.finfo(x.dtype).tiny
            x = x / x.detach().abs().amax(1, keepdim=True).clamp(min=tiny)  # so that no square is too small or large
            window = torch.hann_window(self.n_fft, dtype=x.dtype, device=x.device)
            spectra = torch.stft(x, self.n_fft, self.hop, window=window, center=False, return_complex=True)
            power = spectra.real.square() + spectra.imag.square()  # [B, bins, T]
            mel = (self.filters.to(x.dtype) @ power).transpose(1, 2)
            within = inside(frames, mel.shape[1])
            level = (mel * within).sum((1, 2)) / (frames * mel.shape[2])
            relative = mel / level.clamp(min=tiny)[:, None, None]
            return torch.where(within, (torch.log10(relative + FLOOR) + 2) / 2, 0.0), frames
