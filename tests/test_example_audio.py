"""examples/audio_sounds.py at a small size, its recipe and its filters; and docs/applications/audio.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from example_runs import compare, figure, imported

PAGE = (Path(__file__).parents[1] / "docs" / "applications" / "audio.md").read_text()
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILES = {
    "accuracy.png",
    "noise.png",
    "spectrograms.png",
    "clean.wav",
    "noisy.wav",
    "denoised.wav",
    "sounds",
    "results.json",
}


@pytest.fixture
def example():
    """The program as a module."""
    with imported("audio_sounds") as (audio_sounds,):
        yield audio_sounds


@pytest.fixture
def espeak(tmp_path):
    """A folder with an espeak-ng that has a tone for each digit, whatever the voice."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for number, digit in enumerate(DIGITS):
        time = np.arange(5000) / 22050
        soundfile.write(folder / f"{digit}.wav", 0.5 * np.sin(2 * np.pi * 300 * (1 + number / 4) * time), 22050)
    (folder / "espeak-ng").write_text(f'#!/bin/sh\nexec /bin/cp "{folder}/$7.wav" "$6"\n')
    (folder / "espeak-ng").chmod(0o755)
    return folder


def check_figures(output, out):
    sounds, noise = re.split(r"Noise removed.*\n", output)
    sounds = sounds.partition("Spoken digits")[0]
    for row in ("front end and encoder", "logistic regression, mean spectrum", "logistic regression, 4 spectra"):
        assert figure(sounds, row) > 0.2  # a guess is right once in eight
    for row in ("autoencoder", "Wiener, noise spectrum known", "subtraction, noise spectrum known"):
        assert figure(noise, row) > 0
    rows = {row["what"]: row for row in json.loads((out / "results.json").read_text())}
    assert abs(rows["kinds of sound: accuracy"]["ours"] - figure(sounds, "front end and encoder")) <= 0.0005
    assert abs(rows["noise removal: dB gained"]["ours"] - figure(noise, "autoencoder")) <= 0.005
    lengths = {len(soundfile.read(out / f"{name}.wav")[0]) for name in ("clean", "noisy", "denoised")}
    assert len(lengths) == 1
    return rows


def test_without_espeak(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    output, files = compare("audio_sounds.py", out, "--share", 0.2, "--epochs", 8)
    assert "96 files of 8 kinds to train on, scored on 48; 1 seeds" in output
    assert "Spoken digits are left out: espeak-ng is not on PATH (apt-get install espeak-ng)." in output
    assert set(files) == FILES
    assert len(check_figures(output, out)) == 2


def test_with_spoken_digits(tmp_path, monkeypatch, espeak):
    monkeypatch.setenv("PATH", str(espeak))
    out = tmp_path / "out"
    output, files = compare("audio_sounds.py", out, "--share", 0.2, "--epochs", 8)
    assert "files of 10 kinds to train on" in output
    assert set(files) == {*FILES, "digits", "digits.png"}
    rows = check_figures(output, out)
    assert rows["spoken digits, other voices: accuracy"]["theirs"] == 1.0  # of one tone for each


def test_the_recipe(example):
    random = np.random.default_rng(0)
    for kind in (*example.CHORDS, *example.SWEEPS, *example.NOISES):
        sound = example.make_sound(kind, random)
        assert 0.4 <= len(sound) / example.RATE < 0.9
        assert abs(np.square(sound).mean() - 1) <= len(sound) * np.finfo(float).eps
        for noise in example.NOISES:
            assert abs(example.ratio(sound, sound + example.noise_for(sound, noise, 7.0, random)) - 7) <= 1e-9
    # A root of one semitone in an octave, and the third and the fifth above it, at the same phase of their decay.
    sound = example.make_sound("major", random)
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 16))
    hertz = np.arange(len(spectrum)) * example.RATE / (1 << 16)
    below = (hertz > 200) & (hertz < 700)
    peaks = [f for f in np.sort(hertz[1:-1][_peaks(spectrum)]) if 200 < f < 700]
    strong = [f for f in peaks if spectrum[np.searchsorted(hertz, f)] > spectrum[below].max() / 3][:3]
    assert np.abs(12 * np.log2(np.array(strong) / strong[0]) - [0, 4, 7]).max() < 0.2


def _peaks(values):
    return (values[1:-1] > values[:-2]) & (values[1:-1] > values[2:])


def test_rising_and_falling(example):
    random = np.random.default_rng(0)
    for kind, sign in (("rising", 1), ("falling", -1)):
        frames = np.abs(example.spectrum(example.make_sound(kind, random)))[2:-2].argmax(1)
        assert sign * (frames[-1] - frames[0]) > 5


def test_what_surrounds_noise_removal_changes_nothing(example):
    random = np.random.default_rng(0)
    sound, noise = example.make_clip(random)
    clean, noisy = example.spectrum(sound), example.spectrum(sound + noise)
    np.testing.assert_allclose(example.sound_of(clean, len(sound)), sound, rtol=0, atol=512 * 2**-23)
    frames = random.random((5, 3)).astype(np.float32)
    np.testing.assert_allclose(example.of_neighbours(example.with_neighbours(frames)), frames, rtol=2**-22)
    assert example.with_neighbours(frames)[1].tolist() == frames[:3].flatten().tolist()
    assert example.part_that_is_sound(clean, clean)[np.abs(clean) > 1e-3].min() >= 1 - 2**-20
    best = example.sound_of(example.part_that_is_sound(clean, noisy) * noisy, len(sound))
    power = np.square(np.abs(noisy - clean)).mean(0)
    for gain in (example.wiener_gain, example.subtraction_gain):
        factors = gain(noisy, power)
        assert factors.min() >= 0
        assert factors.max() <= 1
        heard = example.ratio(sound, example.sound_of(factors * noisy, len(sound)))
        assert example.ratio(sound, sound + noise) < heard < example.ratio(sound, best)
        np.testing.assert_allclose(gain(noisy, 1e-9 * power)[np.abs(noisy) > 1e-2], 1, rtol=0, atol=1e-2)


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    assert "(40, 16)" in capsys.readouterr().out
