"""The errors that the library raises on purpose.

    TaskResError
    ├── ConfigurationError (ValueError)    an argument or a config value is wrong
    │   └── ClassNamesError                class names are missing, empty or repeated
    ├── DataError (ValueError)             a dataset cannot be used as it is
    │   ├── FewShotError                   a class has fewer images than the shots asked for
    │   └── ImageError                     a picture cannot be read
    ├── BaseModelError (ValueError)        the base model is not one this library can wrap
    │   ├── BaseMismatchError              the base is no longer the one the residual was trained on
    │   └── TextTowerNotLoadedError        the text tower was not loaded (an AttributeError too)
    ├── ArtifactError (ValueError)         a saved folder is incomplete, damaged or from a newer version
    └── MissingExtraError (ImportError)    an optional package is not installed

Each message states the rule, the value that broke it and what to do next. Errors of the Hub client
(repository not found, gated, offline) are passed through unchanged.
"""

from __future__ import annotations


class TaskResError(Exception):
    """Base of every error raised by this library."""


class ConfigurationError(TaskResError, ValueError):
    """An argument or a config value is wrong."""


class ClassNamesError(ConfigurationError):
    """Class names are missing, empty or repeated."""


class DataError(TaskResError, ValueError):
    """A dataset cannot be used as it is."""


class FewShotError(DataError):
    """A class has fewer images than the shots asked for."""


class ImageError(DataError):
    """A picture cannot be read."""


class BaseModelError(TaskResError, ValueError):
    """The base model is not one this library can wrap."""


class BaseMismatchError(BaseModelError):
    """The base is no longer the one the residual was trained on."""


class TextTowerNotLoadedError(BaseModelError, AttributeError):
    """The text tower was not loaded: classifying does without it."""


class ArtifactError(TaskResError, ValueError):
    """A saved folder is incomplete, damaged or from a newer version."""


class MissingExtraError(TaskResError, ImportError):
    """An optional package is not installed."""
