"""Augmentation: what makes other rows of rows, again in each epoch, so that a model learns what they have in common.

Anything that can be called with a batch [rows, features] and gives another of its shape will do for `Trainer.fit` and
`finetune`. Random numbers are PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arrays import DataError
from .extras import require

Augmentation = Callable[[Tensor], Tensor]


class GaussianNoise:
    """Adds noise of mean 0 and standard deviation `std` to every feature. For scaled features: 0.1 is a tenth."""

    def __init__(self, std: float = 0.1) -> None:
        if not 0.0 <= std < math.inf:
            raise ValueError(f"std is {std!r}; give a finite number of at least 0")
        self.std = std

    def __call__(self, x: Tensor) -> Tensor:
        return torch.randn_like(x).mul_(self.std).add_(x)


class FeatureMask:
    """Sets each feature of each row to `value` with this probability (0 is the mean of standardised features)."""

    def __init__(self, probability: float = 0.2, value: float = 0.0) -> None:
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"probability is {probability!r}; it must be at least 0 and less than 1")
        self.probability, self.value = probability, value

    def __call__(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.rand_like(x) < self.probability, self.value)


class Mixup:
    """Mixes each row, and its target, with another (Zhang et al., 2018): w a + (1 - w) b, w from Beta(alpha, alpha).

    It is called with x [rows, features] and targets, [rows, ...] floating; classes are mixed as probabilities, which
    `Trainer` makes of labels for cross_entropy. Each row has a w of its own.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}; give a finite number above 0")
        self.alpha = alpha

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        concentration = torch.full((len(x),), self.alpha, device=x.device)
        share = torch.distributions.Beta(concentration, concentration).sample().to(x.dtype)
        other = torch.randperm(len(x)).to(x.device)
        return _mix(x, other, share), _mix(target, other, share)


class ImageTransform:
    """Applies `transform` to each row as an image [channels, height, width], with new random numbers for each.

    Args:
        shape: (height, width), or (channels, height, width), of the image that a row holds.
        transform: from an image to one of the same shape, for example of torchvision.transforms.v2.
    """

    def __init__(self, shape: Sequence[int], transform: Augmentation) -> None:
        self.shape = (1, *shape) if len(shape) == 2 else tuple(shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape is {tuple(shape)}; give (height, width) or (channels, height, width)")
        self.transform = transform

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (math.prod(self.shape),):
            raise DataError(
                f"x has {x.shape[-1]} columns and images of {list(self.shape)} have {math.prod(self.shape)} pixels; "
                "give the shape of the images that the rows hold"
            )
        images = [self.transform(image) for image in x.reshape(-1, *self.shape)]
        if wrong := next((list(image.shape) for image in images if image.shape != self.shape), None):
            raise DataError(
                f"the transform gives images of {wrong} and the rows hold {list(self.shape)}; add one that "
                "brings them back to that size"
            )
        return torch.stack(images).reshape(x.shape)


def image_augmentation(
    shape: Sequence[int], *, shift: float = 0.1, crop: float = 1.0, flip: bool = False
) -> ImageTransform:
    """Random shifts, crops and flips by torchvision.transforms.v2.

    Args:
        shape: as for `ImageTransform`.
        shift: the most that an image is moved, as a share of its width and height; what comes in is 0.
        crop: the least share of the image's area that is cut out and stretched to its size again; 1 for none.
        flip: whether half of the images are mirrored left to right. Not for digits and letters.

    Raises:
        ModuleNotFoundError: torchvision is missing.
    """
    if not (0.0 <= shift < 1.0 and 0.0 < crop <= 1.0):
        raise ValueError(f"shift is {shift!r} and crop {crop!r}; shift must be in 0 to 1, and crop above 0 and up to 1")
    require("torchvision", "image_augmentation")
    v2 = require("torchvision.transforms.v2", "image_augmentation")
    steps = []
    if shift > 0.0:
        steps.append(v2.RandomAffine(degrees=0, translate=(shift, shift)))
    if crop < 1.0:
        steps.append(v2.RandomResizedCrop(tuple(shape)[-2:], scale=(crop, 1.0), antialias=True))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return ImageTransform(shape, v2.Compose(steps) if steps else v2.Identity())


def augment_rows(
    augment: Augmentation | Mixup | Sequence[Augmentation | Mixup], x: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """`x` and `target` after one augmentation, or several one after the other; neither is written to.

    Raises:
        DataError: an augmentation gives something else than a tensor of the shape of x.
    """
    shape = x.shape
    for step in augment if isinstance(augment, Sequence) else [augment]:
        if isinstance(step, Mixup):
            x, target = step(x, target)
        else:
            x = step(x)
        if not isinstance(x, Tensor) or x.shape != shape:
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise DataError(f"augment gives {found} for rows of shape {list(shape)}; make it give rows of that shape")
    return x, target


def mixes(augment: Augmentation | Mixup | Sequence[Augmentation | Mixup]) -> bool:
    """Whether targets change, too."""
    return any(isinstance(step, Mixup) for step in (augment if isinstance(augment, Sequence) else [augment]))


def _mix(rows: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(rows[other], rows, share.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)))
