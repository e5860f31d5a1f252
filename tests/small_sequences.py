"""Sequences of random letters, their batches and their front ends, for the tests of the front end of sequences."""

import numpy as np
import torch

from fastenc.frontends.alphabets import ALPHABETS
from fastenc.frontends.sequences import SequenceFrontEnd, SequenceReader


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
