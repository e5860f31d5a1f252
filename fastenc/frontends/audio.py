from .reader import Reader


class AudioReader(Reader):
    kind = "audio"
    suffixes = (".wav", ".flac",)
