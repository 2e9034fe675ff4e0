"""The old name of `paper.checkpoints`; imports of it keep working."""

from .paper.checkpoints import *  # noqa: F403
