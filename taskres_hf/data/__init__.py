"""Any source of labelled pictures, as splits with class ids."""

from .labelled import LABEL_NAMES, LabelledImages, class_counts, column_values, find_column, finder, is_missing
from .multi_label import MultiLabelImages
from .reading import Account, FileCells, duplicates, shorten
from .sources import load_splits
from .stratified import few_shot_rows, folds_of_pictures
from .texts import LabelledTexts
from .training_data import TrainingData, load_evaluation_data, load_training_data

__all__ = [
    "LABEL_NAMES", "Account", "FileCells", "LabelledImages", "LabelledTexts", "MultiLabelImages", "TrainingData",
    "class_counts",
    "column_values", "duplicates", "few_shot_rows", "find_column", "finder", "folds_of_pictures", "is_missing",
    "load_evaluation_data", "load_splits", "load_training_data", "shorten",
]  # fmt: skip
