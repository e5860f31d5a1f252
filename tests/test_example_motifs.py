"""The example of motifs in promoters: its data, its formulas, and its figures at a small size."""

import json

import numpy as np
import pytest
import torch
from example_runs import EXAMPLES, compare, figure, imported, run
from matplotlib.figure import Figure

from fastenc.frontends import collect
from fastenc.frontends.sequences import SequenceReader


@pytest.fixture(scope="module")
def examples():
    """The example's modules."""
    with imported("motifs", "planted_motifs", "motif_pictures") as modules:
        yield modules


def test_what_is_planted(examples):
    _, data, _ = examples
    planted = data.make(6000, seed=1)
    assert np.bincount(planted.kinds).tolist() == [3000, 1000, 1000, 1000]
    assert (planted.starts[planted.kinds == 1] == -1).all()
    assert (planted.starts[planted.kinds != 1].max() + data.WIDTH) <= data.LENGTH
    distance = planted.starts[:, 1] - planted.starts[:, 0] + data.START
    for kind, distances in ((0, data.RIGHT), (2, data.RIGHT), (3, data.WRONG)):
        assert set(distance[planted.kinds == kind]) == set(distances)
    for kind in (0, 3):
        rows = np.flatnonzero(planted.kinds == kind)
        for box, frequencies in enumerate(data.BOXES.values()):
            places = planted.starts[rows, box, None] + np.arange(data.WIDTH)
            drawn = (planted.letters[rows[:, None], places][..., None] == np.arange(4)).mean(0)
            # Five standard deviations of a mean of 1000 draws.
            assert np.abs(drawn - frequencies).max() < 5 * np.sqrt(0.25 / 1000)
    inside = planted.inside()
    assert (inside[planted.kinds != 1].sum(1) == 2 * data.WIDTH).all()
    assert not inside[planted.kinds == 1].any()


def test_the_background_is_its_chain(examples):
    _, data, _ = examples
    letters = data.background(4000, np.random.default_rng(0))
    first, second = letters[:, :-1].ravel(), letters[:, 1:].ravel()
    for letter in range(4):
        share = np.bincount(second[first == letter], minlength=4) / (first == letter).sum()
        assert np.abs(share - data.TRANSITIONS[letter]).max() < 5 * np.sqrt(0.25 / 1e5)
    assert np.isin(letters, (1, 2)).mean() == pytest.approx(0.41, abs=0.005)
    assert ((first == 1) & (second == 2)).mean() == pytest.approx(0.01, abs=0.001)


def test_the_scan_of_known_matrices_tells_them_apart(examples):
    motifs, data, _ = examples
    planted = data.make(1200, seed=2)
    scores = data.scores_of_known(planted.letters)
    for kind in (1, 2, 3):
        pair = np.isin(planted.kinds, (0, kind))
        assert motifs.roc_auc_score(planted.kinds[pair] == 0, scores[pair]) > 0.85


def test_integrated_gradients_of_a_line_are_its_terms(examples):
    motifs, *_ = examples
    random = torch.Generator().manual_seed(0)
    # Small whole numbers, and a count of steps that is a power of two: no rounding.
    x, baseline, weight = (torch.randint(-4, 5, (3, 5, 4), generator=random).double() for _ in range(3))
    # The function is asked for as many rows as suit captum: it has the same weight for each.
    found = motifs.integrated_gradients(lambda at: (at * weight[0]).sum((1, 2)), x, baseline)
    assert torch.equal(found, (x - baseline) * weight[0])
    # Of a square, whose gradient the midpoint rule integrates exactly: the difference of the ends, for each term.
    found = motifs.integrated_gradients(lambda at: at.square().sum((1, 2)), x, baseline)
    assert torch.equal(found, x.square() - baseline.square())


def test_motifs_are_recovered_where_the_attributions_point(examples):
    motifs, data, _ = examples
    planted = data.make(800, seed=3)
    rows = planted.kinds == 0
    letters, starts = planted.letters[rows], planted.starts[rows]
    attributed = data.Planted(letters, planted.kinds[rows], starts).inside().astype(float)
    assert motifs.share_inside(attributed, attributed.astype(bool)) == 1.0
    found, at = motifs.recover(attributed, letters)
    for motif, box in zip(found, data.BOXES.values(), strict=True):
        assert motifs.correlation(motif, box) > 0.95
    assert (np.abs(at - starts) <= motifs.SHIFT).mean() > 0.9


def test_motifs(tmp_path):
    output, written = compare("motifs.py", tmp_path, "--epochs", 8, "--rows", 1600)
    assert "1600 sequences of 160 letters to train on, scored on 300; 1 seeds" in output
    areas, rest = output.split("share of the peaks in the boxes")
    assert 0.55 < figure(areas, "fastenc, motif scanner") <= 1
    assert 0.55 < figure(areas, "logistic regression, k-mers") < figure(areas, "both matrices known") < 1
    peaks, _ = rest.split("correlation with the planted box")
    assert figure(peaks, "fastenc, motif scanner") > 1.5 * figure(peaks, "any position")
    assert written == ["areas.png", "likeness.png", "motifs.png", "peaks.png", "results.json"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 3
    assert results[0]["ours"] == pytest.approx(figure(areas, "fastenc, motif scanner"), abs=5e-4)


def test_fasta_of_planted_motifs(tmp_path):
    path = tmp_path / "promoters.fasta"
    assert "60 sequences of 160 letters" in run("planted_motifs.py", path, "--rows", 60).stdout
    found = collect(str(path), "sequence", target="label")
    assert sorted(set(found.labels)) == ["other", "promoter"]
    assert (found.labels == "promoter").sum() == 30
    reader = SequenceReader().fit(found.items)
    assert (reader.alphabet, reader.longest) == ("dna", 160)
    assert len(set(collect(str(path), "sequence", target="kind").labels)) == 4


def test_letters_of_a_logo_have_their_heights(examples):
    *_, pictures = examples
    assert pictures.__file__ == str(EXAMPLES / "motif_pictures.py")
    axes = Figure().add_subplot()
    heights = np.array([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, -0.5, 0.0]])
    pictures.draw_letters(axes, heights)
    boxes = [
        patch.get_path().transformed(patch.get_transform() - axes.transData).get_extents() for patch in axes.patches
    ]
    found = [[round(float(edge), 6) for edge in (box.x0, box.y0, box.x1, box.y1)] for box in boxes]
    # The larger is on top; what is negative hangs from zero.
    assert found == [[0.53, 0.0, 1.47, 0.5], [0.53, 0.5, 1.47, 1.5], [1.53, -0.5, 2.47, 0.0]]
