"""Training: Trainer, its callbacks, schedules and checkpoints, and the History that comes out."""

from .callbacks import Callback, EarlyStopping, History
from .checkpoint import CheckpointError
from .find_lr import LearningRates
from .model_checkpoint import ModelCheckpoint
from .schedules import Cosine, OneCycle, Plateau, Schedule, StepDecay, StepwiseTorchSchedule, TorchSchedule, WarmUp
from .tracking import CSVLogger, MLflow, TensorBoard, WandB
from .trainer import Trainer

__all__ = [
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "Cosine",
    "EarlyStopping",
    "History",
    "LearningRates",
    "MLflow",
    "ModelCheckpoint",
    "OneCycle",
    "Plateau",
    "Schedule",
    "StepDecay",
    "StepwiseTorchSchedule",
    "TensorBoard",
    "TorchSchedule",
    "Trainer",
    "WandB",
    "WarmUp",
]
