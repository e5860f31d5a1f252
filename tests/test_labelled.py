"""`fastenc finetune` end to end: what the Python interface does, and one sentence for what it cannot."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import fail, run, succeed

import fastenc
from fastenc.data import Preprocessor, load
from fastenc.loading import load_pretrained
from fastenc.pretrained import load_preprocessing
from fastenc.record import split_rows

SMALL = ["--widths", "16,8", "--epochs", "5"]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A CSV file of 80 rows with numbers, text, a label, and a number that follows from another."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 80)
    age = generator.normal(40, 10, 80) + 30 * label
    frame = pd.DataFrame(
        {
            "age": age,
            "colour": generator.choice(["red", "green"], 80),
            "label": np.where(label, "yes", "no"),
            "income": 1000 + 20 * age,
        }
    )
    frame.loc[[3, 17], "age"] = np.nan
    path = tmp_path_factory.mktemp("people") / "people.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "model"
    succeed("train", "digits", "--out", folder, *SMALL)
    return folder


def test_it_does_what_the_function_does(tmp_path):
    folder = tmp_path / "model"
    output = succeed(
        *("finetune", "digits", "--out", folder, *SMALL, "--strategy", "pretrain", "--pretraining", "denoising"),
        *("--pretraining-epochs", 3, "--lr", 0.005, "--l1", 1e-4, "--noise", 0.1, "--seed", 4),
    )
    assert "1617 rows to train on, 180 to validate on, 64 features" in output
    assert "pre-training: 3 epochs, loss" in output
    assert "153 of 153 steps were taken whole, by the C++ engine" in output
    digits = load("digits")
    kept, held_out = (np.sort(part) for part in split_rows(1797, 0.1, 4))
    preprocessor = Preprocessor().fit(digits.features[kept])
    x = preprocessor.transform(digits.features).x
    result = fastenc.finetune(
        x[kept],
        digits.target[kept],
        strategy="pretrain",
        pretraining="denoising",
        pretraining_options={"epochs": 3},
        widths=(16, 8),
        epochs=5,
        lr=0.005,
        l1=1e-4,
        augment=fastenc.data.augmentation.GaussianNoise(0.1),
        seed=4,
        validation_data=(x[held_out], digits.target[held_out]),
        verbose=False,
    )
    saved = load_pretrained(folder)
    assert load_preprocessing(folder) == preprocessor.to_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    record = json.loads((folder / "training.json").read_text())
    assert record["history"] == result.history.history
    assert record["classes"] == [str(digit) for digit in range(10)]


SAME = {
    "adapters": (
        ["--lora-rank", 2, "--lora-alpha", 4, "--lora-dropout", 0.1, "--schedule", "cosine"],
        {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.1, "schedule": "cosine"},
    ),
    "clipped": (
        ["--optimizer", "sgd", "--momentum", 0.9, "--nesterov", "--clip-norm", 0.5, "--weight-decay", 0.01],
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "clip_norm": 0.5, "weight_decay": 0.01},
    ),
    "accumulated": (
        ["--accumulate", 2, "--precision", "bf16", "--raw-targets"],
        {"accumulate": 2, "precision": "bf16", "scale_targets": False},
    ),
    "by contrast": (
        [
            *("--strategy", "pretrain", "--pretraining", "contrastive", "--pretraining-epochs", 1),
            *("--temperature", 0.5, "--pretraining-noise", 0.3, "--pretraining-mask", 0.1, "--clip-value", 0.01),
        ],
        {
            "strategy": "pretrain",
            "pretraining": "contrastive",
            "pretraining_options": {"epochs": 1, "temperature": 0.5, "noise": 0.3, "mask": 0.1},
            "clip_value": 0.01,
        },
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_every_option_is_that_of_the_function(people, tmp_path, name):
    arguments, options = SAME[name]
    succeed(
        "finetune", people, "--target", "label", "--out", tmp_path / "m", *SMALL, "--validation-split", 0, *arguments
    )
    frame = pd.read_csv(people)
    x = Preprocessor().fit(frame.drop(columns="label")).transform(frame.drop(columns="label")).x
    result = fastenc.finetune(x, frame["label"], widths=(16, 8), epochs=5, seed=0, verbose=False, **options)
    saved = load_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in result.model.state_dict().items())


def test_several_targets_of_different_kinds(people, tmp_path):
    folder = tmp_path / "model"
    output = succeed(
        *("finetune", people, "--target", "label", "--target", "income", "--out", folder, *SMALL),
        *("--loss", "income=huber", "--weight", "income=0.5", "--validation-split", 0.2, "--seed", 2),
    )
    assert "64 rows to train on, 16 to validate on, 3 features" in output
    model = load_pretrained(folder)
    assert model.tasks == {"label": fastenc.Task(2, "cross_entropy"), "income": fastenc.Task(1, "huber", 0.5)}
    record = json.loads((folder / "training.json").read_text())
    assert record["classes"] == {"label": ["no", "yes"], "income": None}
    assert record["target"] == ["label", "income"]
    assert "80 vectors of 8 numbers" in succeed("encode", folder, people, "-o", tmp_path / "v.npy")
    output = succeed("evaluate", folder, people)
    assert "the labels are those in label; --target takes others, such as income" in output
    assert "Scored on the 16 rows that were held out" in output
    frame = pd.read_csv(people)
    kept, held_out = (np.sort(part) for part in split_rows(80, 0.2, 2))
    features = frame[["age", "colour"]]
    x = Preprocessor().fit(features.iloc[kept]).transform(features).x
    parts = [{name: frame[name].to_numpy()[rows] for name in ("label", "income")} for rows in (kept, held_out)]
    result = fastenc.finetune(
        x[kept],
        parts[0],
        validation_data=(x[held_out], parts[1]),
        loss={"income": "huber"},
        weights={"income": 0.5},
        widths=(16, 8),
        epochs=5,
        seed=2,
        verbose=False,
    )
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in result.model.state_dict().items())
    assert succeed("train", people, "--target", "label", "--target", "income", "--out", tmp_path / "ae", *SMALL)
    assert load_pretrained(tmp_path / "ae").encoder.in_features == 3


def test_several_files_of_labels(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)))
    np.save(tmp_path / "kind.npy", np.array(["a", "b"] * 20))
    np.save(tmp_path / "size.npy", np.arange(40.0))
    options = ["finetune", tmp_path / "x.npy", "--out", tmp_path / "m", *SMALL, "--target", tmp_path / "kind.npy"]
    succeed(*options, "--target", tmp_path / "size.npy")
    assert list(load_pretrained(tmp_path / "m").tasks) == ["kind", "size"]
    assert "two of the files of labels have the same name" in fail(*options, "--target", tmp_path / "kind.npy")


def test_options_that_do_not_go_together_are_one_sentence(people, tmp_path):
    base = ["finetune", people, "--out", tmp_path / "m", *SMALL, "--target", "label"]
    pretrain = [*base, "--strategy", "pretrain", "--pretraining", "masking"]
    two = [*base, "--target", "income"]
    sentences = [
        ([*base, "--momentum", 0.9], "momentum is 0.9 and adam takes none; use optimizer='sgd'"),
        ([*base, "--clip-norm", 1, "--clip-value", 1], "clip_norm and clip_value are both given"),
        ([*base, "--lora-alpha", 2], "--lora-alpha is of adapters; give --lora-rank"),
        ([*base, "--lora-dropout", 0.1], "--lora-dropout is of adapters"),
        ([*base, "--temperature", 0.1], "--temperature is of pre-training; give --strategy pretrain"),
        ([*base, "--pretraining-epochs", 1], "--pretraining-epochs is of pre-training"),
        ([*pretrain, "--temperature", 0.1], "--temperature is of --pretraining contrastive, and it is masking"),
        ([*pretrain, "--pretraining-noise", 0.1], "is of --pretraining denoising or contrastive, and it is masking"),
        ([*base, "--flip"], "--flip is of images; give their size, for example --image 28x28"),
        ([*base, "--task", "labels"], "--task is 'labels'; write NAME or, for one of several targets, COLUMN=NAME"),
        ([*base, "--task", "label=regression"], "there is one target, and task, loss or weights are given by name"),
        ([*two, "--loss", "mse"], "loss is 'mse' and there are several targets; give losses by name"),
        ([*two, "--loss", "label=mse"], "the target label holds classes and its loss is 'mse'"),
        ([*two, "--loss", "income=triplet"], "--loss is triplet, which several targets cannot have"),
        ([*two, "--task", "age=regression"], "task names age, which is no target; the targets are label, income"),
        ([*two, "--weight", "income=-1"], "--weight is 'income=-1'; write COLUMN=NUMBER, at least 0"),
        ([*two, "--weight", "income=1", "--weight", "income=2"], "--weight is given twice for income"),
        ([*two, "--mixup", 0.2], "Mixup cannot mix the labels of several targets"),
        ([*two, "--target", "label"], "the target 'label' is given twice"),
    ]
    for arguments, words in sentences:
        assert words in fail(*arguments), words
    for option, value in (
        ("--image", "8"),
        ("--image", "8x0"),
        ("--lora-alpha", 0),
        ("--crop", 2),
        ("--clip-norm", -1),
    ):
        assert run(*base, option, value).exit_code == 2
    assert not (tmp_path / "m").exists()


def test_images_are_moved(tmp_path, monkeypatch):
    """With a stand-in for torchvision, whose transform tells what it was made of."""
    v2 = ModuleType("torchvision.transforms.v2")
    v2.RandomAffine = lambda degrees, translate: translate[0]
    v2.RandomResizedCrop = lambda size, scale, antialias: scale[0]
    v2.RandomHorizontalFlip = lambda: 1.0
    v2.Compose = lambda steps: lambda image: image.flip(-1) * sum(steps)
    for name, module in (("torchvision", v2), ("torchvision.transforms", v2), (v2.__name__, v2)):
        monkeypatch.setitem(sys.modules, name, module)
    arguments = ["--image", "8x8", "--shift", 0.2, "--crop", 0.8, "--flip", "--validation-split", 0]
    succeed("finetune", "digits", "--out", tmp_path / "m", *SMALL, "--epochs", 1, *arguments)
    digits = load("digits")
    x = Preprocessor().fit(digits.features).transform(digits.features).x
    augment = fastenc.data.augmentation.image_augmentation((8, 8), shift=0.2, crop=0.8, flip=True)
    result = fastenc.finetune(x, digits.target, widths=(16, 8), epochs=1, seed=0, verbose=False, augment=[augment])
    saved = load_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in result.model.state_dict().items())
    assert "have 72 pixels" in fail("finetune", "digits", "--out", tmp_path / "n", *SMALL, "--image", "8x9")


def test_what_comes_out_encodes_and_is_evaluated(people, tmp_path):
    folder = tmp_path / "model"
    succeed("finetune", people, "--target", "label", "--out", folder, *SMALL, "--mixup", 0.2, "--validation-split", 0.2)
    assert json.loads((folder / "training.json").read_text())["classes"] == ["no", "yes"]
    assert "80 vectors of 8 numbers" in succeed("encode", folder, people, "-o", tmp_path / "v.npy")
    assert "Scored on the 16 rows that were held out" in succeed("evaluate", folder, people, "--target", "label")


def test_regression(people, tmp_path):
    output = succeed("finetune", people, "--target", "income", "--out", tmp_path / "model", *SMALL, "--missing", "drop")
    assert "70 rows to train on, 8 to validate on" in output
    model = load_pretrained(tmp_path / "model")
    assert isinstance(model, fastenc.Regressor)
    assert 500 < model.head.bias.item() < 3000  # incomes, in their own units


def test_transfer_keeps_the_preprocessing(digits_model, tmp_path):
    options = [*SMALL, "--strategy", "transfer", "--from", digits_model]
    for number, more in enumerate((["--unfreeze-every", 2, "--layer-decay", 0.5], ["--lora-rank", 2], ["--frozen", 2])):
        folder = tmp_path / str(number)
        succeed("finetune", "digits", "--out", folder, *options, *more)
        assert load_preprocessing(folder) == load_preprocessing(digits_model)
        changed = [
            not torch.equal(a.weight, b.weight)
            for a, b in zip(
                load_pretrained(folder).encoder.layers, load_pretrained(digits_model).encoder.layers, strict=True
            )
        ]
        assert changed == [number < 2] * 2


def test_rows_without_labels_from_another_file(people, tmp_path):
    few = tmp_path / "few.csv"
    pd.read_csv(people).drop(columns="income").head(20).to_csv(few, index=False)
    output = succeed(
        *("finetune", few, "--target", "label", "--unlabelled", people, "--strategy", "pretrain", "--out"),
        *(tmp_path / "model", *SMALL, "--pretraining-epochs", 4, "--validation-split", 0.2),
    )
    assert "12 of 12 steps were taken whole" in output  # 80 rows in batches of 32, four times
    lacking = tmp_path / "lacking.csv"
    pd.read_csv(people).drop(columns="age").to_csv(lacking, index=False)
    more = ("--strategy", "pretrain", "--unlabelled", lacking, "--target", "label", "--out", tmp_path / "other")
    assert "there is no column 'age', which the rows with labels have" in fail("finetune", few, *more)


def test_arrays_and_their_labels(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.array(["a", "b"] * 20)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "short.npy", y[1:])
    options = ["finetune", tmp_path / "x.npy", "--out", tmp_path / "model", *SMALL, "--target"]
    assert "36 rows to train on" in succeed(*options, tmp_path / "y.npy")
    assert "has shape [39]" in fail(*options, tmp_path / "short.npy")
    assert "cannot be read as labels" in fail(*options, tmp_path / "none.npy")


def test_bad_input_is_one_sentence(people, digits_model, tmp_path):
    out = tmp_path / "model"
    base = ["finetune", people, "--out", out, *SMALL]
    labelled = [*base, "--target", "label"]
    rare = tmp_path / "rare.csv"
    frame = pd.read_csv(people)
    frame.loc[split_rows(80, 0.1, 0)[1][0], "label"] = "maybe"
    frame.to_csv(rare, index=False)
    alike = tmp_path / "alike.csv"
    pd.read_csv(people).assign(label="yes").to_csv(alike, index=False)
    some = tmp_path / "some.csv"
    frame.assign(label=frame["label"].where(frame.index > 2)).to_csv(some, index=False)
    sentences = [
        (base, "has no labels to learn; name their column by --target"),
        ([*base, "--target", "nothing"], "has no column 'nothing' to be the target"),
        ([*labelled, "--strategy", "transfer"], "strategy='transfer' needs a trained encoder"),
        ([*labelled, "--strategy", "transfer", "--from", digits_model], "training had 64"),
        ([*labelled, "--strategy", "transfer", "--from", tmp_path], "there is no model.safetensors in"),
        ([*labelled, "--unlabelled", people], "unlabelled rows are for strategy='pretrain'"),
        ([*labelled, "--frozen", 7], "frozen is 7 and the encoder has 2 layers"),
        ([*labelled, "--lora-rank", 2, "--frozen", 1], "lora_rank freezes the encoder itself"),
        ([*labelled, "--validation-split", 0, "--patience", 3], "patience needs validation rows"),
        ([*labelled, "--validation-split", 0.001], "leaves 80 to train on and 0 to validate on"),
        ([*labelled, "--validation-split", 0.999], "leaves 0 to train on and 80 to validate on"),
        ([*labelled, "--validation-split", 0.0125], "the 1 rows to validate on are all of the class"),
        ([*labelled, "--task", "regression"], "holds text such as"),
        ([*labelled, "--lr", 1e30, "--optimizer", "sgd"], "became"),
        (["finetune", rare, "--target", "label", "--out", out], "holds labels that no training row has: maybe"),
        (["finetune", alike, "--target", "label", "--out", out], "are all of the class yes"),
        (["finetune", some, "--target", "label", "--out", out], "has no value in 3 of 80 rows"),
        (["finetune", tmp_path / "no.csv", "--out", out], "no such file"),
        (["finetune", "digits", "--out", people], "is a file; give a folder to --out"),
    ]
    for arguments, words in sentences:
        assert words in fail(*arguments), words
    assert not out.exists()
    for option, value in (("--strategy", "scrap"), ("--layer-decay", 2), ("--pretraining", "gan"), ("--mask", 1)):
        assert run(*labelled, option, value).exit_code == 2
