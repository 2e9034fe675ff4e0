"""The old name of `paper.runner`; imports of it keep working."""

from .paper.runner import *  # noqa: F403
