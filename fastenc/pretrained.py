"""Saving and loading (skeleton)."""


class Pretrained:
    """Mixin."""

    @classmethod
    def from_config(cls, config):
        return cls(**config)
