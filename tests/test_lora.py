"""Low-rank adapters: what they compute, that they alone are trained, and that the merged model is a plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import Worst
from small_models import assert_near, assert_same_weights, make_classifier, make_model, make_x
from torch import nn

from fastenc import (
    AutoEncoder,
    Encoder,
    FusedDense,
    ModelFileError,
    Trainer,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
)
from fastenc.lora import LoraDense

X = make_x()


def trained(model, **options):
    """With adapters that are no longer zero."""
    add_lora(model, **options)
    Trainer(model, lr=0.05, seed=0).fit(X, epochs=3, verbose=False)
    return model


def test_an_adapter_adds_its_product():
    torch.manual_seed(0)
    base = FusedDense(6, 4, activation="tanh", dtype=torch.float64)
    layer = add_lora(base, rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_b)
    x = X.double()
    weight = base.weight + 3.0 / 2 * layer.lora_b @ layer.lora_a
    assert_near([layer(x)], [torch.tanh(x @ weight.T + base.bias)])


def test_new_adapters_change_no_output():
    model = make_model()
    before = model(X)
    assert torch.equal(add_lora(model, rank=2)(X), before)


def test_only_adapters_are_trained():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trained(model, rank=2, dropout=0.3)
    after = model.state_dict()
    changed = {name for name in after if name.endswith(("lora_a", "lora_b"))}
    assert len(changed) == 8
    for name, tensor in before.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(after[f"{owner}.base.{leaf}"], tensor)
    assert all(after[name].any() for name in changed)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == changed


def test_merging_gives_back_a_plain_model(tmp_path):
    plain = make_model()
    model = trained(make_model(), rank=2)
    before, exact = model(X), copy.deepcopy(model).double()(X.double())
    assert merge_lora(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    worst = Worst()
    worst.add({"out": model(X)}, {"out": before}, {"out": exact})
    worst.check()
    assert not torch.equal(model.encoder.layers[0].weight, plain.encoder.layers[0].weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoEncoder.from_pretrained(tmp_path)(X), model(X))
    Trainer(model).fit(X, verbose=False)


def test_the_engine_takes_merged_models_and_says_why_not_adapted_ones():
    model = add_lora(make_model())
    trainer = Trainer(model)
    trainer.fit(X, verbose=False)
    assert trainer.explain().startswith("step by step: the model is not a plain")
    assert trainer.explain().endswith("is a LoraDense")
    trainer = Trainer(merge_lora(model))
    trainer.fit(X, verbose=False)
    assert trainer.explain().endswith("by the C++ engine")


def test_dropout_is_of_the_adapter_only():
    torch.manual_seed(0)
    layer = add_lora(FusedDense(6, 4), rank=2, dropout=0.5)
    plain = layer.base(X)
    assert torch.equal(layer.train()(X), torch.relu(nn.functional.linear(X, layer.base.weight, layer.base.bias)))
    nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer(X), layer(X))
    assert torch.equal(layer.eval()(X), layer(X))
    assert not torch.equal(layer(X), plain)


def test_linear_layers_anywhere_are_adapted():
    linear = nn.Linear(6, 6)
    model = nn.Sequential(linear, nn.ReLU(), nn.Sequential(linear, nn.Tanh()), nn.Linear(6, 3, bias=False))
    names = list(model.state_dict())
    add_lora(model, rank=1)
    assert model[0] is model[2][0]  # one layer in two places has one adapter
    assert sum(isinstance(module, LoraDense) for module in model.modules()) == 2
    assert model(X).shape == (50, 3)
    assert list(merge_lora(model).state_dict()) == names


def test_adapters_are_saved_apart(tmp_path):
    model = trained(make_model(), rank=2, alpha=5.0)
    save_lora(model, tmp_path / "adapters.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.safetensors"]
    loaded = load_lora(make_model(), tmp_path / "adapters.safetensors")
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(X), model(X))
    model.encoder.layers[0].lora_a.data.zero_()
    save_lora(model, tmp_path / "adapters.safetensors")
    assert not load_lora(make_model(), tmp_path / "adapters.safetensors").encoder.layers[0].lora_a.any()


def test_adapters_of_another_model_are_refused_with_all_names(tmp_path):
    path = tmp_path / "adapters"
    save_lora(add_lora(make_model(), rank=2), path)
    other = make_classifier()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ModelFileError) as error:
        load_lora(other, path)
    for words in (
        "head.lora_a is missing",
        "head.lora_b is missing",
        "decoder.layers.1.lora_a is not part of the model",
        "encoder.layers.1.lora_b is not part of the model",
    ):
        assert words in str(error.value)
    assert list(other.state_dict()) == list(before)
    with pytest.raises(ModelFileError, match=r"encoder.layers.0.lora_b is \[5, 2\], not \[4, 2\]"):
        load_lora(AutoEncoder(Encoder(6, (4, 3))), path)


def test_what_is_no_file_of_adapters(tmp_path):
    with pytest.raises(ModelFileError, match="there is no file"):
        load_lora(make_model(), tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"{")
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        load_lora(make_model(), tmp_path / "broken")
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelFileError, match="holds no adapters"):
        load_lora(make_model(), tmp_path / "model" / "model.safetensors")


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add_lora(make_model(), rank=0), "the rank is 0"),
        (lambda: add_lora(make_model(), alpha=0), "alpha is 0"),
        (lambda: add_lora(make_model(), dropout=1), "the adapters' dropout is 1"),
        (lambda: add_lora(nn.ReLU()), "ReLU has no FusedDense or nn.Linear to adapt"),
        (lambda: add_lora(add_lora(make_model())), "the model has adapters already"),
        (lambda: add_lora(tied()), "layers share a weight"),
        (lambda: merge_lora(make_model()), "AutoEncoder has no adapters; add them by add_lora"),
        (lambda: save_lora(make_model(), "x"), "AutoEncoder has no adapters"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adapted_models_are_not_saved_as_plain_ones(tmp_path):
    with pytest.raises(ModelFileError, match="no longer what its config describes"):
        add_lora(make_model()).save_pretrained(tmp_path / "model")
