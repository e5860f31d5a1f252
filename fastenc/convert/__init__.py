"""fuse(): a model's Linear layers and their activations in one kernel, in place, and back."""

from .fuse import fuse, fusion_report, unfuse
from .report import FusionReport

__all__ = ["FusionReport", "fuse", "fusion_report", "unfuse"]
