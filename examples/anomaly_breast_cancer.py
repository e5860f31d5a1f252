"""Finding malignant samples as anomalies: an autoencoder that has seen benign ones only, beside PCA and a forest.

    python examples/anomaly_breast_cancer.py # half a minute; the picture goes to out/anomaly_breast_cancer

scikit-learn's breast cancer data: 569 samples of 30 features. Each model is fitted on 70% of the benign samples and
scores the other 30% and all malignant ones. The autoencoder's score, and PCA's, is the error of the reconstruction.
"""

from __future__ import annotations

import numpy as np
import torch
from comparing import arguments, show
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

from fastenc import AutoEncoder, Encoder, Trainer
from fastenc.data import Preprocessor
from fastenc.data.augmentation import GaussianNoise
from fastenc.record import split_rows
from fastenc.report import fit_pca

CODE, TEST_SHARE = 8, 0.3


def main() -> None:
    args = arguments("Anomaly detection by reconstruction error.", "anomaly_breast_cancer", epochs=200, seeds=5)
    data = load_breast_cancer()
    malignant = data.target == 0
    names = ("autoencoder", "denoising autoencoder", f"PCA, {CODE} components", "IsolationForest")
    areas: dict[str, list[float]] = {name: [] for name in names}
    benign = np.flatnonzero(~malignant)
    for seed in range(args.seeds):
        kept, held_out = (benign[part] for part in split_rows(len(benign), TEST_SHARE, seed))
        scale = Preprocessor().fit(data.data[kept])
        scored = np.concatenate([held_out, np.flatnonzero(malignant)])
        x, test = scale.transform(data.data[kept]).x, scale.transform(data.data[scored]).x
        pca = fit_pca(x, CODE)
        forest = IsolationForest(random_state=seed).fit(x)
        scores = (
            reconstruction_error(x, test, args.epochs, seed, noise=0.0),
            reconstruction_error(x, test, args.epochs, seed, noise=0.5),
            np.square(pca.inverse_transform(pca.transform(test)) - test).mean(axis=1),
            -forest.score_samples(test),
        )
        for name, score in zip(names, scores, strict=True):
            areas[name].append(float(roc_auc_score(malignant[scored], score)))
    print(f"Fitted on {len(kept)} benign samples, scored on {len(held_out)} and {malignant.sum()} malignant ones\n")
    show(areas, "area under the ROC curve", args.out / "areas.png")


def reconstruction_error(x: np.ndarray, test: np.ndarray, epochs: int, seed: int, noise: float) -> np.ndarray:
    """Of each row of `test` by an autoencoder trained on `x`: [rows]."""
    torch.manual_seed(seed)
    model = AutoEncoder(Encoder(x.shape[1], (64, 32, CODE), "tanh", "identity"))
    trainer = Trainer(model, lr=1e-3, seed=seed)
    trainer.fit(x, epochs=epochs, augment=GaussianNoise(noise) if noise else None, verbose=False)
    return np.square(trainer.predict(test) - test).mean(axis=1)


if __name__ == "__main__":
    main()
