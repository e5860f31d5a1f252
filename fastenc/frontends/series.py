from .reader import Reader


class SeriesReader(Reader):
    kind = "series"
    suffixes = (".csv", ".npy",)
