"""The old name of `paper.runner` and `paper.reports`; imports of it keep working."""

from .paper.reports import *  # noqa: F403
from .paper.runner import *  # noqa: F403
