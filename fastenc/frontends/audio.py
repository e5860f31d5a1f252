"""Sound: files to samples of one rate, and samples to features by log-mel spectra, convolution over time and a GRU."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError
from ..data.extras import require
from ..modules import FusedDense
from .base import FrontEnd
from .mel import LogMel, inside, most_bands
from .reader import Reader

FRAME = 0.032  # seconds, about; the length in samples is a power of two, at least SHORTEST
SHORTEST = 64
BANDS = 40
PARTS = 4  # of a row's time, in its summary
REACH, STRIDE = 3, 2  # of each convolution over time, in frames
BLOCK = 1 << 20  # samples decoded at a time
UNKNOWN = 1 << 62  # a number of samples as large as this stands for none in the file's header


class AudioReader(Reader):
    """WAV, FLAC and Ogg files, by libsndfile, to float32 [samples]: their channels' mean, at one sample rate.

    Args:
        sample_rate: of what `read` gives, in hertz. None: `fit` takes the most common one, the higher of equals.

    What has another rate is resampled (scipy.signal.resample_poly). A WAV file that was cut off is read as far as it
    goes.
    """

    kind = "audio"
    suffixes = (".wav", ".flac", ".ogg")

    def __init__(self, sample_rate: int | None = None) -> None:
        self.sample_rate = sample_rate

    def fit(self, items: Sequence[Any]) -> AudioReader:
        rates: Counter[int] = Counter()
        for item in items:
            with _open(item) as file:
                rates[file.samplerate] += 1
        if self.sample_rate is None and rates:
            self.sample_rate = max(rates, key=lambda rate: (rates[rate], rate))
        return self

    def read(self, item: Any) -> np.ndarray:
        if self.sample_rate is None:
            raise ValueError("this AudioReader knows no sample rate; fit it to the items first, or give it one")
        samples, rate = _decode(item)
        if rate != self.sample_rate:
            signal = require("scipy.signal", "sound of several sample rates", extra="frontends")
            shared = math.gcd(rate, self.sample_rate)
            samples = signal.resample_poly(samples, self.sample_rate // shared, rate // shared)
        return np.ascontiguousarray(samples, np.float32)

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """[B, samples of the longest], NaN behind the end of each."""
        x = np.full((len(arrays), max(map(len, arrays))), np.nan, np.float32)
        for row, array in zip(x, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(x)

    def front_end(self) -> AudioFrontEnd:
        if self.sample_rate is None:
            raise ValueError("this AudioReader knows no sample rate; fit it to the items first, or give it one")
        return AudioFrontEnd(self.sample_rate)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "sample_rate": self.sample_rate}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> AudioReader:
        return cls(state["sample_rate"])


def _name(item: Any) -> str:
    return "the sound" if isinstance(item, bytes) else str(item)


def _open(item: Any) -> Any:
    """soundfile's SoundFile of a path, or of a file's bytes.

    Raises:
        DataError: there is no such file, or it holds no sound.
    """
    soundfile = require("soundfile", "reading sound", extra="frontends")
    name, source = _name(item), item
    if isinstance(item, bytes):
        size, source = len(item), io.BytesIO(item)
    else:
        if not Path(item).is_file():
            raise DataError(f"there is no file {name}; give the path of a sound")
        size, source = Path(item).stat().st_size, str(item)
    if size == 0:
        raise DataError(f"{name} is empty; copy it again, or leave it out")
    try:
        return soundfile.SoundFile(source)
    except soundfile.SoundFileError as error:
        raise DataError(f"{name} is not sound that can be read ({_why(error)}); give WAV, FLAC or Ogg files") from None


def _why(error: Exception) -> str:
    """libsndfile's own words, without the path, which soundfile puts before them."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def _decode(item: Any) -> tuple[np.ndarray, int]:
    """The mean of the channels, float32 [samples], and the sample rate.

    Raises:
        DataError: as `_open`; the file is damaged, or holds nothing, silence, NaN or Inf.
    """
    soundfile = require("soundfile", "reading sound", extra="frontends")
    name, parts = _name(item), []
    with _open(item) as file:
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                parts.append(block.mean(1))
        except soundfile.SoundFileError as error:
            raise DataError(f"{name} is damaged ({_why(error)}); copy it again, or leave it out") from None
        rate, promised = file.samplerate, file.frames
    samples = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if len(samples) < promised < UNKNOWN:
        raise DataError(f"{name} ends after {len(samples)} of {promised} samples; copy it again, or leave it out")
    if len(samples) == 0:
        raise DataError(f"{name} holds no samples; leave it out")
    if not np.isfinite(samples).all():
        raise DataError(f"{name} holds NaN or Inf; write it again from its source, or leave it out")
    if not samples.any() or (len(samples) > 1 and samples.min() == samples.max()):
        raise DataError(f"{name} is silent, once its channels are mixed; leave it out")
    return samples, rate


def _frame_length(sample_rate: int) -> int:
    return max(SHORTEST, 1 << max(0, math.ceil(math.log2(FRAME * sample_rate))))


class AudioFrontEnd(FrontEnd):
    """Sounds [B, samples], NaN behind the end of each, to features [B, 2 * hidden + 2 * n_mels].

    Log-mel spectra (`LogMel`); two convolutions over time, each of 3 frames and every second place, as FusedDense
    layers on neighbouring frames (a time-delay network: Peddinti et al., Interspeech 2015); a GRU. The features are the
    mean and the largest of the GRU's outputs over the row's time, and mean and deviation of each band, under a
    LayerNorm, without which they are so unequal that training takes about twice as many epochs.

    Args:
        sample_rate: in hertz, of the samples.
        n_mels: bands; None: 40, or as many as there can be.
        n_fft: samples in a frame; None: the power of two of 32 ms, or the next.
        hop: samples from one frame to the next; None: half a frame.
        channels, hidden: widths of the convolutions and of the GRU.

    Raises:
        ValueError: as LogMel.
    """

    kind = "audio"

    def __init__(
        self,
        sample_rate: int,
        n_mels: int | None = None,
        n_fft: int | None = None,
        hop: int | None = None,
        channels: int = 64,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        n_fft = _frame_length(sample_rate) if n_fft is None else n_fft
        hop = n_fft // 2 if hop is None else hop
        n_mels = most_bands(sample_rate, n_fft, BANDS) if n_mels is None else n_mels
        self._config = {
            "sample_rate": sample_rate,
            "n_mels": n_mels,
            "n_fft": n_fft,
            "hop": hop,
            "channels": channels,
            "hidden": hidden,
        }
        self.spectra = LogMel(sample_rate, n_fft, hop, n_mels)
        self.convolutions = nn.ModuleList(FusedDense(REACH * width, channels) for width in (n_mels, channels))
        self.gru = nn.GRU(channels, hidden, batch_first=True)
        self.out_features = 2 * hidden + 2 * n_mels
        self.norm = nn.LayerNorm(self.out_features)
        self.summary_features = PARTS * n_mels

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)

    def forward(self, x: Tensor) -> Tensor:
        spectra, frames = self.spectra(x)
        mean = spectra.sum(1) / frames[:, None]
        squares = torch.where(inside(frames, spectra.shape[1]), spectra - mean[:, None], 0.0).square()
        deviation = (squares.sum(1) / frames[:, None] + 1e-6).sqrt()  # whose slope is finite at 0
        steps = spectra.to(self.gru.weight_ih_l0.dtype)
        for layer in self.convolutions:
            around = REACH // 2
            steps = F.pad(steps, (0, 0, around, around)).unfold(1, REACH, STRIDE).flatten(2)
            frames = (frames + STRIDE - 1) // STRIDE
            within = inside(frames, steps.shape[1])
            steps = torch.where(within, layer(steps), 0.0)  # the next one sees zeros behind the end, as if alone
        steps, _ = self.gru(steps)  # runs forward: what is behind a row's end changes nothing before it
        mean_step = torch.where(within, steps, 0.0).sum(1) / frames[:, None]
        largest = torch.where(within, steps, -1.0).amax(1)  # a GRU's outputs are above -1
        parts = (mean_step, largest, mean, deviation)
        return self.norm(torch.cat([part.to(steps.dtype) for part in parts], 1))

    @torch.no_grad()
    def summary(self, x: Tensor) -> Tensor:
        """The mean of each band in each quarter of a row's time: [B, 4 * n_mels], from -1.5 to about 2."""
        spectra, frames = self.spectra(x)
        return (shares_of_time(frames, spectra.shape[1], spectra.dtype) @ spectra).flatten(1)


def shares_of_time(frames: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """What each of T frames is of each of PARTS equal parts of a row: [B, PARTS, T]; each part's shares sum to 1.

    frames: of each row, [B]; fewer than PARTS, one frame is in several parts.
    """
    width = frames.to(dtype)[:, None, None] / PARTS
    start = torch.arange(PARTS, dtype=dtype, device=frames.device)[:, None] * width
    time = torch.arange(T, dtype=dtype, device=frames.device)
    return (torch.minimum(time + 1, start + width) - torch.maximum(time, start)).clamp(min=0) / width
