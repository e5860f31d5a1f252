"""The command line on folders of images, sounds, texts, recordings and sequences: found, trained, encoded."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_cli import fail, succeed

from fastenc import load_pretrained
from fastenc.data import load
from fastenc.frontends import KINDS, FrontEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--epochs", "2", "--widths", "16,4", "--validation-split", "0.25")
CLASSES, EACH = ("high", "low"), 8


def write_images(folder, random):
    digits = load("digits").features
    for name, base in zip(CLASSES, (200, 0), strict=True):
        for number in range(EACH):
            height, width = random.integers(9, 20, 2)
            image = Image.fromarray(digits[number].reshape(8, 8).astype(np.uint8)).resize((width, height))
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image) + np.uint8(base)).save(path)


def write_sounds(folder, random):
    for name, pitch in zip(CLASSES, (1500.0, 200.0), strict=True):
        for number in range(EACH):
            seconds = np.arange(int(8000 * random.uniform(0.2, 0.5))) / 8000
            path = folder / name / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * seconds + number), 8000)


def write_texts(folder, random):
    words = {"high": ["mountain", "tower", "cloud", "peak"], "low": ["valley", "cellar", "mine", "sea"]}
    for name in CLASSES:
        for number in range(EACH):
            path = folder / name / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("the way to the " + " and the ".join(random.choice(words[name], 3)) + f" is {number} long")


def write_recordings(folder, random):
    for name, level in zip(CLASSES, (5.0, -5.0), strict=True):
        for number in range(EACH):
            path = folder / name / f"{number}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            steps = random.integers(5, 12)
            rows = [f"{level + random.normal():.4f},{random.normal():.4f}" for _ in range(steps)]
            path.write_text("imu.x,gps.y\n" + "\n".join(rows) + "\n")


def write_sequences(folder, random):
    for name, letters in zip(CLASSES, ("GC", "AT"), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(EACH):
            bases = "".join(random.choice(list(letters * 3 + "ACGT"), int(random.integers(20, 40))))
            lines.append(f">{name}{number} label={name}\n{bases}\n")
        with (folder / "all.fasta").open("a") as file:
            file.writelines(lines)


WRITERS = {
    "image": write_images,
    "audio": write_sounds,
    "text": write_texts,
    "series": write_recordings,
    "sequence": write_sequences,
}


@pytest.fixture(params=WRITERS)
def data(request, tmp_path):
    """(kind, the folder or file, options that say where the labels are)."""
    folder = tmp_path / request.param
    WRITERS[request.param](folder, np.random.default_rng(0))
    if request.param == "sequence":
        return request.param, folder / "all.fasta", ("--target", "label")
    return request.param, folder, ()


def test_every_kind_is_tested_here():
    assert set(WRITERS) == set(KINDS)


def test_train_encode_evaluate(data, tmp_path):
    kind, source, target = data
    out = succeed("train", source, "--out", tmp_path / "model", *target, *QUICK)
    assert f"12 items of the kind {kind} to train on, 4 to validate on" in out
    model = load_pretrained(tmp_path / "model")
    assert isinstance(model.encoder, FrontEncoder)
    assert model.encoder.frontend.kind == kind
    succeed("encode", tmp_path / "model", source, "-o", tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (16, 4)
    assert np.isfinite(vectors).all()
    assert len((tmp_path / "v.names.txt").read_text().splitlines()) == 16
    succeed("encode", tmp_path / "model", source, "-o", tmp_path / "again.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), vectors)
    out = succeed("evaluate", tmp_path / "model", source, *target, "--json", tmp_path / "r.json")
    assert "Scored on the 4 rows that were held out" in out
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["reconstruction"]["fastenc"] > 0


def test_the_same_seed_gives_the_same_bits(data, tmp_path):
    _, source, target = data
    vectors = []
    for name in ("a", "b"):
        succeed("train", source, "--out", tmp_path / name, *target, *QUICK)
        succeed("encode", tmp_path / name, source, "-o", tmp_path / f"{name}.npy")
        vectors.append(np.load(tmp_path / f"{name}.npy"))
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("strategy", ["scratch", "pretrain", "transfer"])
def test_finetune(data, tmp_path, strategy):
    _, source, target = data
    options = ["--strategy", strategy]
    if strategy == "transfer":
        succeed("train", source, "--out", tmp_path / "first", *target, *QUICK)
        options += ["--from", tmp_path / "first"]
    succeed("finetune", source, "--out", tmp_path / "model", *target, *QUICK, *options)
    assert json.loads((tmp_path / "model" / "training.json").read_text())["classes"] == list(CLASSES)
    model = load_pretrained(tmp_path / "model")
    assert model.head.out_features == 2
    if strategy == "transfer":
        first = load_pretrained(tmp_path / "first").encoder.frontend.state_dict()
        kept = model.encoder.frontend.state_dict()
        assert all((kept[name] == tensor).all() for name, tensor in first.items())


def test_bad_input(data, tmp_path):
    kind, source, target = data
    model = tmp_path / "model"
    assert "--missing is not for items" in fail("train", source, "--out", model, *target, "--missing", "drop")
    assert "--dtype" in fail("train", source, "--out", model, *target, "--dtype", "bfloat16")
    assert "--lora-rank is not for" in fail("finetune", source, "--out", model, *target, "--lora-rank", "4")
    assert "--noise is not for" in fail("finetune", source, "--out", model, *target, "--noise", "0.1")
    assert "go together" in fail("finetune", source, "--out", model, *target, "--strategy", "transfer")
    assert not model.exists()
    table = tmp_path / "table.csv"
    table.write_text("a,b\n" + "\n".join(f"{i},{i * 0.5}" for i in range(20)) + "\n")
    succeed("train", table, "--out", tmp_path / "of_table", "--epochs", "1")
    said = fail("finetune", source, "--out", model, *target, "--strategy", "transfer", "--from", tmp_path / "of_table")
    assert f"takes rows of numbers, and these are of the kind {kind}" in said


def test_folders_of_nothing_known(tmp_path):
    (tmp_path / "notes.xyz").write_text("?")
    assert "that no front end reads" in fail("train", tmp_path, "--out", tmp_path.parent / "model")


def test_folders_of_several_kinds(tmp_path):
    write_images(tmp_path, np.random.default_rng(0))
    write_sounds(tmp_path, np.random.default_rng(0))
    said = fail("train", tmp_path, "--out", tmp_path.parent / "model")
    assert "of several kinds, image and audio" in said
    succeed("train", tmp_path, "--kind", "audio", "--out", tmp_path.parent / "model", *QUICK)


def test_a_table_with_sentences_is_text(tmp_path):
    lines = [f'"the {word} is number {i} in the list of things",{word}' for i, word in enumerate(["cat", "dog"] * 10)]
    table = tmp_path / "texts.csv"
    table.write_text("what,label\n" + "\n".join(lines) + "\n")
    assert "items of the kind text" in succeed("train", table, "--target", "label", "--out", tmp_path / "m", *QUICK)
    out = succeed("train", table, "--target", "label", "--kind", "table", "--out", tmp_path / "n", *QUICK)
    assert "features" in out
    assert "kind" not in out
    succeed("encode", tmp_path / "m", table, "--column", "what", "-o", tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (20, 4)


def test_labels_are_needed_to_finetune(tmp_path):
    (tmp_path / "text.txt").write_text("a tower of some kind\na sea of some kind\n" * 8)
    said = fail("finetune", tmp_path / "text.txt", "--out", tmp_path / "model")
    assert "has no labels to learn" in said
