"""Time series of several sensors: SeriesReader reads recordings, SeriesFrontEnd makes features of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError
from ..modules import FusedDense
from .base import FrontEnd
from .reader import Reader
from .recordings import LARGEST, read_recording

LISTED = 10  # columns that an error names


class SeriesReader(Reader):
    """Recordings: files of rows, which are time steps, and columns, which are channels; classes by folder.

    An item is the path of a .csv (names in the first line, empty fields are missing) or .npy file, the bytes of one, an
    array [T, C], or a pandas or pyarrow table. Tables may have their columns in any order; arrays have no names and
    need them in that of the recordings that were fitted.

    Attributes, of what was fitted:
        columns: names of the C channels; "0", "1", ... of arrays.
        sensors: name -> the numbers of its channels: those whose names have the same part before the first ".", or
            before the first "_" where there is no ".". All channels without such a part are one sensor, "".
        mean, deviation: float64 [C], over all steps that have a value; 0 and 1 where there is none. A channel that
            never changes has deviation 1.
    """

    kind = "series"
    suffixes = (".csv", ".npy")

    def __init__(self) -> None:
        self.columns: list[str] = []
        self.sensors: dict[str, list[int]] = {}
        self.mean = self.deviation = np.empty(0)

    def fit(self, items: Sequence[Any]) -> SeriesReader:
        if len(items) == 0:
            raise DataError("there are no recordings to fit to; give at least one")
        self.columns = []
        for item in items:
            values, names, shown = read_recording(item)
            if not self.columns:
                self.columns = names or [str(number) for number in range(values.shape[1])]
                self.sensors = sensors_of(self.columns)
                count, mean, squares = (np.zeros(len(self.columns)) for _ in range(3))
            values = self._in_order(values, names, shown)
            # Two parts' means and sums of squared differences from them, put together as Chan et al. (1983) do.
            seen = ~np.isnan(values)
            more = seen.sum(axis=0)
            its_mean = np.where(seen, values, 0.0).sum(axis=0) / np.maximum(more, 1)
            apart = its_mean - mean
            share = more / np.maximum(count + more, 1)
            squares += np.square(np.where(seen, values - its_mean, 0.0)).sum(axis=0) + np.square(apart) * count * share
            mean += apart * share
            count += more
        deviation = np.sqrt(squares / np.maximum(count, 1))
        constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)  # only the rounding of the mean
        self.mean, self.deviation = mean, np.where(constant, 1.0, deviation)
        return self

    def read(self, item: Any) -> np.ndarray:
        """float32 [T, C]: in the columns' order, less their means, by their deviations; NaN is missing.

        Raises:
            DataError: it cannot be read, has other columns, no rows, text or dates, or values that are infinite.
            ValueError: nothing was fitted.
        """
        if not self.columns:
            raise ValueError("this SeriesReader knows no columns yet; call fit first, with the recordings to train on")
        values, names, shown = read_recording(item)
        values = (self._in_order(values, names, shown) - self.mean) / self.deviation
        if np.nanmax(np.abs(values), initial=0.0) > LARGEST:
            raise DataError(f"{shown} holds values far beyond those of the fitted recordings; leave such fields empty")
        return values.astype(np.float32)

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """float32 [B, longest T, C], NaN at the end of shorter ones."""
        x = torch.full((len(arrays), max(map(len, arrays)), len(self.columns)), torch.nan)
        for row, array in zip(x, arrays, strict=True):
            row[: len(array)] = torch.from_numpy(array)
        return x

    def front_end(self) -> SeriesFrontEnd:
        return SeriesFrontEnd(list(self.sensors.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "columns": self.columns,
            "sensors": self.sensors,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> SeriesReader:
        reader = cls()
        reader.columns, reader.sensors = list(state["columns"]), dict(state["sensors"])
        reader.mean, reader.deviation = np.array(state["mean"]), np.array(state["deviation"])
        return reader

    def _in_order(self, values: np.ndarray, names: list[str] | None, shown: str) -> np.ndarray:
        """The columns as they were fitted."""
        listed = ", ".join(self.columns[:LISTED]) + (", ..." if len(self.columns) > LISTED else "")
        if names is None:
            if values.shape[1] != len(self.columns):
                raise DataError(
                    f"{shown} has {values.shape[1]} columns where {len(self.columns)} are expected; give it those of "
                    f"the other recordings: {listed}"
                )
            return values
        if lacking := [name for name in self.columns if name not in names]:
            raise DataError(
                f"{shown} has no column {lacking[0]!r}; give it the columns of the other recordings, {listed}, and "
                "leave the fields of a sensor without values empty"
            )
        if unknown := [name for name in names if name not in self.columns]:
            raise DataError(
                f"{shown} has a column {unknown[0]!r} that the first recording has not; leave it out, the columns are "
                f"{listed}"
            )
        return values[:, [names.index(name) for name in self.columns]]


def sensors_of(columns: Sequence[str]) -> dict[str, list[int]]:
    """The channels of each sensor, by the beginnings of the columns' names; see SeriesReader."""
    sensors: dict[str, list[int]] = {}
    for number, name in enumerate(columns):
        mark = next((mark for mark in "._" if mark in name), None)
        sensors.setdefault("" if mark is None else name.partition(mark)[0], []).append(number)
    return sensors


class SensorEncoder(nn.Module):
    """The time steps of one sensor [B, T, channels] as vectors [B, T, width].

    Fused layers over `kernel` steps, the middle one in their middle: convolutions in time. Those of each further layer
    lie `kernel` times as far apart, so that a step sees kernel ** depth steps. The first layer takes the channels'
    values and, for each, whether there is one.
    """

    def __init__(self, channels: int, width: int, kernel: int, depth: int, activation: str) -> None:
        super().__init__()
        self.kernel = kernel
        sizes = [2 * channels] + [width] * (depth - 1)
        self.layers = nn.ModuleList(FusedDense(kernel * size, width, activation=activation) for size in sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, NaN where there is no value -> vectors, 0 at steps without any; bool [B, T, 1], whether there is any."""
        missing = x.isnan()
        present = ~missing.all(-1, keepdim=True)
        x = torch.cat([x.masked_fill(missing, 0.0), (~missing).to(x.dtype)], -1)
        for number, layer in enumerate(self.layers):
            # Steps without a value are 0 before each layer, as what lies beyond the ends: padding changes nothing.
            x = layer(_around(x, self.kernel, self.kernel**number)).masked_fill(~present, 0.0)
        return x, present


def _around(x: Tensor, kernel: int, apart: int) -> Tensor:
    """Of each step of x [B, T, F], `kernel` steps around it that lie `apart`, 0 beyond the ends: [B, T, kernel * F]."""
    steps, reach = x.shape[1], kernel // 2 * apart
    padded = F.pad(x, (0, 0, reach, reach))
    return torch.cat([padded[:, start : start + steps] for start in range(0, kernel * apart, apart)], -1)


class SeriesFrontEnd(FrontEnd):
    """Recordings [B, T, C] with NaN for missing values and for padding at the end -> features [B, F].

    Each sensor has a SensorEncoder, whose vectors are pooled over the steps at which the sensor has a value: their mean
    and their largest. In place of a sensor without any value stands a learned vector. Where `recurrent`, a GRU runs
    over the sensors' vectors of all steps, side by side, and its state after the last step with any value is added.

    Args:
        sensors: of each sensor, the numbers of its channels; each of the C channels in one of them.
        width: of the vectors of a sensor.
        kernel: steps that a fused layer sees at once; an odd number.
        depth: fused layers of a sensor.
        recurrent: units of the GRU, which knows the order of what is further apart than kernel ** depth steps; 0: none.
        activation: of the fused layers.
        sensor_dropout: while training, the probability of hiding a sensor of a row, so that the model learns to do
            without; never all sensors of a row.
        bins: parts of equal duration that `summary` cuts a recording into.

    Attributes:
        out_features: sensors * 2 * width + recurrent.
        summary_features: bins * 2 * C.

    Raises:
        ValueError: the sensors do not hold each channel once, or an option is out of its range.
    """

    kind = "series"

    def __init__(
        self,
        sensors: Sequence[Sequence[int]],
        width: int = 32,
        kernel: int = 5,
        depth: int = 2,
        recurrent: int = 0,
        activation: str = "relu",
        sensor_dropout: float = 0.0,
        bins: int = 4,
    ) -> None:
        super().__init__()
        self.sensors = [list(channels) for channels in sensors]
        numbers = sorted(channel for channels in self.sensors for channel in channels)
        self.channels = len(numbers)
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(f"sensors is {self.sensors}; give each channel, counted from 0, to one sensor")
        if min(width, kernel, depth, bins) < 1 or kernel % 2 == 0 or recurrent < 0:
            raise ValueError(
                f"width, kernel, depth, recurrent and bins are {width}, {kernel}, {depth}, {recurrent} and {bins}; "
                "give whole numbers of at least 1, an odd kernel, and recurrent of at least 0"
            )
        if not 0.0 <= sensor_dropout < 1.0:
            raise ValueError(f"sensor_dropout is {sensor_dropout}; it must be at least 0 and less than 1")
        self.width, self.kernel, self.depth, self.recurrent = width, kernel, depth, recurrent
        self.activation, self.sensor_dropout, self.bins = activation, sensor_dropout, bins
        self.encoders = nn.ModuleList(
            SensorEncoder(len(channels), width, kernel, depth, activation) for channels in self.sensors
        )
        self.missing = nn.Parameter(torch.zeros(len(self.sensors), 2 * width))
        self.gru = nn.GRU(len(self.sensors) * width, recurrent, batch_first=True) if recurrent else None
        self.out_features = len(self.sensors) * 2 * width + recurrent
        self.summary_features = bins * 2 * self.channels

    def get_config(self) -> dict[str, Any]:
        names = ("sensors", "width", "kernel", "depth", "recurrent", "activation", "sensor_dropout", "bins")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """Raises DataError where x is not [B, T, C] with at least one step."""
        self._check(x)
        hidden = self._hidden(x)
        pooled, steps, known = [], [], []
        for number, (channels, encoder) in enumerate(zip(self.sensors, self.encoders, strict=True)):
            mine = x[..., channels]
            if hidden is not None:
                mine = mine.masked_fill(hidden[:, number, None, None], torch.nan)
            vectors, present = encoder(mine)
            missing = self.missing[number].to(vectors.dtype)
            pooled.append(_pool(vectors, present, missing))
            steps.append(torch.where(present, vectors, missing[: self.width]))
            known.append(present)
        if self.gru is not None:
            any_known = torch.cat(known, -1).any(-1)
            last = torch.where(any_known, torch.arange(x.shape[1], device=x.device), 0).amax(1)
            states = self.gru(torch.cat(steps, -1))[0]
            pooled.append(states.gather(1, last[:, None, None].expand(-1, 1, self.recurrent))[:, 0])
        return torch.cat(pooled, -1)

    @torch.no_grad()
    def summary(self, x: Tensor) -> Tensor:
        """Mean and deviation of each channel in each bin, 0 where there is no value: [B, bins, 2, C], flattened.

        The bins share what lies before the last step with any value, so that padding changes nothing.
        """
        self._check(x)
        seen = ~x.isnan()
        values, seen = x.masked_fill(~seen, 0.0), seen.to(x.dtype)
        place = torch.arange(x.shape[1], device=x.device)
        length = torch.where(seen.any(-1), place + 1, 1).amax(1, keepdim=True)
        bin_of = (place * self.bins // length).clamp(max=self.bins - 1)
        member = F.one_hot(bin_of, self.bins).to(x.dtype)  # [B, T, bins]
        count = (member.mT @ seen).clamp(min=1.0)
        mean = member.mT @ values / count
        apart = (values - member @ mean) * seen
        deviation = (member.mT @ apart.square() / count).sqrt()
        return torch.stack([mean, deviation], 2).flatten(1)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.channels:
            raise DataError(
                f"the batch is {list(x.shape)} and this model takes [rows, steps, {self.channels}] with at least one "
                "step; give it what its reader's batch gives"
            )

    def _hidden(self, x: Tensor) -> Tensor | None:
        """Which sensors of which rows to hide now: bool [B, sensors]; None of none."""
        if not self.training or self.sensor_dropout == 0.0:
            return None
        hidden = torch.rand(len(x), len(self.sensors), device=x.device) < self.sensor_dropout
        return hidden & ~hidden.all(1, keepdim=True)


def _pool(vectors: Tensor, present: Tensor, missing: Tensor) -> Tensor:
    """Mean and largest of vectors [B, T, width] where present [B, T, 1]: [B, 2 * width]; `missing` if nowhere."""
    count = present.sum(1)
    mean = vectors.sum(1) / count.clamp(min=1)  # they are 0 elsewhere
    largest = vectors.masked_fill(~present, -torch.inf).amax(1)
    return torch.where(count > 0, torch.cat([mean, largest], -1), missing)
