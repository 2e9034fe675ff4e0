"""What this machine's processor is, and how fast it multiplies: measured on it and kept, not looked up by its kind.

Instructions for a number type do not make it fast: processors that multiply bf16 natively were met that take nearly
twice as long for it as for fp32, and others that take half.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .errors import ArtifactError
from .storage import cache_root, read_sealed, write_sealed

_FLAGS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "bf16",
    "sve",
)  # fmt: skip
_HOLD = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # variables that libraries read
_PACKAGES = ("torch", "transformers", "openvino", "onnxruntime")
_FASTER = 1.2  # times as fast as fp32 from which another number type pays
_ROWS, _WIDTH = 200, 768  # of the product that is timed: four pictures in a layer of ViT-B/32
_ROUNDS = 6


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of Linux's list."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in lines)
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def processor() -> str:
    """Its name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def abilities() -> list[str]:
    """What the processor has of the instructions that towers run faster with; the machine's kind where none is told."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return [flag for flag in _FLAGS if flag in flags] or [platform.machine()]


# ---------------------------------------------------------------------- how fast it multiplies


def speed_of(dtype: torch.dtype, anew: bool = False) -> float:
    """How many times as fast as fp32 products of a number type are here, by torch.

    Of the two, the best of a few rounds each, in turn: hundredths of a second, once a machine, and `anew` on request.
    """
    return measured(f"products in {dtype}", lambda: _speed_of(dtype), anew)


def is_faster(dtype: torch.dtype) -> bool:
    """Whether a number type pays: products in it take less time than in fp32, and by more than chance."""
    return speed_of(dtype) >= _FASTER


def _speed_of(dtype: torch.dtype) -> float:
    rows = torch.rand(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(0))
    weight = rows.T @ rows / _ROWS
    other = rows.to(dtype), weight.to(dtype)
    try:
        F.linear(*other)
    except RuntimeError:  # torch cannot multiply it here
        return 0.0
    return times_faster(lambda: F.linear(*other), lambda: F.linear(rows, weight))


def measured(what: str, measure: Callable[[], float], anew: bool = False) -> float:
    """A ratio that was measured on this machine, or is now; the same in all later processes."""
    key = _key(what)
    if anew or key not in _MEASURED:
        kept = None if anew else recalled(what)
        if not isinstance(kept, float):
            kept = round(measure(), 3)
            keep(what, kept)
        _MEASURED[key] = kept
    return _MEASURED[key]


_MEASURED: dict[str, float] = {}  # in this process


def times_faster(way: Callable[[], Any], than: Callable[[], Any]) -> float:
    """How many times less one thing takes than another; both a few milliseconds."""
    best = [float("inf"), float("inf")]
    with torch.no_grad():
        for _ in range(_ROUNDS):  # the first warms up, and is hardly ever the best
            for place, run in enumerate((way, than)):
                start = time.perf_counter()
                run()
                best[place] = min(best[place], time.perf_counter() - start)
    return best[1] / best[0]


# ---------------------------------------------------------------------- what was measured


def recalled(what: Any) -> Any:
    """What `keep` was given on this machine, with these libraries; None if nothing."""
    return _all().get(_key(what))


def keep(what: Any, value: Any) -> None:
    """Keep what was measured for the next time; where that cannot be, it is measured again."""
    with suppress(ArtifactError):
        write_sealed(_file(), {**_all(), _key(what): value})


def _all() -> dict[str, Any]:
    try:
        return read_sealed(_file())
    except ArtifactError:
        return {}


def _file() -> Path:
    return cache_root() / "engines.json"


def _key(what: Any) -> str:
    """What a speed depends on beside the thing itself: the processor, what libraries may use of it, and these."""
    held_to = [torch.backends.cpu.get_cpu_capability(), *map(os.environ.get, _HOLD)]  # may be less than it has
    return json.dumps([3, processor(), held_to, os.cpu_count(), _versions(), what])


def _versions() -> list[str | None]:
    return [torch.__version__, *map(_version, _PACKAGES[1:])]


@cache
def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
