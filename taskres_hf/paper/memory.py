"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Around a piece of work: the most memory that it held beyond what was held before it.

    Counted is what the operating system gives this process (Linux) and what torch takes of the first CUDA device, which
    are added. Memory that an allocator kept from earlier work and uses again is handed back before the start where the
    C library can do so; where it cannot, it does not count. Elsewhere than on Linux nothing is known.

    Attributes:
        bytes: None where it cannot be told.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect(1)  # all generations would take longer than most fits
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self._before: int | None = None
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from here
            self._before = _held("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = _held("VmHWM") if self._before is not None else None
        if peak is None or self._before is None:
            return
        self.bytes = max(peak - self._before, 0)
        if torch.cuda.is_available():
            self.bytes += max(torch.cuda.max_memory_allocated() - self._device, 0)


def _held(name: str) -> int | None:
    """A line of the process's status, in bytes."""
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None
