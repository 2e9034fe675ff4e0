"""The old name of `paper.datasets`; imports of it keep working."""

from .paper.datasets import *  # noqa: F403
