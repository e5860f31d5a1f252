"""Front ends: images, text, audio, time series and biological sequences as features for the fused dense encoder."""

from .base import FrontEncoder, FrontEnd
from .batches import ByLength, Items, encode_items, make_loader, summaries
from .kinds import KINDS, collect, kind_of, reader_from_dict
from .reader import Collection, Reader

__all__ = [
    "KINDS",
    "ByLength",
    "Collection",
    "FrontEncoder",
    "FrontEnd",
    "Items",
    "Reader",
    "collect",
    "encode_items",
    "kind_of",
    "make_loader",
    "reader_from_dict",
    "summaries",
]
