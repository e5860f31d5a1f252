"""Texts: the tokenizer's round trip, features that no padding changes, and models on them that learn, save and load."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Worst
from torch import nn

import fastenc
from fastenc import AutoEncoder, Classifier, Encoder, Trainer, ops
from fastenc.data import DataError
from fastenc.frontends import FrontEncoder, Items, encode_items, make_loader, reader_from_dict
from fastenc.frontends.text import EMPTY, FIRST, PAD, POOLINGS, SUMMARY, TextFrontEnd, TextReader
from fastenc.loading import load_with_preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

TOPICS = {
    "food": ["bread", "soup", "cheese", "apple", "rice", "butter", "onion", "cake"],
    "sky": ["cloud", "rain", "storm", "sunshine", "wind", "thunder", "snow", "mist"],
    "sport": ["goal", "match", "racket", "referee", "swimmer", "marathon", "ball", "team"],
}
SHARED = [
    "today",
    "we",
    "talked",
    "about",
    "the",
    "very",
    "good",
    "old",
    "new",
    "with",
    "many",
    "people",
    "and",
    "some",
]


def sentences(count: int, seed: int = 0) -> tuple[list[str], torch.Tensor]:
    """Sentences of shared words with two words of a topic among them, and the topics' numbers."""
    random = np.random.default_rng(seed)
    labels = random.integers(len(TOPICS), size=count)
    texts = []
    for label in labels:
        words = [*random.choice(SHARED, random.integers(3, 12)), *random.choice(list(TOPICS.values())[label], 2)]
        texts.append(" ".join(random.permutation(words)))
    return texts, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader(max_tokens=40).fit(sentences(300)[0])


def front_end(pooling: str, vocabulary: int = 50, **options) -> TextFrontEnd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextFrontEnd(vocabulary, 16, pooling, max_tokens=40, **{"depth": 2, **options}).eval()


def tokens(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST, 50, (length,), generator=generator) for length in lengths]


# The reader.


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("The Rain  talked\tabout\n the ball", "the rain talked about the ball"),
        ("ﬁne ①", "fine 1"),  # NFKC
        ("zyzzyva quokka", "zyzzyva quokka"),  # words that were never seen
        ("👩‍🚀 rain 🌧️", "👩‍🚀 rain 🌧️"),
        ("Дождь 雨が降る مطر", "дождь 雨が降る مطر"),
        ("a\0b", "a\0b"),
        ("[PAD] <unk>", "[pad] <unk>"),
    ],
)
def test_tokens_round_trip(reader, text, back):
    array = reader.read(text)
    assert array.dtype == np.int64
    assert FIRST <= array.min() <= array.max() < reader.token_count
    assert reader.decode(array) == back
    np.testing.assert_array_equal(reader.read(text.encode()), array)


def test_known_words_are_single_tokens(reader):
    assert len(reader.read("today people talked about some")) == 5


@pytest.mark.parametrize("text", ["", "  \n\t", b"", "\u3000"])
def test_an_empty_text_has_one_token(reader, text):
    np.testing.assert_array_equal(reader.read(text), [EMPTY])
    assert reader.decode(reader.read(text)) == ""


@pytest.mark.parametrize("text", ["rain " * 200_000, "x" * 1_000_000], ids=["words", "one word"])
def test_a_very_long_text_is_cut(reader, text):
    assert len(reader.read(text)) == reader.max_tokens


def test_texts_in_files(reader, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfSome rain")
    assert reader.decode(reader.read(path)) == "some rain"
    with pytest.raises(DataError, match=r"gone\.txt cannot be read \(No such file"):
        reader.read(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b"caf\xe9", r"the text is not UTF-8 text \(byte 3 of it\); save it as UTF-8"),
        ("half \ud83d", "has half a character at 5; decode it anew"),
        (7, "a text is a int; give a str"),
    ],
)
def test_what_is_no_text(reader, item, reason):
    with pytest.raises(DataError, match=reason):
        reader.read(item)


def test_batches_are_padded_behind_the_end(reader):
    arrays = [reader.read(text) for text in ("some rain", "", "many people talked")]
    x = reader.batch(arrays)
    assert (x.dtype, x.shape) == (torch.int64, (3, 3))
    assert [row[row != PAD].tolist() for row in x] == [array.tolist() for array in arrays]
    assert (x != PAD).sum(1).tolist() == [reader.length(array) for array in arrays]


def test_the_vocabulary_suits_the_texts():
    few, many = sentences(40)[0], sentences(1000)[0]
    assert TextReader().fit(few).token_count < TextReader().fit(many).token_count < 600
    assert TextReader(vocabulary=270).fit(many).token_count == 270 + FIRST


def test_the_same_texts_give_the_same_tokens(reader):
    assert TextReader(max_tokens=40).fit(sentences(300)[0]).to_dict() == reader.to_dict()


def test_saved_and_loaded(reader):
    loaded = reader_from_dict(json.loads(json.dumps(reader.to_dict())))
    assert isinstance(loaded, TextReader)
    assert loaded.max_tokens == 40
    for text in ("today we talked", "Дождь", ""):
        np.testing.assert_array_equal(loaded.read(text), reader.read(text))


def test_nothing_to_learn_from():
    with pytest.raises(DataError, match="all of the 2 texts are empty"):
        TextReader().fit(["", " "])
    with pytest.raises(ValueError, match="has learned no tokens; call fit"):
        TextReader().read("rain")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        TextReader(max_tokens=0)


# The front end.


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling, training):
    """In a batch as alone: within twice the error that a text has alone, against float64."""
    model = front_end(pooling).train(training)
    exact_model = copy.deepcopy(model).double()
    texts = tokens(1, 3, 17, 40, 8)
    batch = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    together = model(batch)
    worst = Worst()
    for row, text in zip(together, texts, strict=True):
        alone, exact = model(text[None])[0], exact_model(text[None])[0]
        worst.add({"features": row.detach()}, {"features": alone.detach()}, {"features": exact.detach()})
    worst.check()
    with torch.inference_mode():
        wider = model(nn.functional.pad(batch[:3, :17], (0, 9)))
    worst.add({"features": wider}, {"features": together[:3].detach()}, {"features": exact_model(batch).detach()[:3]})
    worst.check()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_gets_no_gradient(pooling):
    model = front_end(pooling)
    batch = nn.utils.rnn.pad_sequence(tokens(2, 9), batch_first=True)
    model(batch).square().sum().backward()
    used = model.embedding.weight.grad.abs().sum(1) > 0
    assert set(used.nonzero().flatten().tolist()) <= set(batch[batch != PAD].tolist())
    if pooling == "transformer":
        model.zero_grad()
        model(batch[:1]).square().sum().backward()
        assert (model.pool.place.grad.abs().sum(1) > 0).tolist() == [True] * 2 + [False] * 38


@pytest.mark.parametrize("pooling", ["gru", "transformer"])
def test_the_order_of_words_is_seen(pooling):
    model, x = front_end(pooling), tokens(6)[0]
    assert not torch.allclose(model(x[None]), model(x.flip(0)[None]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_padding_alone_has_numbers(pooling):
    out = front_end(pooling)(torch.zeros(2, 3, dtype=torch.int64))
    assert out.shape == (2, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_the_feed_forward_blocks_run_fused(mode):
    model = front_end("transformer", depth=3).train(mode == "train")
    with ops.record() as decisions, torch.inference_mode(mode == "inference"):
        model(torch.stack(tokens(5, 5)))
    assert [decision.activations for decision in decisions] == [("gelu", "identity")] * 3
    assert [decision.widths for decision in decisions] == [(16, 64, 16)] * 3
    assert {decision.rows for decision in decisions} == {10}


def test_more_tokens_than_places():
    with pytest.raises(ValueError, match="texts of 41 tokens and this front end has places for 40; read them by"):
        front_end("transformer")(torch.stack(tokens(41)))
    assert front_end("gru")(torch.stack(tokens(41))).shape == (1, 16)


def test_no_such_pooling():
    with pytest.raises(ValueError, match="pooling is 'max'; give one of mean, gru, transformer"):
        TextFrontEnd(50, pooling="max")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_dropout_is_of_training_alone(pooling):
    model, x = front_end(pooling, dropout=0.5), torch.stack(tokens(6))
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_the_summary_counts_tokens():
    model = front_end("mean", vocabulary=600)
    x = torch.tensor([[5, 5, 5 + SUMMARY, 9], [EMPTY, PAD, PAD, PAD], [PAD] * 4])
    actual = model.summary(x)
    expected = np.zeros((3, SUMMARY))
    expected[0, 5], expected[0, 9], expected[1, EMPTY] = np.log(4), np.log(2), np.log(2)
    lengths = np.sqrt(np.square(expected).sum(1, keepdims=True))
    expected = expected / np.maximum(lengths, 1e-12) * np.sqrt(SUMMARY)
    assert actual.shape == (3, model.summary_features)
    # Of a logarithm, a length, a quotient and a product, each rounded once.
    np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(np.float32).eps, atol=0)
    assert torch.equal(model.summary(nn.functional.pad(x, (0, 5))), actual)


# Models on it.


def classifier(reader: TextReader, pooling: str) -> Classifier:
    torch.manual_seed(0)
    text = TextFrontEnd(reader.token_count, 32, pooling, max_tokens=40)
    return Classifier(FrontEncoder(text, Encoder(32, (32, 16))), len(TOPICS))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_classifier_learns_and_is_saved(reader, pooling, tmp_path):
    texts, labels = sentences(400, seed=1)
    items, rows = Items(reader, texts), np.arange(400)
    model = classifier(reader, pooling)
    trainer = Trainer(model, lr=3e-3, loss="cross_entropy", seed=0)
    validation = make_loader(items, rows[300:], labels)
    trainer.fit(make_loader(items, rows[:300], labels, seed=0), epochs=12, validation_data=validation, verbose=False)
    assert trainer.evaluate(validation)["accuracy"] > 0.9  # a guess is right once in three
    model.eval()
    model.save_pretrained(tmp_path, preprocessing=reader.to_dict())
    loaded, preprocessing = load_with_preprocessing(tmp_path)
    again = Items(reader_from_dict(preprocessing), texts[300:])
    np.testing.assert_array_equal(encode_items(loaded, again), encode_items(model, Items(reader, texts[300:])))
    assert encode_items(loaded.encoder, again).shape == (100, 16)


def test_an_autoencoder_learns_the_summary(reader, tmp_path):
    torch.manual_seed(0)
    texts, _ = sentences(400, seed=2)
    items, rows = Items(reader, texts), np.arange(400)
    model = AutoEncoder(FrontEncoder(reader.front_end(), Encoder(128, (64, 16))))
    validation = make_loader(items, rows[300:], model.encoder.summary)
    target = torch.cat([y for _, y in validation])
    seen = torch.cat([y for _, y in make_loader(items, rows[:300], model.encoder.summary)])
    trainer = Trainer(model, lr=3e-3, seed=0)
    trainer.fit(make_loader(items, rows[:300], model.encoder.summary, seed=0), epochs=20, verbose=False)
    assert trainer.evaluate(validation)["loss"] < 0.8 * (target - seen.mean(0)).square().mean()
    model.save_pretrained(tmp_path)
    assert torch.equal(fastenc.AutoEncoder.from_pretrained(tmp_path)(x := reader.batch([items[0][1]])), model.eval()(x))


def test_the_block_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "applications" / "language.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "(4, 16)\n"
