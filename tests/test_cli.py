"""The commands end to end, in this process through typer's runner; a few as true programs."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from typer.testing import CliRunner

import fastenc
from fastenc import cli, pipeline
from fastenc.backends import BACKENDS
from fastenc.data import Preprocessor, load
from fastenc.loading import load_pretrained
from fastenc.pretrained import load_preprocessing
from fastenc.record import split_rows

SMALL = ["--widths", "32,8", "--epochs", "3", "--batch-size", "64"]


def run(*args):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*args):
    """The one sentence of an error that the user caused."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("fastenc: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "model"
    return folder, succeed("train", "digits", "--out", folder, *SMALL)


@pytest.fixture
def table(tmp_path):
    """A CSV file of 60 rows with numbers, text, labels, and a missing number in each of rows 3, 17 and 40."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 60)
    frame = pd.DataFrame(
        {
            "age": generator.normal(40, 10, 60) + 30 * label,
            "colour": generator.choice(["red", "green"], 60),
            "label": np.where(label, "yes", "no"),
            "height": generator.normal(170, 10, 60),
        }
    )
    frame.loc[[3, 17, 40], "height"] = np.nan
    path = tmp_path / "people.csv"
    frame.to_csv(path, index=False)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_train_reports_and_saves(digits_model):
    folder, output = digits_model
    assert "1617 rows to train on, 180 to validate on, 64 features" in output
    assert "3 epochs in" in output
    assert "backend for 64 rows, 64-32-8-32-64" in output
    model = load_pretrained(folder)
    assert isinstance(model, fastenc.AutoEncoder)
    assert model.encoder.widths == (32, 8)
    history = json.loads((folder / "training.json").read_text())["history"]
    assert len(history["loss"]) == len(history["val_loss"]) == 3
    assert history["val_loss"][-1] < history["val_loss"][0]


def test_preprocessing_is_learned_from_the_training_rows_only(digits_model):
    folder, _ = digits_model
    features = load("digits").features
    kept, held_out = split_rows(1797, 0.1, 0)
    assert load_preprocessing(folder) == Preprocessor().fit(features[np.sort(kept)]).to_dict()
    assert len(held_out) == 180


@pytest.mark.parametrize("ending", ["npy", "csv", "parquet"])
def test_encode_writes_what_the_model_gives(digits_model, tmp_path, ending):
    folder, _ = digits_model
    path = tmp_path / f"vectors.{ending}"
    assert f"1797 vectors of 8 numbers written to {path}" in succeed("encode", folder, "digits", "-o", path)
    read = {"npy": np.load, "csv": pd.read_csv, "parquet": pd.read_parquet}[ending]
    vectors = np.asarray(read(path), np.float32)
    x = Preprocessor.from_dict(load_preprocessing(folder)).transform(load("digits").features).x
    with torch.inference_mode():
        expected = load_pretrained(folder).encode(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(vectors, expected)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_chunks_change_nothing(digits_model, tmp_path, monkeypatch):
    folder, _ = digits_model
    succeed("encode", folder, "digits", "-o", tmp_path / "whole.npy")
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 1000)
    succeed("encode", folder, "digits", "-o", tmp_path / "parts.npy")
    whole, parts = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "parts.npy")
    assert whole.shape == parts.shape == (1797, 8)
    # A matrix product may round differently for another number of rows, by some units in the last place of its sums.
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_evaluate_scores_the_held_out_rows(digits_model, tmp_path):
    folder, _ = digits_model
    output = succeed("evaluate", folder, "digits", "--json", tmp_path / "figures.json")
    assert "Scored on the 180 rows that were held out" in output
    figures = json.loads((tmp_path / "figures.json").read_text())
    kept, held_out = split_rows(1797, 0.1, 0)
    x = Preprocessor.from_dict(load_preprocessing(folder)).transform(load("digits").features).x
    pca = PCA(8, random_state=0).fit(x[np.sort(kept)])
    error = np.square(pca.inverse_transform(pca.transform(x[held_out])) - x[held_out]).mean()
    assert figures["reconstruction"]["PCA, 8 components"] == pytest.approx(error)
    with torch.inference_mode():
        reconstruction = load_pretrained(folder)(torch.from_numpy(x[held_out])).numpy()
    assert figures["reconstruction"]["fastenc"] == pytest.approx(np.square(reconstruction - x[held_out]).mean())
    for accuracy in figures["accuracy"].values():
        assert 0.5 < accuracy["code, 8 numbers"] <= 1  # a guess is right once in ten


def test_evaluate_writes_a_page_and_measures_what_is_asked_for(digits_model, tmp_path):
    folder, _ = digits_model
    files = ["--html", tmp_path / "page.html", "--json", tmp_path / "figures.json"]
    output = succeed("evaluate", folder, "digits", *files, "--metric", "f1_macro", "--quantile", "0.5")
    assert "Linear model, f1_macro" in output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 6
    assert "Scored on the 180 rows that were held out" in page
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0.3 < figures["anomaly"]["share"] < 0.7
    assert len(figures["features"]) == 64
    assert "metric is 'best'" in fail("evaluate", folder, "digits", "--metric", "best")
    assert "does not exist" in fail("evaluate", folder, "digits", "--html", tmp_path / "no" / "page.html")
    assert run("evaluate", folder, "digits", "--quantile", "1").exit_code == 2


def test_evaluate_on_other_data_splits_it(digits_model, tmp_path):
    folder, _ = digits_model
    np.save(tmp_path / "other.npy", load("digits").features[:500])
    output = succeed("evaluate", folder, tmp_path / "other.npy")
    assert "Scored on 150 rows" in output
    assert "what the model was trained on" not in output


def test_evaluate_says_when_no_rows_were_held_out(tmp_path, table):
    succeed("train", table, "--out", tmp_path / "model", "--target", "label", "--validation-split", "0", *SMALL)
    assert "which flatters it" in succeed("evaluate", tmp_path / "model", table)


def test_a_stale_record_is_not_believed(tmp_path, table):
    model = tmp_path / "model"
    succeed("train", table, "--out", model, *SMALL)
    old = (model / "training.json").read_bytes()
    succeed("train", table, "--out", model, *SMALL, "--seed", "1")
    (model / "training.json").write_bytes(old)
    assert "is not known" in succeed("evaluate", model, table)


def test_the_target_is_no_feature_and_is_remembered(tmp_path, table):
    model = tmp_path / "model"
    output = succeed("train", table, "--out", model, "--target", "label", *SMALL)
    assert "4 features" in output  # age, height, and one for each colour
    assert "label" not in " ".join(Preprocessor.from_dict(load_preprocessing(model)).feature_names)
    assert "Accuracy from" in succeed("evaluate", model, table)
    assert "60 vectors" in succeed("encode", model, table, "-o", tmp_path / "vectors.npy")


def test_dates_and_hashed_text(tmp_path):
    frame = pd.DataFrame({"when": pd.date_range("2024-01-30", periods=40, freq="h"), "note": ["a b", "b c"] * 20})
    frame["v"] = np.arange(40.0)
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert 'as dates="parts" does' in fail("train", tmp_path / "t.csv", "--out", tmp_path / "m", *SMALL)
    options = ["--dates", "parts", "--text", "hash"]
    assert "71 features" in succeed("train", tmp_path / "t.csv", "--out", tmp_path / "m", *options, *SMALL)
    succeed("encode", tmp_path / "m", tmp_path / "t.csv", "-o", tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (40, 8)
    frame.drop(columns="when").to_csv(tmp_path / "u.csv", index=False)
    assert "u.csv: the table has no column 'when'" in fail(
        "encode", tmp_path / "m", tmp_path / "u.csv", "-o", tmp_path / "v.npy"
    )


def test_dropped_rows_are_counted_and_numbered(tmp_path, table):
    model = tmp_path / "model"
    assert "3 of 60 rows" in succeed("train", table, "--out", model, "--missing", "drop", *SMALL)
    assert "3 of 60 rows" in succeed("encode", model, table, "-o", tmp_path / "vectors.npy")
    rows = np.load(tmp_path / "vectors.rows.npy")
    assert rows.tolist() == [row for row in range(60) if row not in (3, 17, 40)]
    assert len(np.load(tmp_path / "vectors.npy")) == 57


def test_the_same_seed_gives_the_same_model(tmp_path, table):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeed("train", table, "--out", tmp_path / name, *SMALL, "--seed", seed, "--dropout", "0.1")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    "options",
    [
        ["--activation", "tanh", "--optimizer", "sgd", "--loss", "mae", "--scale", "minmax", "--dtype", "float64"],
        ["--optimizer", "adamw", "--scale", "none", "--dtype", "bfloat16", "--patience", "2"],
    ],
)
def test_options(tmp_path, table, options):
    succeed("train", table, "--out", tmp_path / "model", "--target", "label", *SMALL, *options)
    succeed("evaluate", tmp_path / "model", table)
    succeed("encode", tmp_path / "model", table, "-o", tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--widths", "16,x"], "128,64,32,16"),
        (["--widths", "16,0"], "128,64,32,16"),
        (["--activation", "sinus"], "gelu_tanh"),
        (["--optimizer", "lion"], "adamw"),
        (["--loss", "cross_entropy"], "mse, mae"),
        (["--lr", "-1"], "greater than 0"),
        (["--lr", "nan"], "greater than 0"),
        (["--dropout", "1"], "less than 1"),
        (["--validation-split", "1"], "less than 1"),
        (["--dtype", "int8"], "bfloat16"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, options, words):
    result = run("train", "digits", "--out", tmp_path / "model", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "model").exists()


def test_wrong_data_is_one_sentence(tmp_path, table, digits_model):
    model, _ = digits_model
    out = ("--out", tmp_path / "model")
    assert "missing.csv" in fail("train", tmp_path / "missing.csv", *out)
    (tmp_path / "text.tsv").write_text("a,b\n1,2\n")
    assert ".parquet" in fail("train", tmp_path / "text.tsv", *out)
    assert "weight" in fail("train", table, *out, "--target", "weight")
    assert "people.csv" in (error := fail("train", table, *out, "--missing", "error"))
    assert "3 of" in error
    np.save(tmp_path / "narrow.npy", np.ones((5, 3)))
    assert "64" in (error := fail("encode", model, tmp_path / "narrow.npy", "-o", tmp_path / "v.npy"))
    assert "narrow.npy" in error
    assert "at least 4" in fail("evaluate", digits_model[0], few_rows(tmp_path))
    assert "--patience" in fail("train", table, *out, "--validation-split", "0", "--patience", "3")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "v.npy").exists()


def few_rows(folder):
    np.save(folder / "few.npy", np.zeros((2, 64)))
    return folder / "few.npy"


def test_wrong_files_to_write_are_refused_before_any_work(tmp_path, digits_model):
    folder, _ = digits_model
    assert ".parquet" in fail("encode", folder, "digits", "-o", tmp_path / "vectors.txt")
    assert "nowhere" in fail("encode", folder, "digits", "-o", tmp_path / "nowhere" / "vectors.npy")
    assert "nowhere" in fail("evaluate", folder, "digits", "--json", tmp_path / "nowhere" / "figures.json")


def test_wrong_models_are_one_sentence(tmp_path, digits_model):
    assert "nothing" in fail("encode", tmp_path / "nothing", "digits", "-o", tmp_path / "v.npy")
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (digits_model[0] / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    assert "broken" in fail("evaluate", broken, "digits")


def test_train_refuses_a_folder_of_something_else(tmp_path, table):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    assert "photos" in fail("train", table, "--out", folder, *SMALL)
    assert contents(folder) == {"cat.jpg": b"cat"}
    assert "people.csv is a file" in fail("train", table, "--out", table, *SMALL)
    (folder / "model.safetensors").write_bytes(b"another program's")
    fail("train", table, "--out", folder, *SMALL)
    assert len(contents(folder)) == 2


def test_a_failed_training_leaves_the_old_model(tmp_path, table):
    folder = tmp_path / "model"
    succeed("train", table, "--out", folder, *SMALL)
    before = contents(folder)
    error = fail("train", table, "--out", folder, *SMALL, "--optimizer", "sgd", "--lr", "1e30")
    assert "try a smaller lr" in error
    assert contents(folder) == before
    succeed("train", table, "--out", folder, *SMALL, "--seed", "5")
    assert contents(folder) != before


def test_ctrl_c_leaves_the_old_model(tmp_path, table):
    folder = tmp_path / "model"
    succeed("train", table, "--out", folder, *SMALL)
    before = contents(folder)
    command = [sys.executable, "-m", "fastenc", "train", str(table), "--out", str(folder), "--epochs", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and so would the child.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=listens) as child:
        assert "rows to train on" in child.stdout.readline()
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        try:
            _, errors = child.communicate(timeout=300)
        finally:
            child.kill()
    # If the interrupt comes while source is run by exec(), in a late import, Python ends itself by the signal, whatever
    # status it was given. Shells show 130 for both.
    assert child.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_vectors(tmp_path, digits_model):
    resource = pytest.importorskip("resource")
    target = tmp_path / "vectors.npy"
    target.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        error = fail("encode", digits_model[0], "digits", "-o", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "vectors.npy" in error
    assert contents(tmp_path) == {"vectors.npy": b"old"}


def test_a_missing_extra_is_one_sentence(tmp_path, table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    error = fail("train", table, "--out", tmp_path / "model")
    assert 'pip install "fastenc[app]"' in error


def test_without_typer_the_command_says_so():
    code = "import sys; sys.modules['typer'] = None; import fastenc.__main__"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert 'pip install "fastenc[app]"' in result.stderr


def test_errors_of_our_own_are_not_hidden(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.machine, "describe", broken)
    assert CliRunner().invoke(cli.app, ["info"]).exit_code == 1


def test_info_tells_every_backend():
    output = succeed("info")
    for words in (fastenc.__version__, torch.__version__, "CPU", "GPU", "triton"):
        assert words in output
    for name, backend in BACKENDS.items():
        line = next(line for line in output.splitlines() if line.startswith(f"backend {name} "))
        assert (backend.why_unavailable() or "usable") in line


def test_help_and_version_and_usage():
    assert all(word in succeed("--help") for word in ("train", "encode", "evaluate", "info"))
    assert succeed("--version").strip() == fastenc.__version__
    assert "--patience" in succeed("train", "--help")
    assert run("train").exit_code == 2
    assert run("fly").exit_code == 2


def test_bench_is_the_benchmark(tmp_path):
    succeed("bench", "dense", "--quick", "--threads", "1", "--dtype", "float32", "--out", tmp_path)
    assert {"dense.json", "RESULTS.md", "index.html"} <= {path.name for path in tmp_path.iterdir()}
    assert "no row changed beyond its interval" in succeed("bench", "--compare", tmp_path, tmp_path)
    assert run("bench", "speed").exit_code == 2
    assert run("bench", "--compare", tmp_path, tmp_path / "absent").exit_code == 2
