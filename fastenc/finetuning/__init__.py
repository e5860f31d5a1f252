"""Fine-tuning: from scratch, after pre-training without labels, or from a saved encoder; frozen, thawed or adapted."""

from .finetune import FineTuned, finetune
from .layers import GradualUnfreezing, encoder_layers, freeze_layers, layer_groups
from .pretraining import Pretraining, pretrain

__all__ = [
    "FineTuned",
    "GradualUnfreezing",
    "Pretraining",
    "encoder_layers",
    "finetune",
    "freeze_layers",
    "layer_groups",
    "pretrain",
]
