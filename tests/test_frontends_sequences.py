"""DNA, RNA and protein: what is read of FASTA, what each letter means, and features that padding does not change."""

import copy
import gzip
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Worst
from Bio.Data import IUPACData
from Bio.Seq import Seq
from torch.nn import functional as F

from fastenc import AutoEncoder, Classifier, Encoder, FusedDense, Trainer, explain, load_with_preprocessing
from fastenc.data import DataError
from fastenc.frontends import FrontEncoder, Items, collect, encode_items, kind_of, make_loader, reader_from_dict
from fastenc.frontends.alphabets import ALPHABETS
from fastenc.frontends.fasta import Record, parse_fasta
from fastenc.frontends.sequences import SequenceFrontEnd, SequenceReader, kmer_composition

pytestmark = pytest.mark.usefixtures("one_thread")

IUPAC = {
    "dna": IUPACData.ambiguous_dna_values,
    "rna": IUPACData.ambiguous_rna_values,
    "protein": IUPACData.extended_protein_values,
}
OPTIONS = (
    {"alphabet": "dna"},
    {"alphabet": "dna", "widths": (3,), "filters": (5,), "kmer": 2},
    {"alphabet": "rna", "widths": (4, 2, 3), "filters": (6, 5, 4), "pool": 3, "kmer": 3, "both_strands": True},
    {"alphabet": "protein", "widths": (7, 3), "filters": (8, 4), "pool": 1, "kmer": 1},
)


def make(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SequenceFrontEnd(**options)


def texts(alphabet, lengths, seed=0):
    symbols = np.array(list(ALPHABETS[alphabet].symbols))
    random = np.random.default_rng(seed)
    return ["".join(random.choice(symbols, length)) for length in lengths]


def batch(alphabet, *sequences):
    reader = SequenceReader(alphabet)
    return reader.batch([reader.read(sequence) for sequence in sequences])


def assert_same_features(actual, expected, front_end, x):
    """By the error rule, beside what float64 makes of `x`."""
    worst = Worst()
    with torch.no_grad():
        exact = make(**front_end.get_config()).double()
        exact.load_state_dict(front_end.state_dict())
        # The table's thirds are those of float32, as in the other two.
        worst.add({"features": actual}, {"features": expected}, {"features": exact(x)})
    worst.check()


def write(path, text, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


# Letters.


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_every_letter_stands_for_what_iupac_says(alphabet):
    front_end, of = make(alphabet=alphabet), ALPHABETS[alphabet]
    own = {"T": "U"} if alphabet == "rna" else {"U": "T"} if alphabet == "dna" else {"U": "C", "O": "K", "*": "*"}
    known = IUPAC[alphabet] | own
    assert set(of.symbols) == set(known) - ({"X"} if of.nucleotides else set())  # for which nucleotides have N
    for symbol in of.symbols:
        (row,) = front_end.letters(batch(alphabet, symbol))[0]
        meant = set(known[symbol])
        for letter, share in zip(of.letters, row.tolist(), strict=True):
            assert share == pytest.approx(1 / len(meant) if letter in meant else 0), symbol
    assert not front_end.letters(torch.zeros(1, 1, dtype=torch.int64)).any()


def test_small_letters_t_and_u_and_gaps():
    x = batch("dna", "ACGTNRY")
    for same in ("acgtnry", "AcGUnRy", "--AC-GTN.RY-", " ACG\nTNR Y\r\n"):
        assert torch.equal(batch("dna", same), x) or same == "AcGUnRy"
        assert torch.equal(make(alphabet="dna")(batch("dna", same)), make(alphabet="dna")(x))
    assert torch.equal(make(alphabet="rna")(batch("rna", "ACGUN")), make(alphabet="dna")(batch("dna", "ACGTN")))


def test_unknown_letters_name_record_and_position():
    record = Record("seq7", "seq7 of mine", "AC-GT7A")
    with pytest.raises(DataError, match=r"record seq7 has '7' at position 6, and DNA is written in ACGTRY.*correct it"):
        SequenceReader("dna").read(record)
    for text, letter in (("ACGé", "é"), ("AC\x00", "\\x00"), ("ACE", "E"), ("ACG*", "*"), ("A?", "?")):
        message = rf"the sequence has '{re.escape(letter)}' at position {len(text) if letter != 'E' else 3}, and"
        with pytest.raises(DataError, match=message):
            SequenceReader("dna").read(text)
    with pytest.raises(DataError, match="'1' at position 3, and protein is written in ACDEF"):
        SequenceReader("protein").read("MK1")


@pytest.mark.parametrize(
    ("sequences", "alphabet"),
    [
        (["ACGT", "acgtnn", "RYSWKMBDHVNACGTACGTA"], "dna"),
        (["ACGACGACGACC", "ACG"], "dna"),  # neither T nor U
        (["ACGU", "GGGGGGCCCCAAN"], "rna"),
        (["MKVLAAGIVGLLLAQWERTY", "GATTACA"], "protein"),  # short enough for a peptide
        (["MKV*", "MSX"], "protein"),
        (["MKVSAR", "RKDSHV"], "protein"),  # all are nucleotides' letters, few are nucleotides
        (["MCUTGE"], "protein"),  # selenocysteine
    ],
)
def test_fit_finds_the_alphabet(sequences, alphabet):
    reader = SequenceReader().fit(sequences)
    assert (reader.alphabet, reader.longest) == (alphabet, max(map(len, sequences)))
    assert reader.front_end().alphabet == alphabet


def test_fit_refuses_mixtures():
    dna, rna, protein = (
        Record("a", "a", "ACGTACGTACGTAC"),
        Record("b", "b", "ACGUACGUACGUAC"),
        Record("c", "c", "MKVLAAGIVGLLLAQWERTY"),
    )
    with pytest.raises(DataError, match="record a reads as DNA or RNA and record c as protein; train on one kind"):
        SequenceReader().fit([dna, protein])
    with pytest.raises(DataError, match="record a has T, of DNA, and record b has U, of RNA; train on one kind"):
        SequenceReader().fit([rna, dna])
    with pytest.raises(DataError, match="the sequence has both T, of DNA, and U, of RNA"):
        SequenceReader().fit(["ACGUT"])
    assert SequenceReader("dna").fit([dna, rna]).longest == 14
    with pytest.raises(DataError, match="record d has 'E' at position 15, and DNA"):
        SequenceReader().fit([dna, Record("d", "d", dna.sequence + "E")])  # a slip, and no protein


def test_nothing_to_read():
    with pytest.raises(DataError, match="there are no sequences"):
        SequenceReader().fit([])
    for empty in ("", "--", " \n"):
        with pytest.raises(DataError, match="the sequence has no letters; leave it out"):
            SequenceReader().fit([empty])
    with pytest.raises(DataError, match="record hollow has no letters"):
        SequenceReader("dna").read(b">hollow\n>other\nACGT"[:8])
    with pytest.raises(ValueError, match="the reader knows no alphabet yet; call fit"):
        SequenceReader().read("ACGT")
    with pytest.raises(DataError, match="not int; give one"):
        SequenceReader("dna").read(7)
    with pytest.raises(ValueError, match="there is no alphabet 'xna'; the known ones are dna, rna, protein"):
        SequenceReader("xna")


# FASTA.


def test_fasta_in_all_its_looks(tmp_path):
    text = ">one  a description\nACGT\nac gt\n\nAC\n>two|x\r\nGGGG\r\n>\nTTTT\n"
    expected = [
        Record("one", "one  a description", "ACGTacgtAC"),
        Record("two|x", "two|x", "GGGG"),
        Record("number 3", "", "TTTT"),
    ]
    for name, packed in (("a.fasta", False), ("a.FA.gz", True), ("other.txt", False)):
        path = write(tmp_path / name, text, packed)
        found = SequenceReader.collect(path)
        assert (found.kind, found.source, found.labels) == ("sequence", str(path), None)
        assert (list(found.items), list(found.names)) == (expected, ["one", "two|x", "number 3"])
    assert parse_fasta(text.encode()) == parse_fasta(gzip.compress(text.encode())) == expected
    assert parse_fasta(text.replace("\r", "").replace("\n", "\r").encode()) == expected
    assert parse_fasta(b"\n; a comment of old\n>a\nAC\n") == [Record("a", "a", "AC")]
    assert kind_of(str(tmp_path / "a.fasta")) == "sequence"
    assert len(collect(str(tmp_path / "a.fasta"), "sequence")) == 3


def test_reading_fasta_text_and_bytes():
    reader = SequenceReader("dna")
    codes = reader.read("ACGTN")
    assert codes.dtype == np.uint8
    for same in (
        ">a b\nACG\nTN",
        b">a b\nACG\nTN\n",
        gzip.compress(b">a\nACGTN"),
        Record("a", "a", "ACGTN"),
        " \n>a\nACGTN",
    ):
        np.testing.assert_array_equal(reader.read(same), codes)
    with pytest.raises(DataError, match="holds 2 records and one is read at a time; take each from parse_fasta"):
        reader.read(b">a\nAC\n>b\nGT\n")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"; nothing but a comment\n"])
def test_no_records(tmp_path, content):
    path = tmp_path / "empty.fasta"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty.fasta holds no sequences; give FASTA, in which"):
        SequenceReader.collect(path)


def test_what_is_no_fasta(tmp_path):
    junk = np.random.default_rng(0).bytes(4096)
    (tmp_path / "junk.fa").write_bytes(b"\x00" + junk)
    with pytest.raises(DataError, match=r"junk.fa does not begin with > and is no FASTA"):
        SequenceReader.collect(tmp_path / "junk.fa")
    with pytest.raises(DataError, match="the FASTA text does not begin with >"):
        SequenceReader("dna").read(b"ACGT")
    (tmp_path / "junk.fa").write_bytes(b">" + junk)
    with pytest.raises(DataError):
        SequenceReader().fit(SequenceReader.collect(tmp_path / "junk.fa").items)
    packed = gzip.compress(b">a\nACGT" * 1000)
    for name, content in (("a.fa.gz", b">a\nACGT"), ("b.fa.gz", packed[:-20]), ("c.fa.gz", packed[:12] + junk)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read \(.*\); give a FASTA file, or one packed by gzip"):
            SequenceReader.collect(tmp_path / name)
    with pytest.raises(DataError, match="the FASTA text cannot be unpacked"):
        parse_fasta(packed[:-20])


def test_what_unpacks_to_too_much(monkeypatch):
    monkeypatch.setattr("fastenc.frontends.fasta._MOST", 1 << 20)
    with pytest.raises(DataError, match="the FASTA text unpacks to more than 1 MiB; give fewer"):
        parse_fasta(gzip.compress(b">a\n" + b"A" * (1 << 20)))


# Labels.


def test_labels_in_descriptions(tmp_path):
    path = write(
        tmp_path / "a.fa",
        '>a label=yes n=1 w=0.5 [organism=Homo sapiens]\nAC\n>b|label=no;n=-2,w=2e3 organism="Mus musculus"\nGT\n',
    )
    for key, values in (
        ("label", ["yes", "no"]),
        ("organism", ["Homo sapiens", "Mus musculus"]),
        ("n", [1, -2]),
        ("w", [0.5, 2000.0]),
    ):
        labels = SequenceReader.collect(path, target=key).labels
        assert labels.tolist() == values
        assert labels.dtype == {"n": np.int64, "w": np.float64}.get(key, object)
    with pytest.raises(DataError, match=r"record a says nothing of abel; write abel=\.\.\. after its name"):
        SequenceReader.collect(path, target="abel")


def test_labels_of_folders_and_files(tmp_path):
    write(tmp_path / "folders" / "yes" / "a.fa", ">a\nAC\n>b\nGT\n")
    write(tmp_path / "folders" / "no" / "deep" / "c.fna.gz", ">c\nGG\n", packed=True)
    write(tmp_path / "folders" / "no" / "notes.gz", "no FASTA", packed=True)
    found = SequenceReader.collect(tmp_path / "folders")
    assert found.labels.tolist() == ["no", "yes", "yes"]
    assert list(found.names) == [str(Path("no/deep/c.fna.gz: c")), "yes/a.fa: a", "yes/a.fa: b"]
    write(tmp_path / "files" / "yes.fasta", ">a\nAC\n>b\nGT\n")
    write(tmp_path / "files" / "no.fasta.gz", ">c\nGG\n", packed=True)
    assert SequenceReader.collect(tmp_path / "files").labels.tolist() == ["no", "yes", "yes"]
    write(tmp_path / "one" / "all.faa", ">a label=x\nMKV\n")
    assert SequenceReader.collect(tmp_path / "one").labels is None
    assert SequenceReader.collect(tmp_path / "one", target="label").labels.tolist() == ["x"]
    write(tmp_path / "none" / "notes.gz", "no FASTA", packed=True)
    for folder in ("none", "empty"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.raises(DataError, match=rf"{folder} holds no files in \.fasta, \.fa"):
            SequenceReader.collect(tmp_path / folder)


# Features.


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
