"""Which features drive which codes: what captum is asked, what is made of it, and the command."""

import copy
import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from integrated import assert_within, make, unfused_layers
from matplotlib.image import imread
from torch import nn
from typer.testing import CliRunner

from fastenc import Classifier, Encoder, FusedDense, cli, plots
from fastenc.attribution import DEEP_LIFT, METHODS, feature_attributions, row_attributions
from fastenc.cli import explain_features as command
from fastenc.data import DataError

APPLICATIONS = Path(__file__).parents[1] / "docs" / "applications"

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BASELINE = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
# captum keeps the weights of the integral in float32: so much of each of its terms is lost.
WEIGHTS_ROUNDED = 2**-24


def gradients_at_most(model):
    """[codes, features], where no activation is steeper than 1: the product of the weights' sizes."""
    bound = torch.eye(6, dtype=torch.float64)
    for layer in model.layers:
        bound = layer.weight.detach().double().abs() @ bound
    return bound


@pytest.mark.parametrize("method", METHODS)
def test_of_a_linear_model_the_slopes_are_its_weights(method):
    model = make(lambda: nn.Linear(6, 3)).double()
    found = feature_attributions(model, X, method=method)
    weight = model.weight.detach().numpy()
    away = np.abs((X - X.mean(0)).numpy()).mean(0)
    size = np.abs(weight) if method == "gradient" else np.abs(weight) * away
    assert (found.method, found.rows, found.codes) == (method, 30, [0, 1, 2])
    np.testing.assert_allclose(found.slope, weight, rtol=4 * WEIGHTS_ROUNDED)
    np.testing.assert_allclose(found.size, size, rtol=4 * WEIGHTS_ROUNDED)


@pytest.mark.parametrize("baseline", [None, BASELINE])
@pytest.mark.parametrize(("method", "activation"), [("integrated-gradients", "tanh"), ("deep-lift", "relu")])
def test_attributions_add_up_to_the_difference(method, activation, baseline):
    model = make(lambda: Encoder(6, (8, 5), activation)).double()
    found = row_attributions(model, X, baseline, method)
    start = X.mean(0) if baseline is None else baseline
    assert torch.equal(found.baseline, start)
    with torch.no_grad():
        difference = (model(X) - model(start[None])).T
    off = (torch.from_numpy(found.of_codes).sum(2) - difference).abs()
    terms = gradients_at_most(model) @ (X - start).abs().T
    assert (off <= WEIGHTS_ROUNDED * terms).all()
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", DEEP_LIFT)
def test_fused_layers_have_the_attributions_of_unfused_ones(activation, method):
    model = make(lambda: Encoder(6, (8, 5), activation))
    plain = unfused_layers(model.layers)
    sides = []
    for each, dtype in ((model, torch.float32), (plain, torch.float32), (copy.deepcopy(plain).double(), torch.float64)):
        x, start = X.float().to(dtype), BASELINE.float().to(dtype)
        sides.append([torch.from_numpy(row_attributions(each, x, start, method).of_codes)])
    assert_within(*sides)


def test_the_model_stays_as_it_is():
    model = make(lambda: Classifier(Encoder(6, (8, 5), dropout=0.5), 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in METHODS:
        first, second = (feature_attributions(model.encoder, X, method=method).size for _ in range(2))
        assert np.array_equal(first, second)  # no dropout
    assert all(module.training for module in model.modules())
    assert all(type(layer) is FusedDense and not layer._forward_hooks for layer in model.encoder.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def known():
    """Two codes of three features, the third one of which drives neither, and a code that nothing drives."""
    model = nn.Linear(3, 3, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -3.0, 0.0], [2.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0, 5.0], [-1.0, -1.0, 5.0]], dtype=torch.float64)
    return feature_attributions(model, x, method="ablation", feature_names=["age", "sex=m", "height"])


def test_tables():
    found = known()
    assert found.top(5) == {0: [1, 0], 1: [0, 1], 2: []}
    assert found.top(1) == {0: [1], 1: [0], 2: []}
    assert found.dead == [2]
    lines = [line.split() for line in found.table(5).splitlines()[2:]]
    assert lines[0] == ["code", "0", "sex=m", "75.0%", "down", "-3"]
    assert lines[1] == ["age", "25.0%", "up", "1"]
    assert lines[2] == ["code", "1", "age", "80.0%", "up", "2"]


def test_files(tmp_path):
    found = known()
    found.save_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["code", "feature", "size", "slope"]
    assert lines[:3] == [["0", "age", "1", "1"], ["0", "sex=m", "3", "-3"], ["0", "height", "0", "0"]]
    assert len(lines) == 9
    wide = feature_attributions(make(lambda: Encoder(60, (4,))), torch.rand(20, 60))
    for number, each in enumerate((found, wide)):
        plots.save_plot(each.draw, tmp_path / f"{number}.png", each.picture_size())
        assert imread(tmp_path / f"{number}.png")[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "guess"}, ValueError, "method is 'guess'; give one of integrated-gradients"),
        ({"codes": [5]}, DataError, "there is no code 5; the model has codes 0 to 4"),
        ({"codes": [-1]}, DataError, "there is no code -1"),
        ({"baseline": [0.0]}, DataError, r"the baseline has shape \[1\]"),
        ({"baseline": [torch.nan] * 6}, DataError, "the baseline has"),
        ({"feature_names": ["a"]}, DataError, "there are 1 feature names and 6 columns"),
        ({"x": X[:, :5]}, DataError, "x has 5 columns where 6 are expected"),
        ({"x": X * torch.nan}, DataError, "x has NaN or Inf"),
        ({"model": nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))}, ValueError, r"the model gives \[1\] for one row"),
        ({"model": Encoder(6, (8, 5), "gelu"), "method": "deep-lift"}, ValueError, "deep-lift has no rule for gelu"),
    ],
)
def test_wrong_use(change, error, message):
    with pytest.raises(error, match=message):
        feature_attributions(**{"model": Encoder(6, (8, 5)), "x": X, **change})


def test_without_captum(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ModuleNotFoundError, match=r'attribution needs captum; run: pip install "fastenc\[tools\]"'):
        feature_attributions(Encoder(6, (4,)), X)


def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A CSV of 300 rows in which age and colour vary, and a model of it."""
    folder = tmp_path_factory.mktemp("people")
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"age": random.normal(40, 10, 300), "colour": random.choice(["red", "green"], 300)})
    frame["same"] = 1.0
    frame.to_csv(folder / "people.csv", index=False)
    assert (
        run("train", folder / "people.csv", "--out", folder / "model", "--widths", "8,3", "--epochs", 3).exit_code == 0
    )
    return folder / "model", folder / "people.csv"


def test_the_command(people, tmp_path):
    model, data = people
    result = run("explain-features", model, data, "--out", tmp_path / "new" / "out", "--rows", 100)
    assert result.exit_code == 0, result.output
    assert f"integrated-gradients over 100 of the 300 rows of {data}, chosen at random, beside" in result.output
    assert re.search(r"^code \d +(age|colour=red|colour=green) +\d+\.\d% ", result.output, re.MULTILINE)
    assert not re.search(r"^.* same .*%", result.output, re.MULTILINE)
    table = pd.read_csv(tmp_path / "new" / "out" / "attributions.csv")
    assert len(table) == 3 * 4
    assert set(table.feature) == {"age", "same", "colour=green", "colour=red"}
    assert not table["size"][table.feature == "same"].any()
    assert imread(tmp_path / "new" / "out" / "attributions.png")[..., :3].std() > 0.05


def test_the_command_is_repeatable_and_takes_codes(people):
    options = ["--code", 2, "--code", 0, "--top", 1, "--method", "gradient", "--rows", 50]
    first, second, other = (
        run("explain-features", *people, *options, "--seed", seed).output.splitlines() for seed in (1, 1, 2)
    )
    assert first == second != other
    codes = [line.split()[1] for line in first if line.startswith("code ")]
    assert codes in (["2", "0"], ["2"], ["0"])  # a code may be dead
    assert "over all 300 rows" in run("explain-features", *people, "--code", 0).output


def test_the_command_samples_evenly(people):
    """Each row has the same chance, however the file is cut into chunks."""
    saved = SimpleNamespace(
        prepare_chunks=lambda data, chunks: (
            (SimpleNamespace(x=np.arange(start, start + 10, dtype=np.float32)[:, None], dropped=1, unseen=2), None)
            for start in range(0, 100, 10)
        )
    )
    counts = np.zeros(100)
    for seed in range(400):
        x, total, dropped, unseen = command.some_rows(saved, str(people[1]), 20, seed)
        assert (len(x), total, dropped, unseen) == (20, 100, 10, 20)
        assert (np.diff(x[:, 0]) > 0).all()
        counts[x[:, 0].astype(int)] += 1
    deviation = np.sqrt(400 * 0.2 * 0.8)
    assert np.abs(counts - 80).max() < 5 * deviation


def test_the_command_says_what_is_wrong(people, tmp_path, monkeypatch):
    model, data = people

    def fails(*args):
        result = run("explain-features", *args)
        assert result.exit_code == 2
        return result.output

    assert "there is no code 3; the model has codes 0 to 2" in fails(model, data, "--code", 3)
    assert "'guess' is not one of integrated-gradients" in fails(model, data, "--method", "guess")
    assert "there is no folder" in fails(tmp_path / "none", data)
    assert "is a file; give a folder to --out" in fails(model, data, "--out", data)
    pd.DataFrame({"age": [1.0]}).to_csv(tmp_path / "other.csv", index=False)
    assert "which training had" in fails(model, tmp_path / "other.csv")
    monkeypatch.setitem(sys.modules, "captum", None)
    assert 'fastenc explain-features needs captum; run: pip install "fastenc[tools]"' in fails(model, data)
    monkeypatch.undo()
    monkeypatch.setattr(command, "SavedModel", lambda folder: SimpleNamespace(reader=SimpleNamespace(kind="image")))
    assert "is of image data, and features are explained of tables" in fails(model, data)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (APPLICATIONS / "interpretability.md").read_text(), re.DOTALL)
    exec(block, {})
    assert "code 0" in capsys.readouterr().out
    assert imread(tmp_path / "codes.png").shape[1] > 500
