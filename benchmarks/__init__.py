"""fastenc against eager PyTorch and others: one file per question, all asked by `fastenc bench`."""

from . import dense, encoder, fit

QUESTIONS = (dense.QUESTION, encoder.QUESTION, fit.QUESTION)
