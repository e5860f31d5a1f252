from .reader import Reader


class TextReader(Reader):
    kind = "text"
    suffixes = (".txt",)


def is_text_table(path, target) -> bool:
    return False
