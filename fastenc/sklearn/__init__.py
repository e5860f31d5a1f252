"""scikit-learn estimators: encoders that are fitted, searched over and put into pipelines as anything of scikit-learn.

They train a model of fastenc by its Trainer and take and give what scikit-learn's own estimators do. X is an array or
table `[rows, features]` of finite numbers; a faulty one is refused in scikit-learn's words, and a faulty setting in one
sentence. The fitted model is `model_`; the same `random_state` gives the same one.
"""

try:
    import sklearn.base  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "sklearn":  # it is there, and something it needs is not
        raise
    raise ModuleNotFoundError(
        'fastenc.sklearn needs scikit-learn; run: pip install "fastenc[app]"', name="sklearn"
    ) from None

from .reconstructing import EncoderOutlierDetector, EncoderTransformer
from .supervised import EncoderClassifier, EncoderRegressor

__all__ = ["EncoderClassifier", "EncoderOutlierDetector", "EncoderRegressor", "EncoderTransformer"]
