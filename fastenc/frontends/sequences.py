"""Sequences of DNA, RNA or protein: read from FASTA, scanned for motifs, counted by k-mers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError
from ..modules import FusedDense
from .alphabets import ALPHABETS, find_alphabet
from .base import FrontEnd
from .fasta import SUFFIXES, Record, find_records, labels_in_descriptions, parse_fasta
from .reader import Collection, Reader

_MOST_KMERS = 4096


class SequenceReader(Reader):
    """Records of FASTA to codes: uint8 [letters], the letter's place in its alphabet from 1.

    Capital and small letters are the same, and so are T and U, which are one base. Gaps are left out: the sequence is
    what is between them. A letter that stands for several is a code of its own, which the front end takes for all of
    them.

    Args:
        alphabet: "dna", "rna" or "protein"; None: `fit` finds out.
        longest: letters of the longest sequence that was fitted.

    Raises:
        ValueError: an unknown alphabet.
    """

    kind = "sequence"
    suffixes = SUFFIXES

    def __init__(self, alphabet: str | None = None, longest: int = 0) -> None:
        if alphabet is not None:
            _check_alphabet(alphabet)
        self.alphabet = alphabet
        self.longest = longest

    @classmethod
    def collect(cls, path: Path, target: str | None = None, column: str | None = None) -> Collection:
        """The records of a FASTA file, or of all in a folder, packed by gzip (.gz) or not.

        Args:
            target: the key of the labels in the records' descriptions: `label` where these are `>id label=promoter`.
                None: the class is the folder of the file, or the file's name; see `find_records`.
        """
        records, files, labels = find_records(path)
        if target is not None:
            labels = labels_in_descriptions(records, target)
        alone = len(set(files)) == 1
        names = [r.name if alone else f"{file}: {r.name}" for r, file in zip(records, files, strict=True)]
        return Collection(cls.kind, str(path), records, names, labels)

    def fit(self, items: Sequence[Any]) -> SequenceReader:
        """Find the alphabet, unless it was given, and the longest sequence.

        Raises:
            DataError: sequences of several kinds, or as `read`.
        """
        if not len(items):
            raise DataError("there are no sequences to learn the alphabet from; give at least one")
        if self.alphabet is None:
            self.alphabet = find_alphabet(_named(item) for item in items)
        self.longest = max(len(self.read(item)) for item in items)
        return self

    def read(self, item: Any) -> np.ndarray:
        """A Record, a sequence as text, or FASTA of one record, as text or bytes: uint8 [letters].

        Raises:
            DataError: letters of another alphabet, none, or not one record; the message names record and position.
            ValueError: the reader knows no alphabet yet.
        """
        what, sequence = _named(item)
        return ALPHABETS[self._known()].encode(sequence, what)

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """int64 [items, letters of the longest], 0 after a sequence's end."""
        x = np.zeros((len(arrays), max(map(len, arrays))), np.int64)
        for row, array in zip(x, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(x)

    def front_end(self) -> SequenceFrontEnd:
        """Two layers, motifs and what is near them, and k-mers: of 3 nucleotides or 1 amino acid."""
        nucleotides = ALPHABETS[self._known()].nucleotides
        pool = 4 if nucleotides else 2
        motif = min(11 if nucleotides else 7, max(1, self.longest))
        near = min(9, max(1, -(-self.longest // pool)))
        return SequenceFrontEnd(self._known(), widths=(motif, near), pool=pool, kmer=3 if nucleotides else 1)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self._known(), "longest": self.longest}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> SequenceReader:
        return cls(state["alphabet"], state["longest"])

    def _known(self) -> str:
        if self.alphabet is None:
            raise ValueError('the reader knows no alphabet yet; call fit, or give SequenceReader(alphabet="dna")')
        return self.alphabet


def _named(item: Any) -> tuple[str, str]:
    """What messages call an item, and its letters."""
    if isinstance(item, str) and not item.lstrip().startswith(">"):
        return "the sequence", "".join(item.split())
    if not isinstance(item, Record):
        if not isinstance(item, (str, bytes)):
            raise DataError(f"a sequence is text, bytes of FASTA or a Record, not {type(item).__name__}; give one")
        records = parse_fasta(item.strip().encode() if isinstance(item, str) else item)
        if len(records) > 1:
            raise DataError(
                f"the FASTA text holds {len(records)} records and one is read at a time; take each from parse_fasta"
            )
        item = records[0]
    return f"record {item.name}", item.sequence


def _check_alphabet(name: str) -> None:
    if name not in ALPHABETS:
        raise ValueError(f"there is no alphabet {name!r}; the known ones are {', '.join(ALPHABETS)}")


class SequenceFrontEnd(FrontEnd):
    """Sequences int64 [B, L], codes of `SequenceReader` with 0 after the end -> [B, out_features].

    Each letter is a distribution over the alphabet's channels: one for a plain letter, several for an ambiguous one, so
    that N is a quarter of each nucleotide. A layer is a FusedDense with relu that slides over windows of `width`
    positions: its weight row, `[channels, width]`, is a motif to be looked for, and zeros stand beyond the ends. The
    next layer looks at the maxima of `pool` positions each, so that it sees `width * pool` of them. Of each layer the
    maximum and the mean over the positions are features: whether a motif is there, and how much of it.

    Args:
        alphabet: "dna", "rna" or "protein".
        filters: motifs of each layer.
        widths: positions in a window of each layer.
        pool: positions of a layer that are one of the next. A window of a layer after the first then has
            `filters * width` numbers for each of them, which training keeps.
        kmer: also join how often each word of this many letters comes, as log(1 + its share times the number of
            words) - log 2: 0 if all words are equally frequent. 0: none.
        both_strands: the features are the mean of those of the sequence and of its reverse complement, so that both
            give the same. Nucleotides only; twice the work.

    Raises:
        ValueError: numbers that make no front end, or both strands of proteins.
    """

    kind = "sequence"
    table: Tensor

    def __init__(
        self,
        alphabet: str = "dna",
        filters: Sequence[int] = (32, 32),
        widths: Sequence[int] = (11, 9),
        pool: int = 4,
        kmer: int = 0,
        both_strands: bool = False,
    ) -> None:
        super().__init__()
        _check_alphabet(alphabet)
        of = ALPHABETS[alphabet]
        channels = len(of.letters)
        if len(filters) != len(widths) or not filters or min(*filters, *widths, pool) < 1:
            raise ValueError(
                f"filters {tuple(filters)}, widths {tuple(widths)} and pool {pool} make no layers; give as many "
                "filters as widths, all at least 1"
            )
        if kmer < 0 or channels**kmer > _MOST_KMERS:
            raise ValueError(
                f"kmer {kmer} makes {channels ** max(kmer, 0)} words of {channels} letters; give 0 or more letters "
                f"that make at most {_MOST_KMERS}"
            )
        if both_strands and not of.nucleotides:
            raise ValueError(f"{alphabet} has one strand; leave both_strands out")
        self.alphabet = alphabet
        self.filters, self.widths = tuple(filters), tuple(widths)
        self.pool, self.kmer, self.both_strands = pool, kmer, both_strands
        self.register_buffer("table", torch.tensor(of.distributions()))
        self.scan = nn.ModuleList(
            FusedDense(before * width, after)
            for before, width, after in zip((channels, *filters), widths, filters, strict=False)
        )
        self.summary_kmer = 3 if of.nucleotides else 1
        self.summary_features = channels**self.summary_kmer
        self.out_features = 2 * sum(filters) + (channels**kmer if kmer else 0)

    def get_config(self) -> dict[str, Any]:
        return {
            "alphabet": self.alphabet,
            "filters": list(self.filters),
            "widths": list(self.widths),
            "pool": self.pool,
            "kmer": self.kmer,
            "both_strands": self.both_strands,
        }

    def letters(self, x: Tensor) -> Tensor:
        """int64 [B, L] -> [B, L, channels]: how likely each letter is each of the alphabet's; nothing for padding."""
        return F.embedding(x, self.table)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_letters(self.letters(x), x != 0)

    def of_letters(self, letters: Tensor, there: Tensor) -> Tensor:
        """The features, of what gradients can be taken of, for attribution.

        Args:
            letters: [B, L, channels], as `letters` gives them.
            there: bool [B, L], False for padding, which is after a sequence's end and is not looked at.
        """
        letters = letters.masked_fill(~there[..., None], 0)  # a baseline of attribution may say more there
        if self.both_strands:
            letters = torch.cat([letters, reverse_complement(letters, there)])
            there = torch.cat([there, there])
        parts = []
        seen, at = letters, there
        for number, (layer, width) in enumerate(zip(self.scan, self.widths, strict=True)):
            if number:
                seen, at = _maxima(seen, at, self.pool)
            # The bias speaks where nothing is, and relu leaves nothing below zero: zeros are no maxima there.
            seen = layer(_windows(seen, width)).masked_fill(~at[..., None], 0)
            mean = seen.sum(1, dtype=_wide(seen)) / at.sum(1, keepdim=True).clamp(min=1)
            parts += [seen.amax(1), mean.to(seen.dtype)]
        if self.kmer:
            parts.append(kmer_composition(letters, there, self.kmer).to(seen.dtype))
        features = torch.cat(parts, 1)
        return features.unflatten(0, (2, -1)).mean(0) if self.both_strands else features

    @torch.no_grad()
    def summary(self, x: Tensor) -> Tensor:
        """How often each word of 3 nucleotides, or each amino acid, comes: as `kmer` joins them."""
        letters, there = self.letters(x), x != 0
        of_one = kmer_composition(letters, there, self.summary_kmer)
        if not self.both_strands:
            return of_one
        return (of_one + kmer_composition(reverse_complement(letters, there), there, self.summary_kmer)) / 2


def _wide(values: Tensor) -> torch.dtype:
    """Where long sums are made."""
    return torch.promote_types(values.dtype, torch.float32)


def _windows(values: Tensor, width: int) -> Tensor:
    """[B, L, C] -> [B, L, C * width]: what is within `width` around each position, zeros beyond the ends."""
    before = width // 2
    return F.pad(values, (0, 0, before, width - 1 - before)).unfold(1, width, 1).flatten(2)


def _maxima(values: Tensor, there: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """The maxima of each `pool` positions of values [B, L, C] that are not negative, and where there are any."""
    missing = -values.shape[1] % pool
    values, there = F.pad(values, (0, 0, 0, missing)), F.pad(there, (0, missing))
    return values.unflatten(1, (-1, pool)).amax(2), there.unflatten(1, (-1, pool)).any(2)


def reverse_complement(letters: Tensor, there: Tensor) -> Tensor:
    """[B, L, 4] of the opposite strand, from its beginning; padding stays at the end."""
    place = there.sum(1, keepdim=True) - 1 - torch.arange(there.shape[1], device=there.device)
    turned = letters.gather(1, place.clamp(min=0)[..., None].expand_as(letters)).flip(2)
    return turned.masked_fill(~there[..., None], 0)


def kmer_composition(letters: Tensor, there: Tensor, k: int) -> Tensor:
    """[B, L, C] -> [B, C**k]: log(1 + C**k * share) - log 2 of each word of k letters among all words of a sequence.

    The words are in the order of their letters' channels, the last changing fastest. An ambiguous letter counts for
    each of its meanings by its likelihood. A sequence of fewer than k letters has no words: shares of 0.
    """
    letters = F.pad(letters.to(_wide(letters)), (0, 0, 0, max(0, k - letters.shape[1])))
    words = (there.sum(1) - k + 1).clamp(min=1)
    half = k // 2
    first = _words(letters / words[:, None, None], letters, k - half)
    if not half:
        share = first.sum(1)
    else:
        second = _words(letters, letters, half)[:, k - half :]
        # A sum over positions of the products of both halves: no position's C**k numbers are ever in memory.
        share = (first[:, : second.shape[1]].transpose(1, 2) @ second).flatten(1)
    return torch.log1p(share * share.shape[1]) - math.log(2)


def _words(first: Tensor, letters: Tensor, n: int) -> Tensor:
    """[B, L - n + 1, C**n]: the product of n letters from each position on, the first of which is of `first`."""
    words = first
    for place in range(1, n):
        words = (words[:, :-1, :, None] * letters[:, place:, None, :]).flatten(2)
    return words
