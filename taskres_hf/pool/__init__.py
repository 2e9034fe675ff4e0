"""Many classifiers over one base: `ClassifierPool`, and one file that holds them."""

from .classifiers import ClassifierPool, pack_with_base
from .packing import Pack, is_pack, pack, unpack
from .stacked import PooledClassifier, PoolView

__all__ = ["ClassifierPool", "Pack", "PoolView", "PooledClassifier", "is_pack", "pack", "pack_with_base", "unpack"]
