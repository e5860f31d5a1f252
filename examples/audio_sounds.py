"""Sounds: what they are, by the audio front end, and what they were without noise, by an autoencoder of spectra.

    python examples/audio_sounds.py          # two minutes of one core; pictures and sounds go to out/audio_sounds

Eight kinds of sound are made, each 0.4 to 0.9 s at 8 kHz: a note, a major, a minor and a diminished chord (equal
temperament on one of the 12 roots from 220 Hz, detuned by about 10 cents; six harmonics whose amplitudes fall as a
random power; they die away), a sine that rises or falls by one to two octaves, white noise and pink noise. All have
white noise 10 to 20 dB below them and a random loudness. With espeak-ng on PATH, spoken digits are told apart as well,
of voices that were not trained on, under white or pink noise up to 10 dB louder than they are.

For noise removal the notes, chords and sweeps have white or pink noise from 5 dB above them to 5 dB below. The
autoencoder takes three frames of the noisy spectrum and gives the part of each bin that is sound. What it is compared
with knows more than it: the mean spectrum of the very noise in each clip.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from comparing import Row, arguments, show, write_results

from fastenc import AutoEncoder, Classifier, Encoder, Trainer, plots
from fastenc.frontends import FrontEncoder, Items, collect, make_loader
from fastenc.frontends.audio import PARTS, AudioFrontEnd, AudioReader
from fastenc.record import split_rows
from fastenc.report import linear_probe

RATE = 8000  # hertz
CHORDS = {"note": (0,), "major": (0, 4, 7), "minor": (0, 3, 7), "diminished": (0, 3, 6)}  # semitones above the root
SWEEPS, NOISES = ("rising", "falling"), ("white", "pink")
EACH, TEST_SHARE = 90, 1 / 3
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = [f"{accent}+{sex}{number}" for accent in ("en-gb", "en-us") for sex in "mf" for number in range(1, 5)]
SPEEDS = (130, 160, 190)  # words in a minute
TRAINED, SCORED = 500, 60  # clips for noise removal
N_FFT, HOP, AROUND = 512, 128, 1  # of its spectra, in samples; frames on either side
OURS, MEANS, QUARTERS = "front end and encoder", "logistic regression, mean spectrum", "logistic regression, 4 spectra"
DENOISED, WIENER, SUBTRACTED = "autoencoder", "Wiener, noise spectrum known", "subtraction, noise spectrum known"


def noise(kind: str, samples: int, random: np.random.Generator) -> np.ndarray:
    """White noise, or pink: a power that falls as 1 / frequency."""
    white = random.standard_normal(samples)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), samples)


def make_sound(kind: str, random: np.random.Generator) -> np.ndarray:
    """One sound of the recipe above: float64 [samples], of mean square 1."""
    samples = int(random.integers(int(0.4 * RATE), int(0.9 * RATE)))
    time = np.arange(samples) / RATE
    if kind in CHORDS:
        root = 220 * 2 ** ((random.integers(12) + 0.1 * random.standard_normal()) / 12)
        fall = random.uniform(0.8, 2.0)
        sound = np.zeros(samples)
        for semitones in CHORDS[kind]:
            for harmonic in range(1, 7):
                phase = 2 * np.pi * (root * 2 ** (semitones / 12) * harmonic * time + random.random())
                sound += harmonic**-fall * np.sin(phase)
        sound *= np.exp(-random.uniform(1, 4) * time)
    elif kind in SWEEPS:
        low = random.uniform(200, 800)
        hertz = np.geomspace(low, low * 2 ** random.uniform(1, 2), samples)
        sound = np.sin(2 * np.pi * np.cumsum(hertz if kind == "rising" else hertz[::-1]) / RATE)
    else:
        sound = noise(kind, samples, random)
    sound *= np.clip(np.minimum(time, time[::-1]) / 0.01, 0, 1)  # no clicks at its ends
    return sound / np.sqrt(np.square(sound).mean())


def noise_for(sound: np.ndarray, kind: str, decibels: float, random: np.random.Generator) -> np.ndarray:
    """Noise that many decibels below the sound."""
    added = noise(kind, len(sound), random)
    return added * np.sqrt(np.square(sound).mean() / np.square(added).mean()) * 10 ** (-decibels / 20)


def write_sounds(folder: Path, each: int, random: np.random.Generator) -> None:
    """So many files of each kind, in folders of that name."""
    for kind in (*CHORDS, *SWEEPS, *NOISES):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            sound = make_sound(kind, random)
            sound += noise_for(sound, "white", random.uniform(10, 20), random)
            sound *= random.uniform(0.05, 0.9) / np.abs(sound).max()
            soundfile.write(folder / kind / f"{number}.wav", sound, RATE)


def write_digits(folder: Path, speeds: Sequence[int], espeak: str, random: np.random.Generator) -> None:
    """Each digit by each voice at each of the speeds, in noise, in a folder of its name."""
    for digit in DIGITS:
        (folder / digit).mkdir(parents=True, exist_ok=True)
        for voice in VOICES:
            for speed in speeds:
                path = folder / digit / f"{voice} {speed}.wav"
                subprocess.run([espeak, "-v", voice, "-s", str(speed), "-w", str(path), digit], check=True)
                sound, rate = soundfile.read(path)
                sound += noise_for(sound, random.choice(NOISES), random.uniform(-10, 0), random)
                soundfile.write(path, 0.9 * sound / np.abs(sound).max(), rate)


def voice_of(name: str) -> str:
    """Of a file of `write_digits`, without its accent and speed."""
    return Path(name).stem.split("+")[1].split()[0]


def classify(folder: Path, groups: Any, sizes: dict[str, int], epochs: int, seeds: int) -> dict[str, list[float]]:
    """Accuracy on a third of the groups of files, which are not trained on, of each method for each seed.

    groups: from a file's name to its group.
    """
    found = collect(str(folder), "audio")
    items = Items(AudioReader(RATE).fit(found.items), found.items)
    classes, target = np.unique(found.labels.astype(str), return_inverse=True)
    group = np.unique([groups(name) for name in found.names], return_inverse=True)[1]
    front = AudioFrontEnd(RATE, **sizes)
    quarters = np.concatenate([front.summary(items.reader.batch([array])).numpy() for _, array in items])
    inputs = {MEANS: quarters.reshape(len(items), PARTS, -1).mean(1), QUARTERS: quarters}
    accuracy: dict[str, list[float]] = {name: [] for name in (OURS, *inputs)}
    for seed in range(seeds):
        train, test = (np.flatnonzero(np.isin(group, part)) for part in split_rows(group.max() + 1, TEST_SHARE, seed))
        torch.manual_seed(seed)
        front = AudioFrontEnd(RATE, **sizes)
        model = Classifier(FrontEncoder(front, Encoder(front.out_features, (64, 32), dropout=0.2)), len(classes))
        trainer = Trainer(model, lr=4e-3, loss="cross_entropy", schedule="one_cycle", seed=seed)
        labels = torch.from_numpy(target)
        trainer.fit(make_loader(items, train, labels, seed=seed), epochs=epochs, verbose=False)
        accuracy[OURS].append(trainer.evaluate(make_loader(items, test, labels))["accuracy"])
        for name, x in inputs.items():
            accuracy[name].append(linear_probe(len(train)).fit(x[train], target[train]).score(x[test], target[test]))
    print(f"{len(train)} files of {len(classes)} kinds to train on, scored on {len(test)}; {seeds} seeds\n")
    return accuracy


def spectrum(sound: np.ndarray) -> np.ndarray:
    """complex64 [frames, N_FFT / 2 + 1]."""
    window = torch.hann_window(N_FFT)
    return torch.stft(torch.from_numpy(sound).float(), N_FFT, HOP, window=window, return_complex=True).T.numpy()


def sound_of(frames: np.ndarray, samples: int) -> np.ndarray:
    """The inverse of `spectrum`."""
    window = torch.hann_window(N_FFT)
    return torch.istft(torch.from_numpy(frames).T, N_FFT, HOP, window=window, length=samples).numpy()


def with_neighbours(frames: np.ndarray) -> np.ndarray:
    """[frames, bins] -> [frames, 3 * bins]: each with the one before it and the one behind it."""
    padded = np.pad(frames, ((AROUND, AROUND), (0, 0)), mode="edge")
    return np.concatenate([padded[place : len(frames) + place] for place in range(2 * AROUND + 1)], axis=1)


def of_neighbours(frames: np.ndarray) -> np.ndarray:
    """The means of what three rows of `with_neighbours` say of one frame: [frames, 3 * bins] -> [frames, bins]."""
    count, places = len(frames), range(2 * AROUND + 1)
    total, heard = np.zeros((count + 2 * AROUND, frames.shape[1] // len(places))), np.zeros((count + 2 * AROUND, 1))
    for place, part in zip(places, np.split(frames, len(places), axis=1), strict=True):
        total[place : count + place] += part
        heard[place : count + place] += 1
    return (total / heard)[AROUND : count + AROUND].astype(np.float32)


def loudness(noisy: np.ndarray) -> np.ndarray:
    """What the autoencoder sees: the logarithm of each bin's power beside the clip's mean, from -2 to about 2."""
    power = np.square(np.abs(noisy))
    return np.log10(power / power.mean() + 1e-4).astype(np.float32) / 2


def part_that_is_sound(clean: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """The best factor for each bin in 0 to 1, its phase being the noisy one's (Erdogan et al., ICASSP 2015)."""
    return np.clip((clean * noisy.conj()).real / np.maximum(np.square(np.abs(noisy)), 1e-12), 0, 1).astype(np.float32)


def wiener_gain(noisy: np.ndarray, noise_power: np.ndarray) -> np.ndarray:
    """Wiener's factors, of signal-to-noise ratios that follow decisions (Ephraim and Malah, 1984; alpha 0.98)."""
    gains, before = [], None
    for power in np.square(np.abs(noisy)):
        now = np.maximum(power / noise_power - 1, 0)
        ratio = now if before is None else 0.98 * before / noise_power + 0.02 * now
        gains.append(ratio / (1 + ratio))
        before = gains[-1] ** 2 * power
    return np.array(gains, np.float32)


def subtraction_gain(noisy: np.ndarray, noise_power: np.ndarray) -> np.ndarray:
    """Power spectral subtraction (Boll, 1979; in the form of Berouti et al., 1979)."""
    return np.sqrt(np.maximum(1 - noise_power / np.maximum(np.square(np.abs(noisy)), 1e-12), 0))


def ratio(clean: np.ndarray, heard: np.ndarray) -> float:
    """Signal to noise, in decibels."""
    return float(10 * np.log10(np.square(clean).sum() / np.square(heard - clean).sum()))


def make_clip(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(sound, noise) of noise removal."""
    sound = make_sound(random.choice([*CHORDS, *SWEEPS]), random)
    return sound, noise_for(sound, random.choice(NOISES), random.uniform(-5, 5), random)


def denoise(trained: int, scored: int, epochs: int, seed: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """The decibels that each method gains on each scored clip, and what is heard of the first of them."""
    random = np.random.default_rng(seed)
    clips = [make_clip(random) for _ in range(trained + scored)]
    pairs = [(spectrum(sound), spectrum(sound + added)) for sound, added in clips[:trained]]
    x = np.concatenate([with_neighbours(loudness(noisy)) for _, noisy in pairs])
    y = np.concatenate([with_neighbours(part_that_is_sound(*pair)) for pair in pairs])
    torch.manual_seed(seed)
    model = AutoEncoder(Encoder(x.shape[1], (256,)), final_activation="sigmoid")
    trainer = Trainer(model, lr=3e-3, loss="bce", schedule="one_cycle", seed=seed)
    trainer.fit(x, y, epochs=epochs, batch_size=64, verbose=False)
    gained: dict[str, list[float]] = {DENOISED: [], WIENER: [], SUBTRACTED: []}
    first: dict[str, np.ndarray] = {}
    for sound, added in clips[trained:]:
        noisy, noise_power = spectrum(sound + added), np.square(np.abs(spectrum(added))).mean(0)
        factors = {
            DENOISED: of_neighbours(trainer.predict(with_neighbours(loudness(noisy)))),
            WIENER: wiener_gain(noisy, noise_power),
            SUBTRACTED: subtraction_gain(noisy, noise_power),
        }
        heard = {name: sound_of(factor * noisy, len(sound)) for name, factor in factors.items()}
        for name, result in heard.items():
            gained[name].append(ratio(sound, result) - ratio(sound, sound + added))
        first = first or {"clean": sound, "noisy": sound + added, "denoised": heard[DENOISED], "Wiener": heard[WIENER]}
    return gained, first


def draw_spectrograms(figure: Any, sounds: dict[str, np.ndarray]) -> None:
    """One spectrogram beside the other, in decibels below the loudest bin of the first."""
    panels = figure.subplots(1, len(sounds), sharey=True)
    loudest = np.abs(spectrum(next(iter(sounds.values())))).max()
    for axes, (name, sound) in zip(panels, sounds.items(), strict=True):
        decibels = 20 * np.log10(np.abs(spectrum(sound)) / loudest + 1e-6)
        extent = (0, len(sound) / RATE, 0, RATE / 2000)
        image = axes.imshow(decibels.T, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=0, cmap="magma")
        axes.set(title=name, xlabel="seconds")
        axes.grid(False)
    panels[0].set_ylabel("kHz")
    figure.colorbar(image, ax=panels, label="dB")


def row(what: str, figures: dict[str, list[float]]) -> Row:
    """The first of the figures, which is ours, beside the best of the others."""
    ours, *others = ((float(np.mean(values)), name) for name, values in figures.items())
    theirs, beside = max(others)
    return Row(what, ours[0], beside, theirs)


def main() -> None:
    args = arguments(
        "What sounds are, and what they were without noise.",
        "audio_sounds",
        epochs=40,
        seeds=3,
        over="the files, 4 times those over the clips",
        share=(1.0, "of the files and clips to make"),
    )
    each, trained, scored, speeds = (max(1, round(args.share * n)) for n in (EACH, TRAINED, SCORED, len(SPEEDS)))
    rows = []
    write_sounds(args.out / "sounds", each, np.random.default_rng(0))
    # Chords differ by a semitone: frames of an eighth of a second tell 8 Hz apart.
    accuracy = classify(args.out / "sounds", str, {"n_mels": 96, "n_fft": 1024, "hop": 256}, args.epochs, args.seeds)
    show(accuracy, "accuracy", args.out / "accuracy.png")
    rows.append(row("kinds of sound: accuracy", accuracy))

    espeak = shutil.which("espeak-ng")
    if espeak is None:
        print("\nSpoken digits are left out: espeak-ng is not on PATH (apt-get install espeak-ng).")
    else:
        print("\nSpoken digits\n")
        write_digits(args.out / "digits", SPEEDS[:speeds], espeak, np.random.default_rng(0))
        accuracy = classify(args.out / "digits", voice_of, {}, args.epochs, args.seeds)
        show(accuracy, "accuracy", args.out / "digits.png")
        rows.append(row("spoken digits, other voices: accuracy", accuracy))

    found = [denoise(trained, scored, -(-args.epochs // 4), seed) for seed in range(args.seeds)]
    gained = {name: [float(np.mean(of_clips[name])) for of_clips, _ in found] for name in found[0][0]}
    print(f"\nNoise removed from {scored} clips, trained on {trained}; {args.seeds} seeds\n")
    show(gained, "dB gained", args.out / "noise.png", digits=2)
    rows.append(row("noise removal: dB gained", gained))
    sounds = found[0][1]
    highest = max(np.abs(sound).max() for sound in sounds.values())
    for name in ("clean", "noisy", "denoised"):
        soundfile.write(args.out / f"{name}.wav", sounds[name] / highest, RATE)
    path = args.out / "spectrograms.png"
    plots.save_figure(lambda figure: draw_spectrograms(figure, sounds), path, (14, 4.5))
    print(f"The spectrograms are {path}; the sounds are clean.wav, noisy.wav and denoised.wav beside it.")
    write_results(args.out, rows)


if __name__ == "__main__":
    main()
