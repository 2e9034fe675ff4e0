"""Before and after training: how hard a task is, what was learned, how many pictures, and which to label next."""

from .learned import what_it_learned
from .planning import plan_pictures

__all__ = ["plan_pictures", "what_it_learned"]
