"""What the commands say: tables and lines for people, one JSON value for machines, one line when interrupted."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from ..tables import Table, json_text, visible
from ..tables import percent as percent

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str, err: bool = False) -> None:
    """Lines for people, of which a terminal obeys nothing but the line ends."""
    typer.echo("\n".join(map(visible, text.split("\n"))), err=err)


def warn(text: str) -> None:
    """Lines beside the results, on the standard error."""
    say(text, err=True)


def say_loading(name: object, quiet: bool) -> None:
    """A sign of life before a model that may be large is read."""
    if not quiet:
        warn(f"Loading {name} ...")


def plain(value: Any) -> str:
    """A value from a config as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return visible(f"{value:.4g}" if isinstance(value, float) else str(value))


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], **details: Any) -> None:
    """A table, see `tables.Table` for the details, on the standard output."""
    console().print(Table(columns, rows, **details).rich())


_collected: list[str] = []  # warnings that go into the JSON value instead of beside it


def emit(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """Print `value` as JSON, with the warnings if it is an object; or call `show` to print it for people."""
    if not as_json:
        show()
        return
    if _collected and isinstance(value, dict):
        value = {**value, "warnings": list(_collected)}
    else:
        for text in _collected:
            warn(f"Warning: {text}")
    _collected.clear()
    typer.echo(json_text(value, default=str))


def _on_warning(message: Warning | str, *_: Any, collect: bool, **__: Any) -> None:
    if collect:
        _collected.append(str(message))
    else:
        warn(f"Warning: {message}")


def quiet_libraries(no_bars: bool, heavy: bool = True, collect: bool = False) -> None:
    """Silence what other libraries say about themselves; warnings of ours become one line each.

    Args:
        no_bars: no progress bar at all. Otherwise downloads from the Hub show theirs.
        heavy: the command needs transformers and datasets, which are imported here.
        collect: keep warnings for `emit` to put into the JSON value.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if no_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    _collected.clear()
    warnings.showwarning = functools.partial(_on_warning, collect=collect)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    waits = logging.ERROR if no_bars or collect else logging.WARNING  # of its requests, which may take minutes
    logging.getLogger("huggingface_hub.utils._http").setLevel(waits)
    if not heavy:
        return
    import datasets
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    disabled = are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # its own, of weights being placed; and those of the Hub
    if not (disabled or no_bars):
        enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- interruption


_NOTHING = "Nothing was changed."
_kept: Callable[[], str] = lambda: _NOTHING  # noqa: E731 (what the running command says is there already)


def when_interrupted(kept: Callable[[], str]) -> None:
    """Say from now on `kept()` when the command is interrupted: what is there already, and how to go on."""
    global _kept
    _kept = kept


class Interruption:
    """Around a command: Ctrl-C and SIGTERM end it in one line, after everything else has been put in order.

    Attributes:
        code: exit code of an interrupted command, 128 plus the signal's number; None if it was not interrupted.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        when_interrupted(lambda: _NOTHING)
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in usual.items():
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == handler:
                self._before[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.code is None:  # raised by no signal of ours
            self.code = 130
        return self.code is not None

    def finish(self) -> None:
        """Say what is kept and end the program, if the command was interrupted."""
        if self.code is not None:
            warn(f"{chr(10) if sys.stderr.isatty() else ''}Interrupted. {_kept()}")
            exec("")  # CPython recalls an interrupt inside `exec`, which imports use, and would die of SIGINT at exit
            sys.exit(self.code)


def program() -> str:
    """How the user calls us: `taskres`, or `python -m taskres_hf`."""
    path = Path(sys.argv[0] if sys.argv else "")
    return (
        "python -m taskres_hf"
        if path.name == "__main__.py" and path.parent.name in ("taskres_hf", "cli")
        else "taskres"
    )


def rejection_line(rejection: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """What is known of the threshold for pictures of no class, in one line."""
    chosen = f"to reject at most {percent(rejection['rate'])} of pictures of the classes"
    line = f"Pictures of no class: threshold chosen on {rejection['pictures']} pictures {chosen}"
    if metrics.get("rejected") is None:
        return line
    kept = metrics["accuracy_of_kept"]
    right = "" if kept is None else f", accuracy on the others {percent(kept)}"
    return f"{line}; here it rejects {percent(metrics['rejected'])}{right}"
