"""What the commands say: tables and lines for people, one JSON value for machines, one line when interrupted."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

# Control characters, direction overrides and halves of a surrogate pair (bytes of a file name that is not UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text that does to a terminal no more than show: control characters are spelled out."""
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)


def say(text: str) -> None:
    """A line for people, on the standard output."""
    typer.echo(visible(text))


def warn(text: str) -> None:
    """A line beside the results, on the standard error."""
    typer.echo(visible(text), err=True)


def plain(value: Any) -> str:
    """A value from a config as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return visible(f"{value:.4g}" if isinstance(value, float) else str(value))


def percent(share: float) -> str:
    """0.415 as `41.5 %`."""
    return f"{100 * share:.1f} %"


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def as_json_text(value: Any) -> str:
    """JSON on one line; what a terminal would obey is escaped, and it still reads back as the same value."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def emit(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """Print `value` as JSON, or call `show` to print it for people."""
    if as_json:
        typer.echo(as_json_text(value))
    else:
        show()


def quiet_libraries(no_bars: bool, heavy: bool = True) -> None:
    """Silence what other libraries say about themselves; warnings of ours become one line each.

    Args:
        no_bars: no progress bar at all. Otherwise downloads from the Hub show theirs.
        heavy: the command needs transformers and datasets, which are imported here.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if no_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.showwarning = lambda message, *_, **__: warn(f"Warning: {message}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not heavy:
        return
    import datasets
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    disabled = are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # its own, of weights being placed; and those of the Hub
    if not (disabled or no_bars):
        enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- interruption


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


_NOTHING = "Nothing was changed."
_kept: Callable[[], str] = lambda: _NOTHING  # noqa: E731 (what the running command says is there already)


def when_interrupted(kept: Callable[[], str]) -> None:
    """Say from now on `kept()` when the command is interrupted: what is there already, and how to go on."""
    global _kept
    _kept = kept


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, ending in one line and exit code 130 on Ctrl-C (143 on SIGTERM)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        when_interrupted(lambda: _NOTHING)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            warn(f"\nInterrupted. {_kept()}")
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None

    return run


def end_on_sigterm() -> Any:
    """Make SIGTERM raise `Terminated`; returns the handler before, or None where it cannot be set."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return None


def program() -> str:
    """How the user calls us: `taskres`, or `python -m taskres_hf`."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return "python -m taskres_hf" if name == "__main__.py" else "taskres"
