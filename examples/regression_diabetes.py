"""Regression through scikit-learn: a Pipeline with fastenc's EncoderRegressor, its settings found by GridSearchCV.

    python examples/regression_diabetes.py   # a minute; the picture goes to out/regression_diabetes

scikit-learn's diabetes data: 442 patients, 10 features, and how far the disease went in a year. A quarter is held out;
each search sees the other three quarters only. Beside it: ridge regression and a random forest, searched as well.
"""

from __future__ import annotations

from comparing import arguments, show
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from fastenc.sklearn import EncoderRegressor


def main() -> None:
    args = arguments("Regression through a Pipeline with GridSearchCV.", "regression_diabetes", epochs=60, seeds=5)
    x, y = load_diabetes(return_X_y=True)
    searches = {
        "fastenc, EncoderRegressor": (
            EncoderRegressor(epochs=args.epochs, random_state=0),
            {"widths": [(16,), (32, 8)], "weight_decay": [0.0, 0.1], "lr": [1e-3, 3e-3]},
        ),
        "Ridge": (Ridge(), {"alpha": [0.1, 1.0, 10.0, 100.0]}),
        "RandomForestRegressor": (RandomForestRegressor(100, random_state=0), {"min_samples_leaf": [1, 5, 15]}),
    }
    explained: dict[str, list[float]] = {name: [] for name in searches}
    for seed in range(args.seeds):
        kept = train_test_split(x, y, test_size=0.25, random_state=seed)
        for name, (model, grid) in searches.items():
            pipeline = Pipeline([("scale", StandardScaler()), ("model", model)])
            search = GridSearchCV(pipeline, {f"model__{option}": values for option, values in grid.items()}, cv=3)
            search.fit(kept[0], kept[2])
            explained[name].append(float(search.score(kept[1], kept[3])))
            if seed == 0:
                found = {option.removeprefix("model__"): value for option, value in search.best_params_.items()}
                print(f"{name}: {found}")
    print(f"\n{len(kept[0])} patients to search with, {len(kept[1])} held out; {args.seeds} seeds\n")
    show(explained, "R2 on held-out patients", args.out / "explained.png")


if __name__ == "__main__":
    main()
