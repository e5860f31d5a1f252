"""Losses by name, and the check that a target fits the loss and what the model gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc.data import DataError

LossFunction = Callable[[Tensor, Tensor], Tensor]


def bce(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """F.binary_cross_entropy; but NaN where a prediction is NaN or outside 0..1, as the other losses would be.

    There PyTorch's raises on a CPU, and on a GPU ends the process's use of it.
    """
    bad = ~((prediction >= 0.0) & (prediction <= 1.0))
    value = F.binary_cross_entropy(prediction.masked_fill(bad, 0.5), target, reduction=reduction)
    return value.masked_fill(bad.any(), math.nan)


def cosine(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """1 - the cosine of the angle between prediction and target [rows, features]: the mean over the rows, or "none"."""
    losses = 1.0 - F.cosine_similarity(prediction, target, dim=1)
    return losses.mean() if reduction == "mean" else losses


def info_nce(prediction: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE (van den Oord et al., 2018), both ways: which target goes with which prediction of the batch?

    Args:
        prediction, target: vectors [rows, features]; those of one row are a pair, all other targets of the batch are
            its negatives. The loss of a single row is 0, and that of many depends on how many there are.
        temperature: divides the cosines, which are the logits.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature!r}; give a number above 0, such as 0.1")
    logits = F.normalize(prediction, dim=1) @ F.normalize(target, dim=1).T / temperature
    rows = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def triplet(prediction: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    """The triplet loss with the hardest triplets of the batch (Hermans et al., 2017).

    The mean over the anchors of relu(furthest of the same class - nearest of another + margin), by Euclidean distance.

    Args:
        prediction: vectors [rows, features].
        target: labels, int64 [rows]. Rows that have no other row of their class in the batch, or none of another class,
            are no anchors; if there is no anchor the loss is 0.
        margin: how much nearer than those of other classes the own class should be.
    """
    vectors = prediction.float() if prediction.dtype in (torch.bfloat16, torch.float16) else prediction
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    same = target[:, None] == target[None, :]
    itself = torch.eye(len(target), dtype=torch.bool, device=target.device)
    furthest = distances.masked_fill(~same | itself, -math.inf).amax(1)
    nearest = distances.masked_fill(same, math.inf).amin(1)
    anchors = (same & ~itself).any(1) & (~same).any(1)
    # Not a mean over chosen rows: their number would have to be waited for on a GPU.
    losses = torch.where(anchors, furthest - nearest + margin, 0.0).relu()
    return losses.sum() / anchors.sum().clamp(min=1)


LOSSES: dict[str, LossFunction] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
    "cross_entropy": F.cross_entropy,
    "bce": bce,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "cosine": cosine,
    "info_nce": info_nce,
    "triplet": triplet,
}
BATCH_LOSSES = ("info_nce", "triplet")  # of a whole batch, whose rows they compare; the others are means over rows
_FUNCTIONS = {function: name for name, function in LOSSES.items()} | {
    F.smooth_l1_loss: "huber",
    F.binary_cross_entropy: "bce",
}
_MODULES: dict[type, str] = {
    nn.MSELoss: "mse",
    nn.L1Loss: "mae",
    nn.HuberLoss: "huber",
    nn.SmoothL1Loss: "huber",  # with its default beta of 1 the same formula
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCELoss: "bce",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}


def get_loss(loss: str | LossFunction) -> LossFunction:
    """The function of a name in LOSSES, or `loss` itself: (prediction, target) -> the mean over the rows, 0-D."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; give one of {', '.join(LOSSES)}, or a function of (prediction, target)")
    return LOSSES[loss]


def loss_name(loss: str | LossFunction) -> str | None:
    """The name in LOSSES of what `loss` computes, or None if it is not known to be one of these.

    PyTorch's own functions and modules are known where their options are the default ones, and modules without hooks.
    """
    if isinstance(loss, str):
        return loss if loss in LOSSES else None
    if isinstance(loss, nn.Module):
        name = _MODULES.get(type(loss))
        return name if name and vars(loss) | {"training": True} == vars(type(loss)()) else None
    return next((name for function, name in _FUNCTIONS.items() if function is loss), None)


def weighted_loss(loss: str | LossFunction, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The mean over the rows of their losses, each times its weight [rows]. For what `weight_reason` lets pass."""
    name = loss_name(loss)
    assert name is not None
    losses = LOSSES[name](prediction, target, reduction="none")  # type: ignore[call-arg]
    return (losses.flatten(1).mean(1) if losses.ndim > 1 else losses).mul(weight).mean()


def weight_reason(loss: str | LossFunction) -> str | None:
    """Why rows cannot be weighted in this loss, in words; None if they can."""
    name = loss_name(loss)
    if name is None:
        return "loss is a function, which gives their mean; weigh them in the function, or give a loss by name"
    if name in BATCH_LOSSES:
        return f"loss={name!r} compares the rows of a batch with each other; leave sample_weight out"
    return None


def fit_target(target: Tensor, output: Tensor, loss: str | LossFunction, name: str) -> Tensor:
    """`target` as the loss wants it for a model that gives `output`.

    Args:
        target: [rows, ...], numbers or class labels.
        output: [any number of rows, ...], what the model gives; but for bce only its shape and dtype matter.
        loss: cross_entropy turns whole numbers into int64 labels and checks that each is a class of the model, or takes
            one probability for each class; the other names want the shape of the output, and give [rows] the shape
            [rows, 1] if that is the output's. bce and bce_with_logits want numbers within 0..1, and bce wants
            them in `output` as well. triplet takes int64 labels of any value. A function gets the target as it is.
        name: what to call the target in errors.

    Raises:
        DataError: the shape, a label or number out of range, or a label that is not a whole number.
    """
    if callable(loss):
        return target
    if not isinstance(output, Tensor):
        raise DataError(
            f"the model gives a {type(output).__name__}, and loss={loss!r} needs one tensor; give a function as loss"
        )
    rows, wanted = len(target), output.shape[1:]
    if loss == "cross_entropy" and (target.shape != (rows, *wanted) or not target.is_floating_point()):
        return _labels(target, wanted, name)
    if loss == "triplet":
        if target.ndim != 1 or target.is_floating_point() or len(wanted) != 1:
            raise DataError(
                f"the model gives {list(wanted)} for a row and {name} has {list(target.shape[1:])} of {target.dtype}; "
                "triplet needs a vector, and a whole number as label, for a row"
            )
        return target
    if target.ndim == 1 and wanted == (1,):
        target = target.unsqueeze(1)
    if target.shape[1:] != wanted:
        raise DataError(
            f"the model gives {list(wanted)} for a row and {name} has {list(target.shape[1:])}; "
            f"change the model's output or {name}"
        )
    # Under autocast the output alone is rounded: losses take it up to float32, and the target should have all digits.
    rounded = torch.is_autocast_enabled(output.device.type) and output.dtype in (torch.bfloat16, torch.float16)
    target = target.to(torch.float32 if rounded else output.dtype)
    if loss in ("bce", "bce_with_logits") and (found := _beyond_0_to_1(target)):
        raise DataError(f"{name} holds {found} and loss={loss!r} needs 0 to 1; scale {name}, or use another loss")
    if loss == "bce" and (found := _beyond_0_to_1(output.detach())):
        raise DataError(
            f"the model gives {found} and loss='bce' needs probabilities; "
            "end the model with a sigmoid, or use loss='bce_with_logits'"
        )
    return target


def one_class(target: Tensor) -> bool:
    """Whether labels, int64 [rows, ...], or probabilities [rows, classes, ...] are of a single class."""
    labels = target.argmax(1) if target.is_floating_point() else target
    return bool((labels == labels[:1]).all())


def _beyond_0_to_1(numbers: Tensor) -> str | None:
    """The range of the numbers, in words, if they leave 0..1. NaN is for those to tell who watch the loss."""
    lowest, highest = (end.item() for end in numbers.aminmax())
    return f"numbers from {lowest:g} to {highest:g}" if lowest < 0.0 or highest > 1.0 else None


def _labels(target: Tensor, wanted: torch.Size, name: str) -> Tensor:
    if target.shape == (len(target), 1) and len(wanted) == 1:
        target = target[:, 0]
    if not wanted or target.shape[1:] != wanted[1:]:
        raise DataError(
            f"the model gives {list(wanted)} for a row and {name} has {list(target.shape[1:])}; "
            "cross_entropy needs one output for each class and one label, or one probability for each class, for a row"
        )
    labels = target.long()
    if target.is_floating_point() and not torch.equal(labels.to(target.dtype), target):
        raise DataError(f"{name} holds numbers that are not whole; cross_entropy needs labels 0 to {wanted[0] - 1}")
    lowest, highest = labels.min().item(), labels.max().item()
    if lowest < 0 or highest >= wanted[0]:
        raise DataError(
            f"{name} holds labels {lowest} to {highest} and the model knows 0 to {wanted[0] - 1}; give the model "
            f"{highest + 1} classes, or number the labels from 0, as np.unique({name}, return_inverse=True)[1] does"
        )
    return labels
