"""One model with adapters for each user: a mixed batch is each row alone, and users stay apart."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from accuracy import Worst
from safetensors import safe_open
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn

from fastenc import (
    AutoEncoder,
    Classifier,
    Encoder,
    ModelFileError,
    Regressor,
    Trainer,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
)
from fastenc.activation import ACTIVATIONS
from fastenc.data import DataError
from fastenc.personal import PersonalModel

X = make_x()
USERS = ["Ann", "Bo/b", "Çem"]
USER = torch.arange(50) % 3

APPLICATIONS = Path(__file__).parents[1] / "docs" / "applications"

pytestmark = pytest.mark.usefixtures("one_thread")


def make(model=None, users=USERS, **options):
    """With adapters that are no longer zero."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        personal = PersonalModel(make_classifier() if model is None else model, users, **options)
        for b in personal.lora_b:
            nn.init.normal_(b.data, std=0.3)
    return personal


def build(kind, activation):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = Encoder(6, (8, 5), activation)
        return {
            "encoder": lambda: encoder,
            "autoencoder": lambda: AutoEncoder(encoder),
            "classifier": lambda: Classifier(encoder, 3),
            "regressor": lambda: Regressor(encoder, 2),
        }[kind]()


def one_by_one(personal, x, user):
    """Each row through a plain model with the adapters of its user alone, with gradients by user and layer."""
    outs, models = [], {}
    for row, number in zip(x, user.tolist(), strict=True):
        name = personal.users[number]
        if name not in models:
            models[name] = personal.alone(name)
        outs.append(models[name](row[None]))
    return torch.cat(outs), models


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["encoder", "autoencoder", "classifier", "regressor"])
def test_a_mixed_batch_is_each_row_alone(kind, activation):
    personal = make(build(kind, activation), rank=2, alpha=3.0)
    sides = []
    for each, run in (
        (personal, lambda p, x: p(x, USER)),
        (personal, lambda p, x: one_by_one(p, x, USER)[0]),
        (copy.deepcopy(personal).double(), lambda p, x: one_by_one(p, x, USER)[0]),
    ):
        sides.append({"out": run(each, X.to(each.lora_a[0])).detach()})
    worst = Worst()
    worst.add(*sides)
    worst.check()


def test_gradients_are_those_of_each_user_alone():
    personal = make(build("classifier", "gelu"), rank=2).double()
    x = X.double()
    personal(x, USER).square().sum().backward()
    out, models = one_by_one(personal, x, USER)
    out.square().sum().backward()
    worst = Worst()
    for number, name in enumerate(personal.users):
        alone = dict(models[name].named_parameters())
        for layer, of_layer in enumerate(personal._names):
            for key in ("lora_a", "lora_b"):
                actual = getattr(personal, key)[layer].grad[number]
                expected = alone[f"{of_layer}.{key}"].grad
                worst.add({key: actual}, {key: expected}, {key: expected})
    worst.check()
    assert all(parameter.grad is None for parameter in personal.model.parameters())


def test_new_users_change_nothing():
    model = make_classifier()
    expected = copy.deepcopy(model).double()(X.double())
    personal = PersonalModel(model, USERS)
    worst = Worst()
    worst.add({"out": personal(X, USER).detach()}, {"out": model(X).detach()}, {"out": expected.detach()})
    worst.check()
    assert {name for name, p in personal.named_parameters() if p.requires_grad} == {
        f"{key}.{layer}" for key in ("lora_a", "lora_b") for layer in range(2)
    }
    assert personal.bytes_per_user == 4 * 4 * ((6 + 5) + (5 + 3))  # rank 4, float32


def test_users_learn_what_others_do_not():
    """Each user wants another thing of the same rows; Trainer trains all of them in mixed batches."""
    model = make_model().encoder
    before = copy.deepcopy(model.state_dict())
    personal = PersonalModel(model, USERS[:2], rank=2)
    x = X.repeat(2, 1)
    user = personal.numbers(["Ann"] * 50 + ["Bo/b"] * 50)
    y = torch.where(user[:, None] == 0, x[:, :3], -x[:, :3])
    trainer = Trainer(personal, lr=0.02, seed=0)
    history = trainer.fit(personal.joined(x, user), y, epochs=60, verbose=False).history["loss"]
    assert history[-1] < history[0] / 4
    assert trainer.predict(personal.joined(x, user)).shape == (100, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = [
        nn.functional.mse_loss(personal.alone(name)(X), sign * X[:, :3])
        for name, sign in zip(USERS[:2], (1, -1), strict=True)
    ]
    assert max(alone) < history[0] / 4


def test_a_user_without_rows_stays_where_it_is():
    personal = make()
    before = [personal.lora_a[0][1].clone(), personal.lora_b[0][1].clone()]
    trainer = Trainer(personal, "sgd", lr=0.1, loss="cross_entropy", seed=0)
    trainer.fit(personal.joined(X, USER * 2 % 4), USER, epochs=2, verbose=False)  # of 0 and 2
    assert torch.equal(personal.lora_a[0][1], before[0])
    assert torch.equal(personal.lora_b[0][1], before[1])
    assert not torch.equal(personal.lora_b[0][0], make().lora_b[0][0])


def test_codes_and_dropout():
    model = Classifier(Encoder(6, (8, 5), dropout=0.5), 3)
    personal = make(model)
    personal.eval()
    codes = personal.encode(X, USER)
    assert codes.shape == (50, 5)
    assert torch.equal(personal.encode(personal.joined(X, USER)), codes)
    assert torch.equal(personal(X, USER), personal(X, USER))
    personal.train()
    assert not torch.equal(personal(X, USER), personal(X, USER))
    expected = torch.cat([personal.alone(USERS[n]).eval().encode(x[None]) for x, n in zip(X, USER, strict=True)])
    torch.testing.assert_close(codes, expected)


def test_adding_and_removing_users():
    personal = make()
    outs = personal(X, USER)
    personal.add_users(["Dee"])
    assert torch.equal(personal(X, USER), outs)
    personal.remove_user("Bo/b")
    assert personal.users == ["Ann", "Çem", "Dee"]
    kept = USER != 1
    numbers = personal.numbers([USERS[number] for number in USER[kept]])
    assert torch.equal(numbers, USER[kept].clamp(max=1))
    assert torch.equal(personal(X[kept], numbers), outs[kept])
    empty = PersonalModel(make_classifier())
    assert empty.bytes_per_user == 0
    assert empty(X[:0], torch.empty(0, dtype=torch.int64)).shape == (0, 3)


def test_files(tmp_path):
    personal = make(rank=2, alpha=5.0)
    personal.save_users(tmp_path / "users")
    names = sorted(path.name for path in (tmp_path / "users").iterdir())
    assert names == ["%C3%87em.safetensors", "Ann.safetensors", "Bo%2Fb.safetensors"]
    loaded = PersonalModel.load(make_classifier(), tmp_path / "users")
    assert sorted(loaded.users) == sorted(USERS)
    assert (loaded.rank, loaded.alpha) == (2, 5.0)
    numbers = loaded.numbers([USERS[number] for number in USER])
    assert torch.equal(loaded(X, numbers), personal(X, USER))
    # One user's file alone, in the plain model, as serving one user would.
    one = load_lora(make_classifier(), tmp_path / "users" / "Bo%2Fb.safetensors")
    assert_same_weights(one, personal.alone("Bo/b"))
    merged = merge_lora(personal.alone("Bo/b"))
    merged.save_pretrained(tmp_path / "model")
    assert torch.equal(Classifier.from_pretrained(tmp_path / "model")(X), merged(X))
    with safe_open(tmp_path / "users" / "Ann.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastenc_lora"]) == {"rank": 2, "alpha": 5.0, "dropout": 0.0}


def test_adapters_of_save_lora_and_other_names(tmp_path):
    single = add_lora(make_classifier(), rank=2)
    nn.init.normal_(single.head.lora_b)
    save_lora(single, tmp_path / "adapters.safetensors")
    personal = PersonalModel(make_classifier(), rank=2)
    personal.load_user(tmp_path / "adapters.safetensors")
    personal.load_user(tmp_path / "adapters.safetensors", "Ann")
    assert personal.users == ["adapters", "Ann"]
    assert_same_weights(personal.alone("Ann"), single)
    before = personal.lora_a[0].clone()
    personal.load_user(tmp_path / "adapters.safetensors", "Ann")  # who is there
    assert torch.equal(personal.lora_a[0], before)


def test_files_that_do_not_fit(tmp_path):
    make(rank=2).save_user("Ann", tmp_path / "Ann.safetensors")
    other = make_classifier()
    other.head.bias.data += 1
    with pytest.raises(ModelFileError, match="was trained beside another shared model"):
        PersonalModel(other, rank=2).load_user(tmp_path / "Ann.safetensors")
    with pytest.raises(ModelFileError, match="adapters of rank 2 and alpha 16 and these are of 4 and 16"):
        PersonalModel(make_classifier()).load_user(tmp_path / "Ann.safetensors")
    with pytest.raises(ModelFileError, match="holds adapters of another model"):
        PersonalModel(make_model(), rank=2).load_user(tmp_path / "Ann.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"{")
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        PersonalModel.load(make_classifier(), tmp_path)
    with pytest.raises(ModelFileError, match=r"there is no \.safetensors file in"):
        PersonalModel.load(make_classifier(), tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: PersonalModel(nn.Linear(6, 3)), ValueError, "Linear is no Encoder, AutoEncoder"),
        (lambda p: PersonalModel(make_classifier(), rank=0), ValueError, "the rank is 0"),
        (lambda p: PersonalModel(make_classifier(), alpha=0), ValueError, "alpha is 0"),
        (lambda p: PersonalModel(make_classifier(), ["a", "a"]), ValueError, "the user 'a' is there already"),
        (lambda p: p.add_users([""]), ValueError, "the user '' is there already, or no name"),
        (lambda p: p.numbers(["Eve"]), DataError, "there is no user 'Eve'; add them by add_users"),
        (lambda p: p.remove_user("Eve"), DataError, "there is no user 'Eve'"),
        (lambda p: p.alone("Eve"), DataError, "there is no user 'Eve'"),
        (lambda p: p(X, USER + 1), DataError, "there are users 0 to 2, and the numbers given are 1 to 3"),
        (lambda p: p(X, USER - 1), DataError, "the numbers given are -1 to 1"),
        (lambda p: p(X, USER[:3]), DataError, r"x has shape \[50, 6\] and user \[3\]"),
    ],
)
def test_wrong_use(call, error, message):
    personal = make()
    with pytest.raises(error, match=message):
        call(personal)


def test_too_many_users_for_a_dtype():
    personal = make()
    personal.users = [str(number) for number in range(3000)]
    with pytest.raises(DataError, match="cannot number 3000 users; join them in float32"):
        personal.joined(X.half(), USER)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (APPLICATIONS / "personalised.md").read_text(), re.DOTALL)
    exec(block, {})
    assert sorted(path.name for path in (tmp_path / "users").iterdir()) == [
        f"{name}.safetensors" for name in ("ann", "bob", "eve")
    ]
