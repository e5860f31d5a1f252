"""Texts: a tokenizer learned from them, and an embedding whose vectors are pooled to features for an Encoder."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..data import DataError
from ..data.extras import require
from ..encoder import Encoder
from .base import FrontEnd
from .reader import Collection, Reader
from .text_tables import decode, is_text_table, read_lines, read_table

__all__ = ["POOLINGS", "TextFrontEnd", "TextReader", "is_text_table"]

PAD, EMPTY, FIRST = 0, 1, 2  # token numbers: padding, a text without tokens, and the first of the tokenizer's own
CHARACTERS_OF_EACH = 100  # so many of the training texts for each token of the vocabulary: some 25 times that it occurs
MOST_TOKENS = 8192  # in a vocabulary, besides the single bytes
SUMMARY = 256  # numbers


class TextReader(Reader):
    """Texts to token numbers, by a byte-level BPE tokenizer (the `tokenizers` library) learned from the training texts.

    Text is put into Unicode's NFKC, into small letters, and any white space counts as one space. Every string has
    tokens, emoji and words never seen among them: in the worst case its UTF-8 bytes. Numbers are shifted, so that no
    text can have those of padding or of the empty text.

    Args:
        max_tokens: what is longer is cut.
        vocabulary: how many tokens to learn at most, single bytes included; None for as many as suits the texts.
        tokenizer: a fitted `tokenizers.Tokenizer`.
    """

    kind = "text"
    suffixes = (".txt",)

    def __init__(self, max_tokens: int = 256, vocabulary: int | None = None, tokenizer: Any = None) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens!r}; it must be at least 1")
        self.max_tokens, self.vocabulary, self._tokenizer = max_tokens, vocabulary, tokenizer

    @classmethod
    def collect(cls, path: Path, target: str | None = None, column: str | None = None) -> Collection:
        """A text for each line of a .txt file, each .txt file of a folder, or each row of a .csv or .parquet table.

        Labels are the folders of the files, or the table's column `target`. A text is in the table's `column`, by
        default the only one that holds sentences.
        """
        table = path.is_file() and path.suffix.lower() in (".csv", ".parquet")
        if column is not None and not table:
            raise DataError(f"{path} is no table and has no column {column!r}; leave --column out")
        if path.is_dir():
            return super().collect(path, target)
        if table:
            texts, labels = read_table(path, target, column)
            return Collection(cls.kind, str(path), texts, [f"row {number}" for number in range(len(texts))], labels)
        if path.suffix.lower() not in cls.suffixes:
            raise DataError(f"{path} holds no texts that can be read; give a .txt, .csv or .parquet file, or a folder")
        if target is not None:
            raise DataError(f"{path} has one text in each line and no labels; leave --target out, or give a table")
        lines = read_lines(path)
        return Collection(cls.kind, str(path), lines, [f"line {number}" for number in range(1, len(lines) + 1)])

    def fit(self, items: Sequence[Any]) -> TextReader:
        texts = [_as_text(item) for item in items]
        characters = sum(len(text.strip()) for text in texts)
        if characters == 0:
            raise DataError(f"all of the {len(texts)} texts are empty; give texts with words to learn tokens from")
        tokenizers = require("tokenizers", "reading texts", extra="frontends")
        normalizers, byte_level = tokenizers.normalizers, tokenizers.pre_tokenizers.ByteLevel
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), spaces, normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=True)  # so that the first word is as any other
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = byte_level.alphabet()
        size = self.vocabulary or len(alphabet) + min(MOST_TOKENS, characters // CHARACTERS_OF_EACH)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer, length=len(texts))
        self._tokenizer = tokenizer
        return self

    @property
    def tokenizer(self) -> Any:
        """The fitted `tokenizers.Tokenizer`; its numbers are those of `read` less FIRST."""
        if self._tokenizer is None:
            raise ValueError("this TextReader has learned no tokens; call fit(texts) first")
        return self._tokenizer

    @property
    def token_count(self) -> int:
        """How many token numbers there are: padding, the empty text and the vocabulary."""
        return FIRST + self.tokenizer.get_vocab_size()

    def read(self, item: str | bytes | os.PathLike[str]) -> np.ndarray:
        """A text, its UTF-8 bytes, or the path of a file of it: int64 [tokens], at least one."""
        found = self.tokenizer.encode(_as_text(item)).ids[: self.max_tokens]
        return np.array(found, np.int64) + FIRST if found else np.array([EMPTY], np.int64)

    def decode(self, array: np.ndarray) -> str:
        """The text of token numbers, as it was normalised."""
        return self.tokenizer.decode([number - FIRST for number in array.tolist() if number >= FIRST]).strip()

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """int64 [texts, tokens of the longest]; PAD after the end of the others."""
        return pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True, padding_value=PAD)

    def front_end(self, pooling: str = "mean") -> TextFrontEnd:
        return TextFrontEnd(self.token_count, pooling=pooling, max_tokens=self.max_tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_tokens": self.max_tokens, "tokenizer": self.tokenizer.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TextReader:
        tokenizers = require("tokenizers", "reading texts", extra="frontends")
        return cls(state["max_tokens"], tokenizer=tokenizers.Tokenizer.from_str(state["tokenizer"]))


def _as_text(item: Any) -> str:
    if isinstance(item, str):
        try:
            item.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"the text {item[:40]!r} has half a character at {error.start}; decode it anew") from None
        return item
    if isinstance(item, bytes):
        return decode(item, "the text")
    if isinstance(item, os.PathLike):
        try:
            return decode(Path(item).read_bytes(), str(item))
        except OSError as error:
            raise DataError(f"{item} cannot be read ({error.strerror}); give the path of a text file") from error
    raise DataError(f"a text is a {type(item).__name__}; give a str, its UTF-8 bytes, or the path of a text file")


class _Mean(nn.Module):
    """The mean of a text's vectors: the order of the words is lost, and little else is as fast."""

    def forward(self, h: Tensor, padding: Tensor) -> Tensor:
        return _mean(h, padding)


class _Recurrent(nn.Module):
    """The state of a GRU after a text's last token. It only looks back, and padding is behind the end."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        # Between layers: of a single one, PyTorch warns.
        self.gru = nn.GRU(width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)

    def forward(self, h: Tensor, padding: Tensor) -> Tensor:
        states, _ = self.gru(h)
        last = (~padding).sum(1) - 1
        return states[torch.arange(len(h), device=h.device), last]


class _Block(nn.Module):
    """Attention and a fused feed-forward stack, each added to what LayerNorm gave it (pre-norm, Xiong et al., 2020).

    nn.TransformerEncoderLayer would take PyTorch's own kernels for both in eval mode, whatever is fused in it.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feed_forward = Encoder(width, (4 * width, width), "gelu", "identity", dropout=dropout)

    def forward(self, h: Tensor, padding: Tensor) -> Tensor:
        normed = self.norm1(h)
        h = h + self.attention(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
        return h + self.feed_forward(self.norm2(h))


class _Transformer(nn.Module):
    """The mean of what Transformer blocks make of a text's vectors, with learned positions."""

    def __init__(self, width: int, depth: int, heads: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(max_tokens, width))
        nn.init.normal_(self.place, std=0.02)  # as BERT's (Devlin et al., 2018)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))

    def forward(self, h: Tensor, padding: Tensor) -> Tensor:
        if h.shape[1] > len(self.place):
            raise ValueError(
                f"the batch has texts of {h.shape[1]} tokens and this front end has places for {len(self.place)}; "
                "read them by a TextReader of as many max_tokens, which cuts them"
            )
        h = h + self.place[: h.shape[1]]
        for block in self.blocks:
            h = block(h, padding)
        return _mean(h, padding)


def _mean(h: Tensor, padding: Tensor) -> Tensor:
    """Over the tokens that are no padding: [B, T, width] and bool [B, T] -> [B, width]."""
    kept = (~padding).unsqueeze(2).to(h.dtype)
    return (h * kept).sum(1) / kept.sum(1)


POOLINGS = ("mean", "gru", "transformer")


class TextFrontEnd(FrontEnd):
    """Token numbers int64 [B, T], 0 behind the end of a text, to features [B, width].

    Args:
        vocabulary: how many token numbers there are, that of padding included.
        width: of the vectors.
        pooling: what makes one vector of those of a text: "mean", "gru" or "transformer".
        max_tokens: places that "transformer" has.
        depth: layers of the GRU, or blocks of the Transformer.
        heads: of each block's attention.
        dropout: of the embedded tokens, and between layers and in blocks.

    Raises:
        ValueError: no such pooling.
    """

    kind = "text"

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        pooling: str = "mean",
        max_tokens: int = 256,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; give one of {', '.join(POOLINGS)}")
        self._config = {"vocabulary": vocabulary, "width": width, "pooling": pooling, "max_tokens": max_tokens}
        self._config |= {"depth": depth, "heads": heads, "dropout": dropout}
        self.out_features, self.summary_features = width, SUMMARY
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        # Of length 1, or what training adds would be little beside what was drawn.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()
        self.dropout = nn.Dropout(dropout)
        self.pool: nn.Module
        if pooling == "mean":
            self.pool = _Mean()
        elif pooling == "gru":
            self.pool = _Recurrent(width, depth, dropout)
        else:
            self.pool = _Transformer(width, depth, heads, max_tokens, dropout)
        self.norm = nn.LayerNorm(width)

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)

    def summary(self, x: Tensor) -> Tensor:
        """log(1 + how often) for each of 256 groups of tokens, as a vector of length 16.

        Numbers of the byte-level BPE are in the order in which they were learned, which is about that of how frequent
        they are: number modulo 256 puts frequent tokens into groups of their own, each with rarer ones.
        """
        kept = (x != PAD).to(self.embedding.weight.dtype)
        counts = kept.new_zeros(len(x), SUMMARY).scatter_add_(1, x % SUMMARY, kept)  # of ones: exact in any order
        return F.normalize(counts.log1p(), dim=1) * math.sqrt(SUMMARY)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == PAD
        padding[:, 0] = False  # a row of nothing but padding has one token to look at, too
        return self.norm(self.pool(self.dropout(self.embedding(x)), padding))
