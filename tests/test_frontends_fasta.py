"""What is read of FASTA, files, folders and text, and where the labels are; and what is none."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fastenc.data import DataError
from fastenc.frontends import collect, kind_of
from fastenc.frontends.fasta import Record, parse_fasta
from fastenc.frontends.sequences import SequenceReader


def write(path, text, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


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
