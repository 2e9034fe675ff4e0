"""Micro-batching: pictures of many requests pass the tower together, in one thread.

The queue is a deque under a condition rather than asyncio's: decoding threads fill it, the thread of the tower empties
it, and the event loop, of which there may be any, hears of the answer alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..pool.stacked import PoolView

_IDLE = 60.0  # seconds after which the thread ends, and with it what it keeps of a base that is served no longer
Predictions = dict[str, list[dict[str, Any]]]  # by classifier


@dataclass
class Waiting:
    """One prepared picture and who is to classify it.

    Attributes:
        view: of the classifiers when it was accepted. names: those that are to answer. top_k: classes wanted of each.
        inputs: of the tower, [1, ...] each. future: its predictions by name, or the error.
    """

    view: PoolView
    names: tuple[str, ...]
    top_k: int
    inputs: dict[str, Tensor] = field(default_factory=dict)
    future: Future[Predictions] = field(default_factory=Future)


class Batcher:
    """Collects pictures and answers them batch by batch.

    A batch begins when the tower is free and a picture is there. It waits for others up to `max_wait` seconds, but only
    while some are being decoded or as long as it is smaller than the last one was: one client alone never waits.

    Args:
        answer: predictions, or an error, of each picture of a batch; one call at a time.
        max_batch, max_wait: pictures and seconds.
        turn: held while a batch is answered, so that the batchers of several bases take turns on the processor.
        on_batch: told the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Waiting]], Sequence[Predictions | Exception]],
        *,
        max_batch: int,
        max_wait: float,
        turn: threading.Lock,
        on_batch: Callable[[int], None],
    ) -> None:
        self._answer, self._max_batch, self._max_wait = answer, max_batch, max_wait
        self._turn, self._on_batch = turn, on_batch
        self._changed = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self._coming = 0  # pictures that are being decoded
        self._last = 1  # size of the last batch
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Pictures that wait for the tower."""
        return len(self._queue)

    def expect(self) -> None:
        """A picture is being decoded; `put` or `give_up` follows."""
        with self._changed:
            self._coming += 1

    def give_up(self) -> None:
        """It cannot be decoded."""
        with self._changed:
            self._coming -= 1
            self._changed.notify()

    def put(self, item: Waiting) -> None:
        """It is decoded and wants an answer."""
        with self._changed:
            self._coming -= 1
            if self._closed:
                item.future.cancel()
                return
            self._queue.append(item)
            if self._thread is None or not self._thread.is_alive():  # none is left of it in a forked process
                self._thread = threading.Thread(target=self._work, name="taskres-tower", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Answer what was put, then end the thread; nothing is taken any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _work(self) -> None:
        while self._gathered():
            with self._turn:
                batch = self._taken()
                if batch:
                    self._on_batch(len(batch))
                    self._run(batch)

    def _gathered(self) -> bool:
        """Wait for a batch to begin and for its company; False when there is none, and the thread ends."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closed, _IDLE) or not self._queue:
                self._thread = None
                return False
            end = time.monotonic() + self._max_wait
            while not self._closed and len(self._queue) < self._max_batch:
                left = end - time.monotonic()
                if left <= 0 or (self._coming <= 0 and len(self._queue) >= self._last):
                    break
                self._changed.wait(left)
            return True

    def _taken(self) -> list[Waiting]:
        """Up to `max_batch` pictures, without those that nobody waits for any more."""
        batch: list[Waiting] = []
        with self._changed:
            while self._queue and len(batch) < self._max_batch:
                item = self._queue.popleft()
                if item.future.set_running_or_notify_cancel():
                    batch.append(item)
            self._last = max(len(batch), 1)
        return batch

    def _run(self, batch: Sequence[Waiting]) -> None:
        try:
            answers = self._answer(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for item in batch:  # whichever it was, it must not spoil its neighbours
                self._run([item])
            return
        for item, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                item.future.set_exception(answer)
            else:
                item.future.set_result(answer)
