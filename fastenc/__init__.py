"""fastenc: fused Dense + bias + activation layers, encoders and their training for PyTorch."""

from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .explain import explain
from .functional import encoder, fused_dense
from .modules import FusedDense
from .ops import use_backend
from .pretrained import ModelFileError, load_preprocessing, load_pretrained
from .training import Callback, EarlyStopping, History, Trainer
from .tune import tune

__version__ = "0.1.0"

__all__ = [
    "AutoEncoder",
    "Callback",
    "Classifier",
    "EarlyStopping",
    "Encoder",
    "FusedDense",
    "History",
    "ModelFileError",
    "Regressor",
    "Trainer",
    "encoder",
    "explain",
    "fused_dense",
    "load_preprocessing",
    "load_pretrained",
    "tune",
    "use_backend",
]
