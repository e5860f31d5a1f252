"""fastenc against eager PyTorch and others: one file per question, all asked by `fastenc bench`."""

from . import dense, encoder, fit, fuse, memory, scaling, step

QUESTIONS = tuple(module.QUESTION for module in (fit, step, encoder, dense, fuse, memory, scaling))
