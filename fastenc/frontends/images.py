from .reader import Reader


class ImageReader(Reader):
    kind = "image"
    suffixes = (".png", ".jpg", ".jpeg",)
