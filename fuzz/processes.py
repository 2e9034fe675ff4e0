"""Work in forked processes: what they return, and killing them at a moment of choice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LONGEST = 120.0  # seconds that a process may take


@dataclass(frozen=True)
class Ended:
    """How a process ended: what it returned, or the text of its error; `killed` where it came to neither."""

    value: Any = None
    error: str = ""
    killed: bool = False
    seconds: float = 0.0


class Started:
    """A function that runs in a process forked from this one, which has imported everything already."""

    def __init__(self, function: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._start = time.monotonic()
        self.process = context.Process(target=_run, args=(function, sender))
        self.process.start()
        sender.close()

    def kill(self) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)

    def result(self) -> Ended:
        """Wait for the end."""
        value: Any = None
        error, killed = "", False
        try:
            if self._receiver.poll(_LONGEST):
                value, error = self._receiver.recv()
            else:
                error = f"no end within {_LONGEST:g} seconds"
                self.kill()
        except EOFError:
            killed = True
        self.process.join()
        self._receiver.close()
        return Ended(value, error, killed, time.monotonic() - self._start)


def _run(function: Callable[[], Any], sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        sender.send((function(), ""))
    except BaseException as error:
        place = traceback.format_exc().strip().splitlines()[-3:]
        sender.send((None, f"{type(error).__name__}: {error} [{' '.join(place)[:300]}]"))
    sender.close()
    os._exit(0)


def call(function: Callable[[], Any]) -> Ended:
    """Run a function in a process of its own."""
    return Started(function).result()


def together(functions: Sequence[Callable[[], Any]]) -> list[Ended]:
    """Run functions at the same time, each in a process of its own."""
    started = [Started(function) for function in functions]
    return [one.result() for one in started]
