"""Before and after training: how hard a task is, what was learned, how many pictures, and which to label next."""

from .learned import what_it_learned

__all__ = ["what_it_learned"]
