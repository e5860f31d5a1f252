"""How good an encoder is, in one report: figures, a page with pictures, and JSON."""

from .evaluate import EvaluationReport, evaluate

__all__ = ["EvaluationReport", "evaluate"]
