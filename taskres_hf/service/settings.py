"""Limits and defaults of the service: one place, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import ConfigurationError

# Name: smallest and largest value that makes sense; whole numbers where the default is one.
_RANGES = {
    "max_batch": (1, 4096), "max_wait_ms": (0, 10_000), "max_body_mb": (0.001, 4096), "max_pictures": (1, 10_000),
    "max_queue": (1, 1_000_000), "timeout_s": (0.05, 3600), "top_k": (1, 1_000_000), "decode_threads": (1, 256),
}  # fmt: skip


@dataclass(frozen=True)
class ServiceSettings:
    """What the service takes and how it works.

    Args:
        max_batch: pictures that pass the tower together, at most.
        max_wait_ms: how long the first picture of a batch waits for others, at most. One that comes alone, after one
            that came alone, does not wait.
        max_body_mb: size of a request's body, in units of 1,000,000 bytes.
        max_pictures: pictures in one request; never more than `max_queue`.
        max_queue: pictures accepted and not answered yet, of all requests; beyond them the answer is 503. A request
            that is still being read counts as one. `max_queue * max_body_mb` bounds the memory that bodies take.
        timeout_s: seconds from the first byte of a request to its answer; then 408 (still being read) or 504.
        top_k: classes per picture where a request does not say, as in `pipeline`.
        decode_threads: threads that decode pictures; by default one a core, at most 8.
        engine, precision: what runs the tower, see `embedding.engines`; the defaults give what `pipeline` gives.
        exact_preprocessing: prepare pictures with the stock image processor, as `pipeline` does; False: as
            `taskres predict` does, within two grey levels, and faster.
        access_log: one line a request, to the logger `taskres_hf.service.access`.
        log_file_names: with the names of uploaded files, which may be personal.

    Raises:
        ConfigurationError: a value out of range.
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_body_mb: float = 10.0
    max_pictures: int = 32
    max_queue: int = 128
    timeout_s: float = 30.0
    top_k: int = 5
    decode_threads: int = min(os.cpu_count() or 1, 8)
    engine: str = "torch"
    precision: str = "fp32"
    exact_preprocessing: bool = True
    access_log: bool = True
    log_file_names: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value, whole = getattr(self, name), isinstance(getattr(type(self), name), int)
            fits = isinstance(value, int if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
            if not fits or not low <= value <= high:
                kind = "whole number" if whole else "number"
                raise ConfigurationError(f"`{name}` must be a {kind} from {low:g} to {high:,}; got {value!r}.")

    @property
    def max_body(self) -> int:
        """Bytes of a body."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def most_pictures(self) -> int:
        """Pictures of one request: with more than the queue has room for, trying again would never help."""
        return min(self.max_pictures, self.max_queue)

    @classmethod
    def of(cls, values: dict[str, Any]) -> ServiceSettings:
        """Settings by name.

        Raises:
            ConfigurationError: an unknown name, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
                raise ConfigurationError(f"The service has no setting {name!r}; {hint}")
        return cls(**values)
