"""fastenc: fused Dense + bias + activation layers, encoders and their training for PyTorch."""

from typing import Any

from . import dynamo
from .convert import FusionReport, fuse, fusion_report, unfuse
from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .evaluation import EvaluationReport, evaluate
from .explain import explain
from .finetuning import FineTuned, GradualUnfreezing, finetune
from .functional import encoder, fused_dense
from .loading import load_pretrained, load_with_preprocessing
from .lora import add_lora, load_lora, merge_lora, save_lora
from .modules import FusedDense
from .multitask import MultiTask, Task
from .ops import use_backend
from .plain import to_plain
from .pretrained import ModelFileError, load_preprocessing
from .training import Callback, EarlyStopping, History, Trainer
from .tune import tune

__version__ = "0.1.0"

dynamo.offer()

__all__ = [
    "AutoEncoder",
    "Callback",
    "Classifier",
    "EarlyStopping",
    "Encoder",
    "EvaluationReport",
    "FineTuned",
    "FusedDense",
    "FusionReport",
    "GradualUnfreezing",
    "History",
    "ModelFileError",
    "MultiTask",
    "Regressor",
    "Task",
    "Trainer",
    "add_lora",
    "encoder",
    "evaluate",
    "explain",
    "finetune",
    "fuse",
    "fused_dense",
    "fusion_report",
    "load_lora",
    "load_preprocessing",
    "load_pretrained",
    "load_with_preprocessing",
    "merge_lora",
    "save_lora",
    "to_plain",
    "tune",
    "unfuse",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "sklearn":  # subclasses of scikit-learn's, which is imported only where they are asked for
        import importlib

        return importlib.import_module(".sklearn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
