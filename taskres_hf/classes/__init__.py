"""Changing the classes of a classifier, and bringing several classifiers together."""

from .changing import ChangesClasses
from .merging import interpolate, merge_residuals, unite

__all__ = ["ChangesClasses", "interpolate", "merge_residuals", "unite"]
