"""FrontEnd: a batch of one kind of data to features [B, F]; FrontEncoder: these, and a fused Encoder on them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..encoder import ENCODERS, Encoder
from ..pretrained import Pretrained


class FrontEnd(nn.Module):
    """Base of the modules that turn a padded batch into features for an Encoder.

    What is missing is in the batch itself, so that a batch is one tensor: NaN in numbers (padding, a sensor without a
    value), 0 in token numbers. A row's features do not depend on the padding beside it, nor on the other rows.

    Attributes:
        kind: "image", "text", "audio", "series" or "sequence".
        out_features: numbers that `forward` gives for each row.
        summary_features: numbers that `summary` gives for each row.
    """

    kind: ClassVar[str]
    out_features: int
    summary_features: int

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        raise NotImplementedError(f"{type(self).__name__} needs a get_config() to be saved")

    def summary(self, x: Tensor) -> Tensor:
        """What a row holds, in a few numbers of a fixed count, of the order of 1: what an AutoEncoder reconstructs.

        A batch as `forward` takes it -> [B, summary_features], finite, without gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} has no summary, which training without labels needs")


class FrontEncoder(Pretrained, nn.Module):
    """A front end and an Encoder on its features: a batch of its kind of data -> vectors [B, widths[-1]].

    It takes an Encoder's place in AutoEncoder (which then reconstructs `summary(x)`), Classifier, Regressor and
    MultiTask.

    Args:
        frontend: the FrontEnd.
        encoder: an Encoder of `frontend.out_features` features.

    Raises:
        ValueError: the encoder takes another number of features.
    """

    def __init__(self, frontend: FrontEnd, encoder: Encoder) -> None:
        super().__init__()
        if encoder.in_features != frontend.out_features:
            raise ValueError(
                f"the encoder takes {encoder.in_features} features and {type(frontend).__name__} gives "
                f"{frontend.out_features}; make it Encoder({frontend.out_features}, ...)"
            )
        self.frontend = frontend
        self.dense = encoder

    @property
    def layers(self) -> nn.ModuleList:
        return self.dense.layers

    @property
    def widths(self) -> tuple[int, ...]:
        return self.dense.widths

    @property
    def activation(self) -> str:
        return self.dense.activation

    @property
    def dropout(self) -> float:
        return self.dense.dropout

    @property
    def out_features(self) -> int:
        return self.dense.out_features

    @property
    def reconstructed_features(self) -> int:
        """How many numbers an AutoEncoder on this encoder gives for each row: those of the summary."""
        return self.frontend.summary_features

    def get_config(self) -> dict[str, Any]:
        frontend = {"class": type(self.frontend).__name__, **self.frontend.get_config()}
        return {"class": "FrontEncoder", "frontend": frontend, "dense": self.dense.get_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FrontEncoder:
        from .kinds import FRONT_ENDS  # which knows all of them, and so comes after them

        of_front_end = dict(config["frontend"])
        name = of_front_end.pop("class")
        if name not in FRONT_ENDS:
            raise ValueError(f"there is no front end {name!r} here; the known ones are {', '.join(FRONT_ENDS)}")
        return cls(FRONT_ENDS[name](**of_front_end), Encoder(**config["dense"]))

    @torch.no_grad()
    def summary(self, x: Tensor) -> Tensor:
        """As `FrontEnd.summary`."""
        return self.frontend.summary(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.frontend(x))


ENCODERS["FrontEncoder"] = FrontEncoder
