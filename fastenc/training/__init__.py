"""Training: Trainer, its callbacks, and the History that comes out."""

from .callbacks import Callback, EarlyStopping, History
from .trainer import Trainer

__all__ = ["Callback", "EarlyStopping", "History", "Trainer"]
