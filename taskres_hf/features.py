"""The old name of `embedding.features`; imports of it keep working."""

from .embedding.features import *  # noqa: F403
from .embedding.stored import StoredFeatures as StoredFeatures
