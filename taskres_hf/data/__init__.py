"""Any source of labelled pictures, as splits with class ids."""

from .labelled import LabelledImages as LabelledImages
from .sources import load_splits as load_splits
