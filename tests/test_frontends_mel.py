"""Log-mel spectra: the filter bank, and spectra beside a direct Fourier sum in float64 and numpy's FFT in float32."""

import math

import numpy as np
import pytest
import torch
from accuracy import Worst

from fastenc.frontends.mel import FLOOR, LogMel, hertz_to_mel, inside, mel_filters, mel_to_hertz, most_bands

SIZES = [(8000, 256, 40), (16000, 512, 40), (22050, 1024, 64), (44100, 2048, 40), (1000, 64, 20), (8000, 64, 8)]
EPS = torch.finfo(torch.float64).eps


def sounds(*lengths, seed=0):
    """Tones in noise, NaN behind the end of each: float32 [rows, longest]."""
    random = np.random.default_rng(seed)
    x = np.full((len(lengths), max(lengths)), np.nan, np.float32)
    for row, length in zip(x, lengths, strict=True):
        time = np.arange(length)
        row[:length] = np.sin(random.uniform(0.1, 1.0) * time + 1) + 0.1 * random.standard_normal(length)
    return torch.from_numpy(x)


def by_numpy(x, mel, dtype=np.float32):
    """A whole sound's spectra by numpy's FFT, with its own frames, in one dtype: [T, n_mels]."""
    x = x.astype(dtype)
    x = x / np.abs(x).max()
    frames = max(0, len(x) - mel.n_fft) // mel.hop + 1
    x = np.pad(x, (0, max(0, mel.n_fft - len(x))))
    time = np.arange(mel.n_fft)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * time / mel.n_fft)).astype(dtype)
    cut = np.stack([x[place * mel.hop :][: mel.n_fft] for place in range(frames)])
    spectra = np.fft.rfft(cut * window)
    assert spectra.real.dtype == dtype
    bands = (spectra.real**2 + spectra.imag**2) @ mel.filters.numpy().astype(dtype).T
    return (np.log10(bands / bands.mean() + dtype(FLOOR)) + 2) / 2


def test_the_scale():
    """1000 Hz are near 1000 mel, by which the formula's constant was chosen; and there and back is where one was."""
    assert abs(hertz_to_mel(1000.0) - 1000.0) < 0.1
    hertz = np.linspace(0.0, 24000.0, 1001)  # up to 4000 mel, where one mel is less than 25 Hz
    np.testing.assert_allclose(mel_to_hertz(hertz_to_mel(hertz)), hertz, rtol=0, atol=4 * 4000 * EPS * 25)


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), SIZES)
def test_the_filter_bank(rate, n_fft, n_mels):
    filters = mel_filters(rate, n_fft, n_mels)
    assert filters.shape == (n_mels, n_fft // 2 + 1)
    assert filters.min() == 0.0
    assert filters.max() <= 1.0
    assert (filters[:, [0, 1, -1]] == 0.0).all()
    assert filters.any(1).all()  # no band without bins
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    centres = (filters * bins).sum(1) / filters.sum(1)
    assert (np.diff(centres) > 0).all()
    peaks = mel_to_hertz(np.linspace(hertz_to_mel(rate / n_fft), hertz_to_mel(rate / 2), n_mels + 2))[1:-1]
    between = (bins > peaks[0]) & (bins < peaks[-1])
    np.testing.assert_allclose(filters[:, between].sum(0), 1.0, rtol=0, atol=1e4 * EPS)  # a bin's power is shared out


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), SIZES)
def test_each_filter_by_its_definition(rate, n_fft, n_mels):
    """One number after another; the buffer holds them rounded to float32, by at most half of 2**-23."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (rate / n_fft, rate / 2))
    edges = [700 * (10 ** ((low + (high - low) * i / (n_mels + 1)) / 2595) - 1) for i in range(n_mels + 2)]
    buffer = LogMel(rate, n_fft, n_fft // 2, n_mels).filters
    for band, (below, peak, above) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for place in range(n_fft // 2 + 1):
            hertz = place * rate / n_fft
            side = (hertz - below) / (peak - below) if hertz <= peak else (above - hertz) / (above - peak)
            assert abs(float(buffer[band, place]) - max(0.0, side)) <= 2**-24 + 1e4 * EPS


def test_spectra_by_a_direct_fourier_sum():
    """In float64. Each of n_fft terms is off by EPS at most, and the logarithm at FLOOR is as steep as 1 / FLOOR."""
    mel = LogMel(8000, 64, 32, 12).double()
    x = sounds(64 + 3 * 32).double()
    found, frames = mel(x)
    assert found.shape == (1, 4, 12)
    assert frames.tolist() == [4]
    signal = (x[0] / x[0].abs().max()).tolist()
    window = [math.sin(math.pi * n / 64) ** 2 for n in range(64)]
    power = torch.zeros(4, 33, dtype=torch.float64)
    for frame in range(4):
        terms = [w * s for w, s in zip(window, signal[32 * frame :], strict=False)]
        for k in range(33):
            real = math.fsum(term * math.cos(2 * math.pi * k * n / 64) for n, term in enumerate(terms))
            imaginary = math.fsum(term * math.sin(2 * math.pi * k * n / 64) for n, term in enumerate(terms))
            power[frame, k] = real**2 + imaginary**2
    bands = power @ mel.filters.T
    expected = (torch.log10(bands / bands.mean() + FLOOR) + 2) / 2
    assert (found[0] - expected).abs().max() <= 64 * EPS / FLOOR


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), SIZES)
def test_spectra_are_as_good_as_numpys(rate, n_fft, n_mels):
    """float32 against float64: at most twice the error of numpy's FFT in float32."""
    mel = LogMel(rate, n_fft, n_fft // 2, n_mels)
    worst = Worst()
    for seed in range(10):
        x = sounds(5 * n_fft + 7, seed=seed)
        by_fft, exact = (torch.from_numpy(by_numpy(x[0].numpy(), mel, dtype)) for dtype in (np.float32, np.float64))
        worst.add({"spectra": mel(x)[0][0]}, {"spectra": by_fft}, {"spectra": exact})
    worst.check()


def test_a_row_alone_and_in_a_batch():
    mel = LogMel(8000, 256, 128, 40)
    lengths = (1, 100, 255, 256, 383, 384, 1000, 5000)
    x = sounds(*lengths)
    found, frames = mel(x)
    assert frames.tolist() == [1, 1, 1, 1, 1, 2, 6, 38]
    assert found.shape == (8, 38, 40)
    assert (found[~inside(frames, 38).expand_as(found)] == 0.0).all()
    worst = Worst()
    for row, length, count in zip(range(8), lengths, frames.tolist(), strict=True):
        alone = mel(x[row : row + 1, :length])[0][0]
        exact = mel(x[row : row + 1, :length].double())[0][0]
        assert len(alone) == count
        worst.add({"spectra": found[row, :count]}, {"spectra": alone}, {"spectra": exact})
    worst.check()


def test_loudness_does_not_matter():
    mel = LogMel(8000, 256, 128, 40)
    x = sounds(2000, 900)
    for scale in (2.0**-100, 2.0**-10, 2.0**10, 2.0**100):  # powers of two round nothing
        torch.testing.assert_close(mel(scale * x)[0], mel(x)[0], rtol=0, atol=0)


def test_a_constant_offset_does_not_matter():
    """In float64, where 1.1 is rounded by EPS at most; see the direct sum."""
    mel = LogMel(8000, 256, 128, 40).double()
    x = sounds(2000).double()
    assert (mel(x + 1.1)[0] - mel(x)[0]).abs().max() <= 256 * EPS / FLOOR


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), SIZES)
def test_a_tone_is_loudest_in_its_band(rate, n_fft, n_mels):
    """A Hann window spreads a bin's tone over it and, with a quarter of the power, the bins beside it."""
    mel = LogMel(rate, n_fft, n_fft // 2, n_mels)
    bins = torch.arange(2, n_fft // 2)
    time = torch.arange(3 * n_fft, dtype=torch.float64)
    found = mel(torch.sin(2 * torch.pi * bins[:, None] * time / n_fft))[0].mean(1)
    filters = mel.filters.double()
    expected = filters[:, bins] + (filters[:, bins - 1] + filters[:, bins + 1]) / 4
    assert (found.argmax(1) == expected.argmax(0)).all()


def test_silence_and_missing_rows_are_finite():
    mel = LogMel(8000, 256, 128, 40)
    x = torch.zeros(3, 600)
    x[1] = torch.nan
    x[2, 300:310] = torch.nan  # within the row: as silence
    found, frames = mel(x)
    assert frames.tolist() == [3, 1, 3]
    assert found.isfinite().all()
    assert mel(torch.empty(2, 0))[0].shape == (2, 1, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_left_to_the_input(dtype):
    mel, x = LogMel(8000, 256, 128, 40), sounds(1000, 700).to(dtype)
    expected = mel(x.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = mel(x)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_slope_is_that_of_the_values():
    mel = LogMel(8000, 64, 32, 8).double()
    x = sounds(150).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mel(x)[0], x)


def test_sizes_that_make_no_spectra():
    with pytest.raises(ValueError, match=r"200 bands are more .* give an n_mels of at most \d+, or a larger n_fft"):
        LogMel(8000, 256, 128, 200)
    assert most_bands(8000, 256, 40) == 40
    for sizes in ((0, 256, 128, 40), (8000, 4, 128, 40), (8000, 255, 128, 40), (8000, 256, 0, 40), (8000, 256, 128, 0)):
        with pytest.raises(ValueError, match="make no spectra; give positive numbers, and an even n_fft"):
            LogMel(*sizes)
