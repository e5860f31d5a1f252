"""Generated promoters, with boxes at known places, and what only looks like them: the data of motifs.py.

    python examples/planted_motifs.py promoters.fasta       # then: fastenc train promoters.fasta --target label

The background is a Markov chain of the human genome's dinucleotides. A promoter has a TATA box, drawn from its position
frequencies, and an initiator (Inr) so that the first T of the box is 28 to 33 letters before the initiator's A, which
is where transcription begins. One third of what is no promoter is background alone, one third has the letters of both
boxes shuffled within each, and one third has both boxes, too near to each other or too far.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LETTERS = "ACGT"
LENGTH = 160
KINDS = ("promoter", "background", "shuffled boxes", "wrong distance")

# Bucher (1990), J. Mol. Biol. 212:563-578, counts as in JASPAR POL012.1, columns 2 to 9, and POL002.1; rows A C G T.
TATA = np.array(
    [
        [16, 352, 3, 354, 268, 360, 222, 155],
        [46, 0, 10, 0, 0, 3, 2, 44],
        [18, 2, 2, 5, 0, 10, 44, 157],
        [309, 35, 374, 30, 121, 6, 121, 33],
    ]
)
INITIATOR = np.array(
    [
        [49, 0, 288, 26, 77, 67, 45, 50],
        [48, 303, 0, 81, 95, 118, 85, 96],
        [69, 0, 0, 116, 0, 46, 73, 56],
        [137, 0, 15, 80, 131, 72, 100, 101],
    ]
)
BOXES = {"TATA box": (TATA / TATA.sum(0)).T, "initiator": (INITIATOR / INITIATOR.sum(0)).T}  # [columns, letters]
WIDTH = 8  # of both
START = 2  # the initiator's column of the A where transcription begins
# Letters from the first T of the box to that A: about 30, after Ponjavic et al. (2006), Genome Biology 7:R78.
RIGHT = np.arange(28, 34)
WRONG = np.concatenate([np.arange(14, 23), np.arange(41, 50)])

# Per cent of dinucleotides, first letter down, second across, of both strands of the human genome, rounded: 41% G or C,
# and a quarter of the CG that these would give.
_PAIRS = np.array([[9.8, 5.0, 7.0, 7.7], [7.3, 5.2, 1.0, 7.0], [5.9, 4.3, 5.2, 5.0], [6.5, 5.9, 7.3, 9.8]])
TRANSITIONS = _PAIRS / _PAIRS.sum(1, keepdims=True)
SINGLE = _PAIRS.sum(1) / _PAIRS.sum()


@dataclass(frozen=True)
class Planted:
    """Sequences of LENGTH letters.

    letters   int64 [rows, LENGTH], places in LETTERS
    kinds     int64 [rows], places in KINDS; 0 is a promoter
    starts    int64 [rows, 2], of the box and the initiator; -1 where there are none
    """

    letters: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray

    def texts(self) -> list[str]:
        return ["".join(row) for row in np.array(list(LETTERS))[self.letters]]

    def inside(self) -> np.ndarray:
        """bool [rows, LENGTH]: the planted positions."""
        place = np.arange(LENGTH) - self.starts[:, :, None]
        return ((place >= 0) & (place < WIDTH) & (self.starts[:, :, None] >= 0)).any(1)


def background(rows: int, random: np.random.Generator) -> np.ndarray:
    """int64 [rows, LENGTH] of the Markov chain."""
    draws = random.random((LENGTH, rows, 1))
    letters = np.empty((LENGTH, rows), np.int64)
    letters[0] = (draws[0] > SINGLE.cumsum()[:-1]).sum(1)
    for place in range(1, LENGTH):
        letters[place] = (draws[place] > TRANSITIONS.cumsum(1)[letters[place - 1], :-1]).sum(1)
    return letters.T.copy()


def make(rows: int, seed: int) -> Planted:
    """Half of them promoters, a sixth of each other kind, in random order."""
    random = np.random.default_rng(seed)
    letters = background(rows, random)
    kinds = random.permutation(np.where(np.arange(rows) % 2 == 0, 0, 1 + np.arange(rows) // 2 % 3))
    distance = np.where(kinds == 3, random.choice(WRONG, rows), random.choice(RIGHT, rows))
    first = random.integers(0, LENGTH - (distance - START + WIDTH) + 1)
    starts = np.stack([first, first + distance - START], 1)
    for box, frequencies in enumerate(BOXES.values()):
        drawn = (random.random((rows, WIDTH, 1)) > frequencies.cumsum(1)[:, :-1]).sum(2)
        drawn = np.where((kinds == 2)[:, None], random.permuted(drawn, axis=1), drawn)
        places = starts[:, box, None] + np.arange(WIDTH)
        here = np.flatnonzero(kinds != 1)
        letters[here[:, None], places[here]] = drawn[here]
    starts[kinds == 1] = -1
    return Planted(letters, kinds, starts)


def scores_of_known(letters: np.ndarray) -> np.ndarray:
    """float64 [rows]: how a scan that knows both matrices and all distances ranks sequences, which nobody has to learn.

    The log of the odds, summed over all places, of boxes at a right distance, against none and those at a wrong one;
    the background's letters are taken for independent, and shuffled boxes are not thought of.
    """
    windows = np.lib.stride_tricks.sliding_window_view(letters, WIDTH, 1)
    box, initiator = (
        np.log(np.maximum(frequencies, 1e-3) / SINGLE)[np.arange(WIDTH), windows].sum(2)
        for frequencies in BOXES.values()
    )

    def odds(distances: np.ndarray) -> np.ndarray:
        pairs = [box[:, : -(d - START)] + initiator[:, d - START :] for d in distances]
        return np.logaddexp.reduce(np.concatenate(pairs, 1), 1) - np.log(sum(pair.shape[1] for pair in pairs))

    return odds(RIGHT) - np.logaddexp(0, odds(WRONG))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write generated promoters, and what is none, as FASTA.")
    parser.add_argument("path", type=Path, help="the FASTA file to write")
    parser.add_argument("--rows", type=int, default=4000, help="sequences (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (%(default)s)")
    args = parser.parse_args()
    planted = make(args.rows, args.seed)
    with args.path.open("w", encoding="utf-8") as file:
        for number, (text, kind) in enumerate(zip(planted.texts(), planted.kinds, strict=True), 1):
            label = "promoter" if kind == 0 else "other"
            file.write(f'>sequence{number} label={label} kind="{KINDS[kind]}"\n{text}\n')
    print(f"{args.rows} sequences of {LENGTH} letters are in {args.path}.")


if __name__ == "__main__":
    main()
