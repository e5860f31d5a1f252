"""The letters of DNA, RNA and protein, what an ambiguous letter stands for, and which of the three sequences are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..data import DataError

GAPS = "-."  # what an alignment puts between letters
_GAP, _UNKNOWN = 254, 255  # codes that no letter has


@dataclass(frozen=True)
class Alphabet:
    """The letters of one kind of sequence, in IUPAC's notation.

    Attributes:
        name: "dna", "rna" or "protein".
        letters: each is a channel. A nucleotide's complement is the one at the same place from the end.
        stands_for: any other letter -> those of `letters` that it may be, each as likely.
    """

    name: str
    letters: str
    stands_for: dict[str, str]

    @property
    def nucleotides(self) -> bool:
        return len(self.letters) == 4

    @property
    def symbols(self) -> str:
        """All letters that can be read; the code of one is its place here, from 1. 0 is padding."""
        return self.letters + "".join(self.stands_for)

    def distributions(self) -> list[list[float]]:
        """[codes, channels]: how likely a code is each of `letters`; nothing for padding."""
        rows = [[0.0] * len(self.letters)]
        for symbol in self.symbols:
            meant = self.stands_for.get(symbol, symbol)
            rows.append([1 / len(meant) if letter in meant else 0.0 for letter in self.letters])
        return rows

    @cached_property
    def _codes(self) -> np.ndarray:
        """uint8 [256]: byte -> code."""
        codes = np.full(256, _UNKNOWN, np.uint8)
        codes[[ord(gap) for gap in GAPS]] = _GAP
        for code, symbol in enumerate(self.symbols, 1):
            codes[[ord(symbol), ord(symbol.lower())]] = code
        return codes

    def encode(self, sequence: str, what: str) -> np.ndarray:
        """uint8 [letters]: the codes of capital or small letters, without gaps.

        Args:
            what: for messages, the subject of a sentence: "record seq1".

        Raises:
            DataError: a letter that is not of this alphabet, or no letters.
        """
        # What is not ASCII becomes one "?" each, which no alphabet has.
        codes = self._codes[np.frombuffer(sequence.encode("ascii", "replace"), np.uint8)]
        unknown = codes == _UNKNOWN
        if unknown.any():
            place = int(unknown.argmax())
            raise DataError(
                f"{what} has {sequence[place]!r} at position {place + 1}, and {TITLES[self.name]} is written in "
                f"{self.symbols}, in capital or small letters, and {' and '.join(GAPS)} for gaps; correct it or leave "
                "it out"
            )
        codes = codes[codes != _GAP]
        if not len(codes):
            raise DataError(f"{what} has no letters; leave it out")
        return codes


def _nucleotides(name: str, letters: str, other: str) -> Alphabet:
    """`other` is what the last of `letters` is called in the other kind of nucleic acid: the same base pair."""
    either = {"R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"}
    either |= {"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"}
    here = {symbol: meant.replace("T", letters[-1]) for symbol, meant in either.items()}
    return Alphabet(name, letters, {**here, other: letters[-1]})


_AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# Selenocysteine (U) and pyrrolysine (O) are too rare to learn of: they are read as what they were made from. A stop is
# a letter of its own, which X does not stand for.
_PROTEIN = Alphabet(
    "protein", _AMINO_ACIDS + "*", {"B": "DN", "Z": "EQ", "J": "IL", "X": _AMINO_ACIDS, "U": "C", "O": "K"}
)
ALPHABETS = {each.name: each for each in (_nucleotides("dna", "ACGT", "U"), _nucleotides("rna", "ACGU", "T"), _PROTEIN)}
TITLES = {"dna": "DNA", "rna": "RNA", "protein": "protein"}

_OF_NUCLEOTIDES = set(ALPHABETS["dna"].symbols)
_OF_PROTEIN_ALONE = set(_PROTEIN.symbols) - _OF_NUCLEOTIDES
_COMMON = "ACGTUN"  # what nucleotides are mostly written in; a quarter of a protein's letters are among them
_ENOUGH = 12  # letters that tell: in a protein, 9 of 10 among those six are then rarer than 1 in 100,000


def find_alphabet(named: Iterable[tuple[str, str]]) -> str:
    """Whether sequences are "dna", "rna" or "protein".

    Nearly all nucleotides' letters are amino acids' as well. So a sequence is taken for nucleotides if it has 12
    letters or more, and 9 in 10 of them are A, C, G, T, U or N; for a protein if it is not, and has a letter that
    nucleotides have not. Where neither says anything, as in short peptides, all letters together decide: nucleotides if
    at least half of them are of those six. RNA has U and no T.

    Args:
        named: (what, sequence), `what` the subject of a sentence.

    Raises:
        DataError: some are one kind and some another.
    """
    first: dict[str, str] = {}  # kind -> what is the first of it
    with_letter: dict[str, str] = {}
    common = letters = 0
    for what, sequence in named:
        counts = Counter(sequence.upper())
        here = sum(counts.values()) - sum(counts[gap] for gap in GAPS)
        of_six = sum(counts[letter] for letter in _COMMON)
        common, letters = common + of_six, letters + here
        if here >= _ENOUGH and of_six >= 0.9 * here:
            first.setdefault("nucleotides", what)
        elif _OF_PROTEIN_ALONE & set(counts):
            first.setdefault("protein", what)
        for letter in "TU":
            if counts[letter]:
                with_letter.setdefault(letter, what)
    if len(first) == 2:
        raise DataError(
            f"{first['nucleotides']} reads as DNA or RNA and {first['protein']} as protein; train on one kind at a time"
        )
    if "protein" in first or ("nucleotides" not in first and common < letters / 2):
        return "protein"
    if len(with_letter) == 2:
        t, u = with_letter["T"], with_letter["U"]
        whose = f"{t} has both T, of DNA, and U, of RNA" if t == u else f"{t} has T, of DNA, and {u} has U, of RNA"
        raise DataError(f'{whose}; train on one kind, or say SequenceReader(alphabet="dna"), which reads U as T')
    return "rna" if "U" in with_letter else "dna"
