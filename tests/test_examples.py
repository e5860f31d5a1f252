"""Each example as a program of its own, at a smaller size: what it writes, and whether its figures make sense."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from example_runs import EXAMPLES, compare, figure, run
from matplotlib.image import imread
from typer.testing import CliRunner

from fastenc import cli
from fastenc.loading import load_pretrained


def losses(output):
    return [float(number) for number in re.search(r"loss: (\S+) after the first epoch, (\S+) after", output).groups()]


def test_every_example_is_tested_here():
    tested = set()
    for path in Path(__file__).parent.glob("test_example*.py"):
        tested |= set(re.findall(r'"(\w+\.py)"', path.read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*tested, "comparing.py", "everything.py"}  # of all


def test_article_encoder():
    output = run("article_encoder.py", "--epochs", "10").stdout
    first, last = losses(output)
    # The rows are uniform in 0 to 1: their variance, 1/12, is what is left if only the mean is learned.
    assert last < first
    assert last < 1.1 / 12
    assert "encoded vectors: (1000, 16)" in output


def test_article_linear():
    output = run("article_linear.py", "--epochs", "40").stdout
    first, last = losses(output)
    # Each target has variance 1 from x and 0.01 from noise; a linear layer can learn all but the noise.
    assert first > 0.5
    assert last < 0.1
    assert "predicted encoded data shape: (1000, 10)" in output


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    return out, run("digits.py", "--out", out, "--epochs", "40", "--rounds", "1")


def test_digits_figures(digits):
    out, result = digits
    assert "epoch" in result.stderr  # the progress bar
    figures = json.loads((out / "results.json").read_text())
    errors = figures["reconstruction"]
    assert errors["PCA, 16 components"] < errors["mean of the fitted rows"]
    assert errors["fastenc"] < errors["mean of the fitted rows"] / 3
    for accuracy in figures["accuracy"].values():
        assert accuracy["code, 16 numbers"] > 0.8  # a guess is right once in ten
        assert accuracy["all 64 features"] > 0.9
    assert all(speed > 0 for speed in figures["steps_per_second"].values())
    assert (figures["fitted_rows"], figures["scored_rows"]) == (1222, 359)
    for words in (
        "Backend for",
        "Best epoch",
        "Reconstruction",
        "Accuracy from",
        "steps per second",
        "PyTorch, Adam(fused=True)",
    ):
        assert words in result.stdout


def test_digits_files(digits):
    out, _ = digits
    assert np.load(out / "vectors.npy").shape == (1797, 16)
    assert load_pretrained(out / "model").encoder.widths == (128, 64, 32, 16)
    for name in ("losses", "reconstructions", "map", "overview"):
        picture = imread(out / f"{name}.png")
        assert picture.shape[1] >= 1000
        assert picture[..., :3].std() > 0.05  # not blank


def test_the_command_line_goes_on_from_the_demo(digits, tmp_path):
    out, _ = digits
    result = CliRunner().invoke(cli.app, ["encode", str(out / "model"), "digits", "-o", str(tmp_path / "v.npy")])
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), np.load(out / "vectors.npy"), atol=1e-5)
    result = CliRunner().invoke(cli.app, ["evaluate", str(out / "model"), "digits"])
    assert "Scored on the 359 rows that were held out" in result.output


# The comparisons on real data, at a small size: what they print, and their pictures.


def test_pretrain_digits(tmp_path):
    output, pictures = compare("pretrain_digits.py", tmp_path, "--epochs", 20)
    assert "50 labels, 1198 rows without, scored on 599; 1 seeds" in output
    rows = ("from scratch", "pre-trained as an autoencoder", "pre-trained by contrast (InfoNCE)")
    assert all(figure(output, row) > 0.2 for row in rows)  # a guess is right once in ten
    assert pictures == ["accuracy.png"]


def test_transfer_digits(tmp_path):
    output, pictures = compare("transfer_digits.py", tmp_path, "--epochs", 20)
    assert "25 labels of 5 to 9, scored on 448; 1 seeds, 20 epochs" in output
    for row in ("from scratch", "labels, all trained", "no labels, both layers frozen", "labels, thawed from the top"):
        assert figure(output, row) > 0.25  # a guess is right once in five
        assert re.search(rf"^{row} .* \d+ ms  whole, in C\+\+$", output, re.MULTILINE)
    assert re.search(r"^labels, adapters of rank 4 .* one by one$", output, re.MULTILINE)
    assert pictures == ["accuracy.png"]


def test_anomaly_breast_cancer(tmp_path):
    output, pictures = compare("anomaly_breast_cancer.py", tmp_path, "--epochs", 50)
    assert "Fitted on 250 benign samples, scored on 107 and 212 malignant ones" in output
    for row in ("autoencoder", "denoising autoencoder", "PCA, 8 components", "IsolationForest"):
        assert 0.85 < figure(output, row) < 1.0
    assert pictures == ["areas.png"]


def test_regression_diabetes(tmp_path):
    output, pictures = compare("regression_diabetes.py", tmp_path, "--epochs", 10)
    assert "331 patients to search with, 111 held out" in output
    assert "fastenc, EncoderRegressor: {'lr':" in output
    assert 0.1 < figure(output, "fastenc, EncoderRegressor") < 0.7  # the mean of y has 0
    assert pictures == ["explained.png"]


def test_two_tasks(tmp_path):
    output, pictures = compare("two_tasks.py", tmp_path, "--epochs", 30)
    assert "100 rows to train on, scored on 599" in output
    accuracy, error = output.split("squared error of the image")
    for row in ("one encoder for both", "digit alone"):
        assert figure(accuracy, row) > 0.3
    for row in ("one encoder for both", "image alone"):
        assert figure(error, row) < 0.073  # what the mean image has
    assert pictures == ["digit.png", "image.png"]
