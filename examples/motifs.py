"""Finding promoters in generated DNA, and the boxes that make them: a motif scanner, beside k-mer logistic regression.

    python examples/motifs.py                # a minute; the pictures go to out/motifs

The sequences are those of planted_motifs.py. The model is SequenceFrontEnd, two fused layers that slide over the
sequence, and a fused classifier on what they found. Integrated gradients then say which letters made it take a sequence
for a promoter; where these lie, and what motifs they make up, is compared with what was planted.
"""

from __future__ import annotations

import numpy as np
import torch
from comparing import Row, arguments, show, write_results
from motif_pictures import draw
from planted_motifs import BOXES, KINDS, LENGTH, SINGLE, WIDTH, Planted, make, scores_of_known
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fastenc import Classifier, EarlyStopping, Encoder, Trainer
from fastenc.frontends import FrontEncoder, Items, make_loader
from fastenc.frontends.sequences import SequenceFrontEnd, SequenceReader
from fastenc.plots import save_figure

ROWS = 8000
VALIDATION, TEST = 1 / 8, 3 / 16  # as many as these shares of them
NAMES = (OURS, KMERS, KNOWN) = ("fastenc, motif scanner", "logistic regression, k-mers", "both matrices known")
STEPS = 16  # of the integral
PEAKS = 5  # positions of each promoter
SHIFT = 4  # letters by which a motif's place may be mended


def main() -> None:
    args = arguments("Motifs in promoters.", "motifs", epochs=8, seeds=3, rows=ROWS)
    areas: dict[str, list[float]] = {name: [] for name in NAMES}
    by_kind = {name: {kind: [] for kind in KINDS[1:]} for name in NAMES}
    hits: dict[str, list[float]] = {OURS: [], KMERS: [], "any position": []}
    likeness: dict[str, list[float]] = {f"{box}, {how}": [] for box in BOXES for how in ("attributed", "by chance")}
    for seed in range(args.seeds):
        train, validation, test = (
            make(round(args.rows * s), 3 * seed + i) for i, s in enumerate((1, VALIDATION, TEST))
        )
        model = train_scanner(train, validation, args.epochs, seed)
        words = Words(train, validation)
        scores = (scanned(model, test), words.scores(test), scores_of_known(test.letters))
        for name, score in zip(NAMES, scores, strict=True):
            areas[name].append(float(roc_auc_score(test.kinds == 0, score)))
            for kind, found in enumerate(KINDS[1:], 1):
                pair = (test.kinds == 0) | (test.kinds == kind)
                by_kind[name][found].append(float(roc_auc_score(test.kinds[pair] == 0, score[pair])))
        of_promoters = test.kinds == 0
        promoters = Planted(*(part[of_promoters] for part in (test.letters, test.kinds, test.starts)))
        inside = promoters.inside()
        attributed = attributions(model, codes(promoters)).sum(2)
        hits[OURS].append(share_inside(attributed, inside))
        hits[KMERS].append(share_inside(words.attributions(promoters), inside))
        hits["any position"].append(float(inside.mean()))
        recovered, starts = recover(attributed, promoters.letters)
        mixed = np.random.default_rng(seed).permuted(attributed, axis=1)
        for how, motifs in (("attributed", recovered), ("by chance", recover(mixed, promoters.letters)[0])):
            for (box, planted), motif in zip(BOXES.items(), motifs, strict=True):
                likeness[f"{box}, {how}"].append(correlation(motif, planted))
        if seed == 0:
            first = promoters, attributed, recovered, starts, np.argsort(-scores[0][of_promoters])
    print(f"{args.rows} sequences of {LENGTH} letters to train on, scored on {len(test.kinds)}; {args.seeds} seeds\n")
    against = {f"against {kind}": {name: f"{np.mean(by_kind[name][kind]):.3f}" for name in NAMES} for kind in KINDS[1:]}
    show(areas, "area under the ROC curve", args.out / "areas.png", **against)
    print()
    show(hits, "share of the peaks in the boxes", args.out / "peaks.png")
    print()
    show(likeness, "correlation with the planted box", args.out / "likeness.png")
    path = args.out / "motifs.png"
    save_figure(lambda figure: draw(figure, *first), path, (13, 10))
    print(f"The planted and the recovered motifs are in {path}.")
    decoy = KINDS[3]
    rows = [
        Row("promoters: area under the ROC curve", np.mean(areas[OURS]), KMERS, np.mean(areas[KMERS])),
        Row(
            "the same, against boxes at a wrong distance",
            np.mean(by_kind[OURS][decoy]),
            KMERS,
            np.mean(by_kind[KMERS][decoy]),
        ),
        Row("share of attributed peaks in the planted boxes", np.mean(hits[OURS]), KMERS, np.mean(hits[KMERS])),
    ]
    write_results(args.out, [Row(r.what, float(r.ours), r.beside, float(r.theirs)) for r in rows])


def codes(planted: Planted) -> torch.Tensor:
    """int64 [rows, LENGTH], as the front end takes them."""
    reader = SequenceReader("dna")
    return reader.batch([reader.read(text) for text in planted.texts()])


def train_scanner(train: Planted, validation: Planted, epochs: int, seed: int) -> Classifier:
    """The model of the epoch that was best on the validation rows.

    Nothing is learned until a filter meets the box by chance: the steps are many and large, so that one does.
    """
    torch.manual_seed(seed)
    front_end = SequenceFrontEnd("dna", filters=(32, 32), widths=(11, 11), pool=4)
    model = Classifier(FrontEncoder(front_end, Encoder(front_end.out_features, (32, 16), dropout=0.1)), 2)
    loaders = []
    for part, order in ((train, seed), (validation, None)):
        items = Items(SequenceReader("dna"), part.texts())
        target = torch.from_numpy((part.kinds == 0).astype(np.int64))
        loaders.append(make_loader(items, np.arange(len(items)), target, batch_size=32, seed=order))
    trainer = Trainer(model, "adamw", 5e-3, "cross_entropy", weight_decay=0.1, schedule="cosine", seed=seed)
    best = EarlyStopping(patience=epochs)
    trainer.fit(loaders[0], epochs=epochs, validation_data=loaders[1], callbacks=[best], verbose=False)
    return model.eval()


@torch.inference_mode()
def scanned(model: Classifier, planted: Planted) -> np.ndarray:
    """float32 [rows]: the log of the odds that a sequence is a promoter."""
    logits = torch.cat([model(x) for x in codes(planted).split(256)])
    return (logits[:, 1] - logits[:, 0]).numpy()


class Words:
    """Logistic regression on counts of words; their length and the penalty are those best on the validation rows."""

    def __init__(self, train: Planted, validation: Planted) -> None:
        self.area = 0.0
        for k in (5, 6, 7):
            counter = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False)
            x, y = counter.fit_transform(train.texts()), train.kinds == 0
            for C in (1e-4, 1e-3, 1e-2):
                model = LogisticRegression(C=C, max_iter=1000).fit(x, y)
                decision = model.decision_function(counter.transform(validation.texts()))
                area = roc_auc_score(validation.kinds == 0, decision)
                if area > self.area:
                    self.area, self.k, self.counter, self.model = area, k, counter, model

    def scores(self, planted: Planted) -> np.ndarray:
        return self.model.decision_function(self.counter.transform(planted.texts()))

    def attributions(self, planted: Planted) -> np.ndarray:
        """float64 [rows, LENGTH]: each word's weight, shared by its letters."""
        weights, known = self.model.coef_[0], self.counter.vocabulary_
        result = np.zeros(planted.letters.shape)
        for row, text in zip(result, planted.texts(), strict=True):
            for place in range(LENGTH - self.k + 1):
                row[place : place + self.k] += weights[known.get(text[place : place + self.k], 0)] / self.k
        return result


def attributions(model: Classifier, x: torch.Tensor) -> np.ndarray:
    """Of the log of the odds for a promoter, by integrated gradients from N, any letter, at each place: [rows, L, 4].

    Sundararajan et al. (2017), arXiv:1703.01365; the integral by the midpoint rule.
    """
    front_end, there = model.encoder.frontend, torch.ones(1, x.shape[1], dtype=torch.bool)

    def odds(letters: torch.Tensor) -> torch.Tensor:
        logits = model.head(model.encoder.dense(front_end.of_letters(letters, there.expand(len(letters), -1))))
        return logits[:, 1] - logits[:, 0]

    parts = []
    for rows in x.split(128):
        letters = front_end.letters(rows)
        parts.append(integrated_gradients(odds, letters, torch.full_like(letters, 0.25)).numpy())
    return np.concatenate(parts)


def integrated_gradients(function, x: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """By captum where it is installed, otherwise written out: the same formula."""
    try:
        from captum.attr import IntegratedGradients
    except ModuleNotFoundError:
        total = torch.zeros_like(x)
        for step in range(STEPS):
            point = (baseline + (step + 0.5) / STEPS * (x - baseline)).requires_grad_()
            total += torch.autograd.grad(function(point).sum(), point)[0]
        return (x - baseline) * total / STEPS
    x = x.clone().requires_grad_()  # captum says so if it has to do it
    found = IntegratedGradients(function).attribute(x, baseline, n_steps=STEPS, method="riemann_middle")
    return found.detach()


def share_inside(attributed: np.ndarray, inside: np.ndarray) -> float:
    """How many of the PEAKS highest positions of each row are planted ones."""
    peaks = np.argsort(-attributed, axis=1)[:, :PEAKS]
    return float(np.take_along_axis(inside, peaks, 1).mean())


def recover(attributed: np.ndarray, letters: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The two motifs that the attributions [rows, L] point at.

    In each row the two windows of WIDTH letters with the largest sums that do not overlap are candidates. The letters
    of the largest are aligned: each row's window is moved to where it fits the others best, near either of its
    candidates, until nothing changes. The second motif is made in the same way of what is not the first.

    Returns: the frequencies [WIDTH, 4] of each, and where they are, int64 [rows, 2].
    """
    windows = np.lib.stride_tricks.sliding_window_view(letters, WIDTH, 1)
    sums = np.lib.stride_tricks.sliding_window_view(attributed, WIDTH, 1).sum(2)
    place = np.arange(sums.shape[1])
    largest = sums.argmax(1)
    second = np.where(np.abs(place - largest[:, None]) < WIDTH, -np.inf, sums).argmax(1)
    near = (np.abs(place - largest[:, None]) <= SHIFT) | (np.abs(place - second[:, None]) <= SHIFT)
    motifs, starts, free = [], [], np.ones_like(near)
    for _ in BOXES:
        at = np.where(near & free, sums, -np.inf).argmax(1)
        for _ in range(20):
            # All together may lie some letters beside the motif.
            shifts = [np.clip(at + shift, 0, len(place) - 1) for shift in range(-SHIFT, SHIFT + 1)]
            motif = max((frequencies(windows, shifted) for shifted in shifts), key=information)
            fit = np.log(motif / SINGLE)[np.arange(WIDTH), windows].sum(2)
            moved = np.where(near & free, fit, -np.inf).argmax(1)
            if (moved == at).all():
                break
            at = moved
        motifs.append(frequencies(windows, at))
        starts.append(at)
        free = free & (np.abs(place - at[:, None]) >= WIDTH)
    return motifs, np.stack(starts, 1)


def frequencies(windows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[WIDTH, 4] of the letters in the window of each row that begins at `at`, with one more of each letter."""
    chosen = windows[np.arange(len(at)), at]
    counts = (chosen[:, :, None] == np.arange(4)).sum(0) + 1.0
    return counts / counts.sum(1, keepdims=True)


def information(frequencies: np.ndarray) -> float:
    """Bits beyond what the background has."""
    return float((frequencies * np.log2(frequencies / SINGLE)).sum())


def correlation(motif: np.ndarray, planted: np.ndarray) -> float:
    """Pearson's, of the frequencies where both overlap: the largest of all shifts by at most SHIFT letters."""
    found = []
    for shift in range(-SHIFT, SHIFT + 1):
        a, b = (motif[shift:], planted[: WIDTH - shift]) if shift >= 0 else (motif[:shift], planted[-shift:])
        found.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    return float(max(found))


if __name__ == "__main__":
    main()
