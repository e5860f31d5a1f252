"""What all front ends share: batches by length, items read once, and the encoder behind a front end."""

import numpy as np
import pytest
import torch
from torch import nn

from fastenc import AutoEncoder, Classifier, Encoder, ModelFileError, Trainer, load_pretrained
from fastenc.data import DataError
from fastenc.frontends import (
    FrontEncoder,
    FrontEnd,
    Items,
    Reader,
    batches,
    collect,
    encode_items,
    kinds,
    make_loader,
    summaries,
)
from fastenc.frontends.batches import ByLength
from fastenc.frontends.kinds import kind_of
from fastenc.frontends.reader import files_by_class

pytestmark = pytest.mark.usefixtures("one_thread")


class Numbers(Reader):
    """Items are lists of numbers; a batch is padded with NaN."""

    kind, suffixes = "numbers", (".numbers",)
    reads = 0

    def read(self, item):
        if not item:
            raise DataError("an item has no numbers; give it one")
        self.reads += 1
        return np.array(item, np.float32)

    def batch(self, arrays):
        longest = max(map(len, arrays))
        padded = [np.pad(array, (0, longest - len(array)), constant_values=np.nan) for array in arrays]
        return torch.from_numpy(np.stack(padded))


class Moments(FrontEnd):
    """Mean and largest value: two features, which are the summary, too."""

    kind, out_features, summary_features = "numbers", 2, 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def get_config(self):
        return {}

    def summary(self, x):
        return torch.stack([x.nanmean(1), x.nan_to_num(-torch.inf).amax(1)], 1)

    def forward(self, x):
        return self.summary(x) * self.scale


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(kinds.FRONT_ENDS, "Moments", Moments)


def make_items(count=50, seed=0):
    random = np.random.default_rng(seed)
    return Items(Numbers(), [random.normal(size=random.integers(1, 30)).tolist() for _ in range(count)])


def make_encoder(seed=0):
    torch.manual_seed(seed)
    return FrontEncoder(Moments(), Encoder(2, (8, 3)))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_row_comes_once(batch_size, seed):
    lengths, rows = np.random.default_rng(0).integers(1, 100, 60), np.arange(5, 55)
    sampler = ByLength(lengths, rows, batch_size, seed)
    for _ in range(2):
        found = list(sampler)
        assert len(found) == len(sampler)
        assert sorted(number for batch in found for number in batch) == rows.tolist()
        assert sorted(map(len, found))[1:] == [batch_size] * (len(found) - 1)


def test_batches_are_of_nearly_equal_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 4096)
    rows = np.arange(4096)

    def padded(found):
        return sum(len(batch) * lengths[batch].max() for batch in found)

    sampler = ByLength(lengths, rows, 32, 0)
    epochs = [list(sampler), list(sampler)]
    in_any_order = np.random.default_rng(1).permutation(rows).reshape(-1, 32)
    for found in epochs:
        # Of 1,024 lengths that are uniform, a batch of 32 neighbours spans a 32nd: half of that is padding.
        assert padded(found) < lengths.sum() * 1.05
    assert padded(in_any_order) > lengths.sum() * 1.8
    assert epochs[0] != epochs[1]
    assert epochs[0] == list(ByLength(lengths, rows, 32, 0))


def test_items_are_read_once_and_kept(monkeypatch):
    items = make_items()
    assert items.reader.reads == 50
    assert [items[number][1].tolist() for number in (0, 49)] == [np.float32(items.items[n]).tolist() for n in (0, 49)]
    assert items.reader.reads == 50
    monkeypatch.setattr(batches, "KEPT_BYTES", 100)
    again = make_items()
    assert again.reader.reads == 50
    for number in range(50):
        np.testing.assert_array_equal(again[number][1], items[number][1])
    assert again.reader.reads > 90
    assert again.sha256 == items.sha256 != make_items(seed=1).sha256


def test_a_bad_item_is_found_at_the_start():
    with pytest.raises(DataError, match="has no numbers"):
        Items(Numbers(), [[1.0], []])


def test_encoding_keeps_the_order_and_no_padding_shows():
    items, encoder = make_items(200), make_encoder().train()
    vectors = encode_items(encoder, items)
    assert encoder.training
    for number in (0, 77, 199):
        alone = encoder.eval()(items.reader.batch([items[number][1]])).detach().numpy()
        np.testing.assert_allclose(vectors[number], alone[0], rtol=1e-6, atol=1e-7)


def test_no_items_to_encode():
    with pytest.raises(DataError, match="no items"):
        encode_items(make_encoder(), Items(Numbers(), []))


def test_training_with_and_without_labels():
    items = make_items(200)
    wanted = summaries(encoder := make_encoder(), items)
    assert wanted.shape == (200, 2)
    labels = (wanted[:, 0] > 0).long()
    model = Classifier(encoder, 2)
    trainer = Trainer(model, lr=1e-2, loss="cross_entropy", seed=0)
    kept, held_out = np.arange(150), np.arange(150, 200)
    history = trainer.fit(
        make_loader(items, kept, labels, seed=0), epochs=20, validation_data=make_loader(items, held_out, labels)
    )
    assert history.history["val_accuracy"][-1] > 0.9
    history = Trainer(AutoEncoder(encoder), lr=1e-2, seed=0).fit(make_loader(items, kept, wanted, seed=0), epochs=20)
    assert history.history["loss"][-1] < history.history["loss"][0] / 2


@pytest.mark.parametrize("make", [lambda e: e, AutoEncoder, lambda e: Classifier(e, 3)])
def test_saved_and_loaded(tmp_path, make):
    model, items = make(make_encoder()), make_items()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    np.testing.assert_array_equal(encode_items(loaded, items), encode_items(model, items))


def test_unknown_front_ends_are_named(tmp_path, monkeypatch):
    make_encoder().save_pretrained(tmp_path)
    monkeypatch.delitem(kinds.FRONT_ENDS, "Moments")
    with pytest.raises(ModelFileError, match="no front end 'Moments' here"):
        load_pretrained(tmp_path)


def test_the_encoder_must_fit():
    with pytest.raises(ValueError, match=r"takes 3 features and Moments gives 2; make it Encoder\(2"):
        FrontEncoder(Moments(), Encoder(3, (4,)))


def test_files_and_their_classes(tmp_path):
    for name in ("b/2.x", "a/1.X", "b/deep/3.x", "a/.hidden.x", "a/other.y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files, labels = files_by_class(tmp_path, (".x",))
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a/1.X", "b/2.x", "b/deep/3.x"]
    assert labels.tolist() == ["a", "b", "b"]
    assert files_by_class(tmp_path / "a", (".x",))[1] is None
    (tmp_path / "stray.x").touch()
    with pytest.raises(DataError, match=r"stray\.x, beside folders"):
        files_by_class(tmp_path, (".x",))
    with pytest.raises(DataError, match=r"no files in \.z"):
        files_by_class(tmp_path, (".z",))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        collect(str(tmp_path / "absent"), "image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="that no front end reads"):
        kind_of(str(tmp_path / "empty"))
    assert kind_of("digits") == kind_of(str(tmp_path / "absent.csv")) == "table"
