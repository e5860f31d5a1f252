"""The front end of DNA, RNA and protein: features that padding does not change, and what models learn of them."""

import copy
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Worst
from Bio.Seq import Seq
from small_sequences import batch, make, texts
from torch.nn import functional as F

from fastenc import AutoEncoder, Classifier, Encoder, FusedDense, Trainer, explain, load_with_preprocessing
from fastenc.frontends import FrontEncoder, Items, encode_items, make_loader, reader_from_dict
from fastenc.frontends.alphabets import ALPHABETS
from fastenc.frontends.sequences import SequenceFrontEnd, SequenceReader, kmer_composition

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = (
    {"alphabet": "dna"},
    {"alphabet": "dna", "widths": (3,), "filters": (5,), "kmer": 2},
    {"alphabet": "rna", "widths": (4, 2, 3), "filters": (6, 5, 4), "pool": 3, "kmer": 3, "both_strands": True},
    {"alphabet": "protein", "widths": (7, 3), "filters": (8, 4), "pool": 1, "kmer": 1},
)


def assert_same_features(actual, expected, front_end, x):
    """By the error rule, beside what float64 makes of `x`."""
    worst = Worst()
    with torch.no_grad():
        exact = make(**front_end.get_config()).double()
        exact.load_state_dict(front_end.state_dict())
        # The table's thirds are those of float32, as in the other two.
        worst.add({"features": actual}, {"features": expected}, {"features": exact(x)})
    worst.check()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_changes_nothing(options):
    front_end = make(**options)
    reader = SequenceReader(options["alphabet"])
    arrays = [reader.read(text) for text in texts(options["alphabet"], (1, 2, 3, 5, 13, 40, 97))]
    together = reader.batch(arrays)
    assert together.shape == (7, 97)
    with torch.no_grad():
        features, summaries = front_end(together), front_end.summary(together)
        wider = front_end(F.pad(together, (0, 30)))
        for row, array in enumerate(arrays):
            alone = reader.batch([array])
            expected = front_end(alone)
            assert_same_features(features[row : row + 1], expected, front_end, alone)
            assert_same_features(wider[row : row + 1], expected, front_end, alone)
            torch.testing.assert_close(summaries[row : row + 1], front_end.summary(alone))
    assert features.shape == (7, front_end.out_features)
    assert summaries.shape == (7, front_end.summary_features)
    assert features.isfinite().all()
    assert summaries.isfinite().all()
    assert summaries[-1].std() > 0.05
    assert (summaries.abs() < 5).all()


def test_padding_has_no_gradient_and_no_maximum():
    """With a bias that fires on nothing, padding is as loud as it can be."""
    front_end = make(alphabet="dna", widths=(5, 3), filters=(4, 4), pool=2)
    with torch.no_grad():
        for layer in front_end.scan:
            layer.weight.fill_(-1)
            layer.bias.fill_(4)
    x = batch("dna", "ACGTACG", "A" * 40)
    letters = front_end.letters(x).requires_grad_()
    features = front_end.of_letters(letters, x != 0)
    features[0].sum().backward()
    assert letters.grad[0, :7].any()
    assert not letters.grad[0, 7:].any()
    assert not letters.grad[1].any()
    # In a window of the first layer are 3 letters at the ends, more elsewhere: 4 - 3 is left of the bias at most.
    assert features[0, :4].tolist() == [1.0] * 4


def test_a_layer_is_a_convolution():
    front_end = make(alphabet="dna", widths=(6,), filters=(5,))
    x = batch("dna", *texts("dna", (20, 20)))
    (layer,) = front_end.scan
    assert isinstance(layer, FusedDense)
    with torch.no_grad():
        padded = F.pad(front_end.letters(x).double().transpose(1, 2), (3, 2))
        seen = F.conv1d(padded, layer.weight.double().view(5, 4, 6), layer.bias.double()).relu()
        exact = torch.cat([seen.amax(2), seen.mean(2)], 1)
        eager = F.conv1d(padded.float(), layer.weight.view(5, 4, 6), layer.bias).relu()
        worst = Worst()
        worst.add({"": front_end(x)}, {"": torch.cat([eager.amax(2), eager.mean(2)], 1)}, {"": exact})
    worst.check()
    assert len(explain(front_end, x).decisions) == 1


@pytest.mark.parametrize(
    ("k", "alphabet"), [(1, "dna"), (2, "dna"), (3, "rna"), (4, "dna"), (5, "dna"), (2, "protein")]
)
def test_kmer_composition_counts_words(k, alphabet):
    letters = ALPHABETS[alphabet].letters
    random = np.random.default_rng(k)
    sequences = ["".join(random.choice(list(letters), length)) for length in (k - 1 or 1, k, 7, 60)]
    front_end = make(alphabet=alphabet)
    x = batch(alphabet, *sequences)
    actual = kmer_composition(front_end.letters(x), x != 0, k)
    for row, sequence in zip(actual.exp() * 2 - 1, sequences, strict=True):
        words = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
        expected = [
            words.count("".join(word)) * len(letters) ** k / max(1, len(words)) for word in product(letters, repeat=k)
        ]
        # log1p, log 2 and exp round to within some parts of 2**-23 of what is at most 2 * (1 + 4**5).
        np.testing.assert_allclose(row, expected, atol=2**-20 * (1 + len(letters) ** k))
    if k == 2 and alphabet == "dna":
        x = batch(alphabet, "AN", "RC")
        share = (kmer_composition(front_end.letters(x), x != 0, k).exp() * 2 - 1) / 16
        words = ["".join(word) for word in product(letters, repeat=2)]
        for row, meant in zip(share, (("AA", "AC", "AG", "AT"), ("AC", "GC")), strict=True):
            expected = [1 / len(meant) if word in meant else 0 for word in words]
            np.testing.assert_allclose(row, expected, atol=2**-20)


@pytest.mark.parametrize("kmer", [0, 3])
def test_both_strands_are_one(kmer):
    options = {"alphabet": "dna", "widths": (5, 4), "filters": (6, 4), "pool": 1, "kmer": kmer, "both_strands": True}
    front_end = make(**options)
    sequences = texts("dna", (30, 4, 17))
    x = batch("dna", *(text.replace("U", "T") for text in sequences))
    opposite = batch("dna", *(str(Seq(text.replace("U", "T")).reverse_complement()) for text in sequences))
    with torch.no_grad():
        assert_same_features(front_end(opposite), front_end(x), front_end, x)
        torch.testing.assert_close(front_end.summary(opposite), front_end.summary(x))
        one = make(**{**options, "both_strands": False})
        one.load_state_dict(front_end.state_dict())
        worst = Worst()
        mean = [(side(x) + side(opposite)) / 2 for side in (one, copy.deepcopy(one).double())]
        worst.add({"": front_end(x)}, {"": mean[0]}, {"": mean[1]})
        worst.check()
        assert not torch.equal(one(x), one(opposite))


def test_shorter_than_the_motif():
    front_end = make(alphabet="dna", kmer=3)
    features = front_end(batch("dna", "A", "C"))
    assert features.shape == (2, 128 + 64)
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphabet": "xna"}, "there is no alphabet 'xna'"),
        ({"filters": (8,)}, "make no layers; give as many filters as widths"),
        ({"filters": (), "widths": ()}, "make no layers"),
        ({"widths": (0, 3)}, "make no layers"),
        ({"pool": 0}, "make no layers"),
        ({"kmer": 7}, "kmer 7 makes 16384 words of 4 letters; give 0 or more letters that make at most 4096"),
        ({"kmer": -1}, "kmer -1 makes"),
        ({"alphabet": "protein", "both_strands": True}, "protein has one strand; leave both_strands out"),
    ],
)
def test_what_makes_no_front_end(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SequenceFrontEnd(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    front_end = make(alphabet="protein", kmer=1).to(dtype)
    features = front_end(batch("protein", "MKVLA", "G"))
    assert features.dtype == dtype
    assert features.isfinite().all()


# Models.


def planted(rows, seed, length=60):
    """Half of them with TATAAA somewhere, the others with its letters in another order."""
    random = np.random.default_rng(seed)
    texts, labels = [], np.arange(rows) % 2
    for label in labels:
        letters = random.choice(list("ACGT"), random.integers(length - 20, length + 1))
        start = random.integers(0, len(letters) - 5)
        letters[start : start + 6] = list("TATAAA" if label else random.permutation(list("TTAAAA")))
        texts.append("".join(letters))
    return texts, torch.from_numpy(labels)


def test_classifier_finds_planted_motifs(tmp_path):
    sequences, labels = planted(600, 0)
    reader = SequenceReader().fit(sequences)
    items = Items(reader, sequences)
    torch.manual_seed(0)
    front_end = SequenceFrontEnd("dna", filters=(16,), widths=(8,))
    model = Classifier(FrontEncoder(front_end, Encoder(front_end.out_features, (16,))), 2)
    trainer = Trainer(model, lr=1e-2, loss="cross_entropy", seed=0)
    rows = np.arange(600)
    trainer.fit(make_loader(items, rows[:450], labels, seed=0), epochs=12, verbose=False)
    found = trainer.evaluate(make_loader(items, rows[450:], labels))
    # A row without the motif has it by chance in one of 75 (60 places, 4**6 words); one order of 15 is the motif's.
    assert found["accuracy"] > 0.85
    model.eval().save_pretrained(tmp_path, preprocessing=reader.to_dict())
    loaded, preprocessing = load_with_preprocessing(tmp_path)
    again = Items(reader_from_dict(preprocessing), sequences[:20])
    np.testing.assert_array_equal(encode_items(loaded, again), encode_items(model, Items(reader, sequences[:20])))


@pytest.mark.parametrize("alphabet", ["dna", "protein"])
def test_autoencoder_learns_the_summary(alphabet, tmp_path):
    sequences = texts(alphabet, (30, 9, 1, 50) * 4)
    reader = SequenceReader(alphabet).fit(sequences)
    items = Items(reader, sequences)
    torch.manual_seed(0)
    front_end = reader.front_end()
    encoder = FrontEncoder(front_end, Encoder(front_end.out_features, (32, 8)))
    model = AutoEncoder(encoder)
    loader = make_loader(items, np.arange(len(items)), encoder.summary, batch_size=8, seed=0)
    history = Trainer(model, lr=1e-2, seed=0).fit(loader, epochs=15, verbose=False).history["loss"]
    assert history[-1] < history[0] / 2
    model.eval().save_pretrained(tmp_path, preprocessing=reader.to_dict())
    loaded, preprocessing = load_with_preprocessing(tmp_path)
    np.testing.assert_array_equal(
        encode_items(loaded.encoder, Items(reader_from_dict(preprocessing), sequences)), encode_items(encoder, items)
    )


def test_the_blocks_of_the_docs_run(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "applications" / "biology.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert "(6, 16)" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"some.fasta", "model"}
