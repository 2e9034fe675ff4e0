"""Any source of labelled pictures, as splits with class ids."""

from .labelled import LabelledImages, class_counts, finder
from .reading import Account, duplicates, shorten
from .sources import load_splits
from .training_data import TrainingData, load_evaluation_data, load_training_data

__all__ = [
    "Account", "LabelledImages", "TrainingData", "class_counts", "duplicates", "finder", "load_evaluation_data",
    "load_splits", "load_training_data", "shorten",
]  # fmt: skip
