"""fastenc: fused Dense + bias + activation layers, encoders and their training for PyTorch."""

from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .functional import encoder, fused_dense
from .modules import FusedDense

__version__ = "0.1.0"

__all__ = ["AutoEncoder", "Classifier", "Encoder", "FusedDense", "Regressor", "encoder", "fused_dense"]
