"""DNA, RNA and protein: what each letter means, which alphabet a text is in, and what is no letter of it."""

import re

import pytest
import torch
from Bio.Data import IUPACData
from small_sequences import batch, make

from fastenc.data import DataError
from fastenc.frontends.alphabets import ALPHABETS
from fastenc.frontends.fasta import Record
from fastenc.frontends.sequences import SequenceReader

pytestmark = pytest.mark.usefixtures("one_thread")

IUPAC = {
    "dna": IUPACData.ambiguous_dna_values,
    "rna": IUPACData.ambiguous_rna_values,
    "protein": IUPACData.extended_protein_values,
}


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
