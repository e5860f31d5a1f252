"""How good an encoder is, in one report: figures, a page with pictures, and JSON."""

from .evaluate import evaluate
from .report import EvaluationReport

__all__ = ["EvaluationReport", "evaluate"]
