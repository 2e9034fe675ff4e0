"""The errors that the library raises on purpose, and those of the Hub's client in words that say what to do.

    TaskResError
    ├── ConfigurationError (ValueError)    an argument or a config value is wrong
    │   └── ClassNamesError                class names are missing, empty or repeated
    ├── DataError (ValueError)             a dataset cannot be used as it is
    │   ├── FewShotError                   a class has fewer images than the shots asked for
    │   └── ImageError                     a picture cannot be read
    │       └── TextError                  a text is missing, empty or no text
    ├── BaseModelError (ValueError)        the base model is not one this library can wrap
    │   ├── BaseMismatchError              the base is no longer the one the residual was trained on
    │   └── TextTowerNotLoadedError        the text tower was not loaded (an AttributeError too)
    ├── ArtifactError (ValueError)         a saved folder is incomplete, damaged or from a newer version
    ├── HubError (OSError)                 the Hub cannot be reached, refuses, or does not have it
    └── MissingExtraError (ImportError)    an optional package is not installed

Each message states the rule, the value that broke it and what to do next. The cause of a `HubError` is the error of
the Hub's client (repository not found, gated, offline).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar


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


class TextError(ImageError):
    """A text is missing, empty or something else than text: as a picture that cannot be read."""


class BaseModelError(TaskResError, ValueError):
    """The base model is not one this library can wrap."""


class BaseMismatchError(BaseModelError):
    """The base is no longer the one the residual was trained on."""


class TextTowerNotLoadedError(BaseModelError, AttributeError):
    """The text tower was not loaded: classifying does without it."""


class ArtifactError(TaskResError, ValueError):
    """A saved folder is incomplete, damaged or from a newer version."""


class HubError(TaskResError, OSError):
    """The Hub cannot be reached, refuses, or does not have what was asked for."""


class MissingExtraError(TaskResError, ImportError):
    """An optional package is not installed."""


# ---------------------------------------------------------------------------------------------------- the Hub's answers


LOG_IN = "log in with `hf auth login`, or pass token="
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def answer_of(error: BaseException) -> Any:
    """The answer that an error of the Hub's client is about; None where there was none."""
    answers = (getattr(cause, "response", None) for cause in chain(error))
    return next((answer for answer in answers if hasattr(answer, "status_code")), None)


def status_of(error: BaseException) -> int | None:
    """The status code of that answer."""
    answer = answer_of(error)
    return None if answer is None else int(answer.status_code)


def sent_token(error: BaseException) -> bool:
    """Whether the request that it answers carried a token."""
    answer = answer_of(error)
    return answer is not None and "authorization" in answer.request.headers


def no_answer(error: BaseException) -> str | None:
    """In a few words, how the Hub could not be asked or was not able to answer; None for any other error."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled  # type: ignore

    status, causes = status_of(error), list(chain(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE or local_files_only is set"
    if status is not None:
        names = {429: "too many requests", 408: "timeout"}
        return (
            f"it answered {status}, {names.get(status, 'server error')}" if status in names or status >= 500 else None
        )
    lost = next((cause for cause in causes if isinstance(cause, HTTPError)), None)
    if lost is not None:
        return f"{type(lost).__name__}: {' '.join(str(lost).split())[:200]}".rstrip(": ")
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return "local_files_only is set"
    return None


def explained(error: BaseException, subject: str, name: str, revision: str | None, advice: str) -> HubError | None:
    """What an error of the Hub's client means for a repository; None where it is no such error.

    Args:
        subject: how the sentence begins, such as `"The base model me/clip"`. name, revision: as asked for.
        advice: how else to say where it is, a sentence.
    """
    from huggingface_hub import errors

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain(error))

    status, reason = status_of(error), no_answer(error)
    if reason is not None:
        return HubError(
            f"{subject} is not in the cache of this machine, and the Hub cannot be reached or is not to be ({reason}). "
            f"Check the connection and try again. {advice}"
        )
    if is_any(errors.HFValidationError):
        return HubError(f"{subject} is not named as repositories are, such as me/pets-taskres. {advice}")
    if is_any(errors.GatedRepoError):
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}"
        return HubError(f"{subject} is gated: ask for access on {page}, and {LOG_IN}.")
    if is_any(errors.DisabledRepoError):
        return HubError(f"{subject} was disabled on the Hub, by its author or its staff. {advice}")
    if status == 401 and sent_token(error):
        return HubError(
            f"{subject} cannot be asked for: the Hub does not take the token that was sent. It is expired, revoked or "
            "mistyped: log in again with `hf auth login`, or give a new one in HF_TOKEN or token=."
        )
    if is_any(errors.RepositoryNotFoundError):
        return HubError(
            f"{subject} is not on the Hub: it was deleted, its name is mistyped, or it is private. Check the name; if "
            f"it is private, {LOG_IN}. {advice}"
        )
    if is_any(errors.RevisionNotFoundError):
        if _COMMIT.fullmatch(revision or ""):
            gone = f"has no commit {revision}, or no longer: its history may have been rewritten"
            return HubError(f"{subject} {gone}. {advice}")
        return HubError(f"{subject} has no revision {revision!r}: name a branch, tag or commit that it has.")
    if status in (401, 403):
        return HubError(f"{subject} cannot be read: the Hub refuses it ({status}). To read it, {LOG_IN}.")
    return None


@contextmanager
def asking_for(subject: str, name: str, revision: str | None = None, advice: str = "") -> Iterator[None]:
    """Around calls of the Hub's client: its errors become one `HubError`, which keeps the client's as its cause.

    Raises:
        HubError: see `explained`. Whatever else is raised inside passes.
    """
    try:
        yield
    except TaskResError:
        raise
    except Exception as error:
        told = explained(error, subject, name, revision, advice)
        if told is None:
            raise
        answers = [cause for cause in chain(error) if type(cause).__module__.startswith("huggingface_hub")]
        raise told from (answers[-1] if answers else error)


def else_cached(fetch: Callable[..., _T], **options: Any) -> _T:
    """What `fetch` returns; from the cache where the connection was dropped, as the Hub's client does for other faults,
    or where the Hub refuses a commit, which is the same wherever it is read.

    Raises:
        Exception: that of the first try, where the cache has nothing.
    """
    try:
        return fetch(**options)
    except Exception as error:
        refused, pinned = status_of(error) is not None, _COMMIT.fullmatch(options.get("revision") or "")
        if options.get("local_files_only") or (not pinned if refused else no_answer(error) is None):
            raise
        with suppress(Exception):
            return fetch(**{**options, "local_files_only": True})
        raise


def warn_if_moved(what: str, name: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Say when a repository has another name by now; the Hub leads there, and its new name is what lasts."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return
    with suppress(Exception):  # whatever is wrong, the download itself has told or will tell
        place = f"{options['subfolder']}/config.json" if options.get("subfolder") else "config.json"
        url = hf_hub_url(name, place, revision=revision)
        place = get_hf_file_metadata(url, token=options.get("token")).location.removeprefix(constants.ENDPOINT)
        found = re.fullmatch(r"(?:\w+://[^/]+)?/([^/]+/[^/]+)/resolve/.*", place)
        if found and found.group(1) != name:
            warnings.warn(
                f"The {what} {name} has moved to {found.group(1)}, where it was read. Use its new name: the old one "
                "works only as long as nobody else takes it.",
                stacklevel=4,
            )
