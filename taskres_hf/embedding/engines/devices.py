"""A frozen image tower on an accelerator: its precision, batches that fit its memory, copies beside it, CUDA graphs.

Pictures wait in pinned memory, are copied on a stream of their own while the batch before passes the tower, and
embeddings come back behind the batch after. Batches have one size, so what the tower launches is recorded once, as a
CUDA graph, and replayed: `torch.compile(mode="reduce-overhead")` would record the same after minutes of compiling with
a compiler that many machines lack, and anew for each tower.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .rewriting import image_side_state, num_patches, watched_module

_TOKENS = 1 << 16  # of a pass from which a GPU has enough to do
SMALLEST_BATCH = 32  # that pictures are filled up to, where memory allows
_LARGEST_BATCH = 1024
_SHARE = 0.4  # of the free memory that a pass may take: a recorded pass keeps as much again, and inputs wait beside it
_PROBED = 8  # pictures that pass the tower to see what one takes
_WARM_UP = 2  # passes before recording one: libraries choose their ways and ask for memory in the first
_UNDER_WAY = 2  # batches: one in the tower, one on its way there

Inputs = Mapping[str, Tensor]
_N = TypeVar("_N")
_P = TypeVar("_P")


def device_of(base: PreTrainedModel) -> torch.device:
    """The device of an image tower."""
    return next(getattr(base, "vision_model", base).parameters()).device


def is_accelerator(device: torch.device) -> bool:
    """Whether a tower runs beside the processor rather than on it."""
    return device.type != "cpu"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bf16 natively."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # what torch asks is the current one
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def largest_batch(base: PreTrainedModel, device: torch.device) -> int:
    """Pictures a pass that keep a device busy; more would only take memory."""
    if device.type != "cuda":
        return SMALLEST_BATCH
    return max(SMALLEST_BATCH, min(_LARGEST_BATCH, _power_below(_TOKENS // num_patches(base))))


def _power_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def _power_above(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer pictures at a time may help, as Accelerate's `find_executable_batch_size` tells it."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )


class _Accelerator:
    """A device that is given one batch after the other and waited for, as every kind of device can be."""

    pins = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def moved(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs on the device."""
        return {name: value.to(self.device) for name, value in inputs.items()}

    def back(self, embeds: Tensor) -> Callable[[], Tensor]:
        """What waits for embeddings and gives them, on the CPU."""
        host = embeds.float().cpu()
        return lambda: host

    def record(self, forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[Inputs], Tensor] | None:
        """What replays a pass for inputs of these shapes; None where the device cannot."""
        return None

    def free(self) -> int | None:
        """Bytes that can be had; None where the device does not say."""
        return None

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes that a pass takes at its peak beside what is there before."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return when the device has done what it was given."""

    def release(self) -> None:
        """Give back memory that nothing uses."""


class _Cuda(_Accelerator):
    """A CUDA device (or ROCm's, which torch calls the same); never synchronised but by what waits for embeddings."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)

    def moved(self, inputs: Inputs) -> dict[str, Tensor]:
        with torch.cuda.stream(self._copies):
            found = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._copies)
        for value in found.values():
            value.record_stream(here)  # so that its memory is not given away while the tower reads it
        return found

    def back(self, embeds: Tensor) -> Callable[[], Tensor]:
        embeds = embeds.float()
        host = torch.empty(embeds.shape, pin_memory=True)
        host.copy_(embeds, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            done.synchronize()
            return host.clone()  # pinned memory is scarce, and embeddings may be held for long

        return wait

    def record(self, forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[Inputs], Tensor] | None:
        here, beside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        kept = {name: value.clone() for name, value in inputs.items()}
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                forward(kept)
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):  # others may go on meanwhile
            embeds = forward(kept)

        def replay(given: Inputs) -> Tensor:
            for name, value in given.items():
                kept[name].copy_(value)
            graph.replay()
            return embeds

        return replay

    def free(self) -> int | None:
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused

    def peak(self, run: Callable[[], Any]) -> int:
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()


class DeviceTower:
    """An image tower on an accelerator: call it with inputs for embeddings [B, D] fp32 on the CPU, or `submit` them.

    Args:
        base: the model. forward: inputs on its device to embeddings, in the form that runs. device: where it is.
    """

    def __init__(
        self, base: PreTrainedModel, forward: Callable[[Inputs], Tensor], device: _Accelerator | torch.device
    ) -> None:
        self._base, self._forward = base, forward
        if isinstance(device, torch.device):
            device = _Cuda(device) if device.type == "cuda" else _Accelerator(device)
        self._on = device
        self.device, self.pins = device.device, device.pins
        self._lock = threading.Lock()
        self._bytes = 0  # that a picture takes
        self._can_record = True
        self._forget()

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        return self._forward(moved).float().cpu()

    def _forget(self) -> None:
        self._replay: Callable[[Inputs], Tensor] | None = None
        self._recorded: Any = None  # shapes and tower that the recorded pass holds for
        self._last: Any = None  # those of the batch before

    def release(self) -> None:
        """Give back what memory can be."""
        with self._lock:
            self._on.wait()  # a recorded pass may not go while it runs
            self._forget()
            self._on.release()

    @torch.no_grad()
    def submit(self, inputs: Inputs, finish: Callable[[Inputs], Inputs] = lambda moved: moved) -> Callable[[], Tensor]:
        """Let a batch pass the tower, and return what waits for its embeddings [B, D] fp32 on the CPU.

        Args:
            inputs: on the CPU, pinned where `pins`. finish: makes of them, on the device, what the tower takes.
        """
        with self._lock:  # a recorded pass has one place for its inputs
            return self._on.back(self._run(finish(self._on.moved(inputs))))

    def _run(self, inputs: Inputs) -> Tensor:
        if not self._can_record:
            return self._forward(inputs)
        shapes = [(name, value.shape, value.dtype) for name, value in inputs.items()]
        form = (shapes, image_side_state(self._base))  # of a tower that was changed another pass is recorded
        if self._replay is None or form != self._recorded:
            if form != self._last:
                self._last = form
                return self._forward(inputs)
            self._record(inputs)
            self._recorded = form
        return self._forward(inputs) if self._replay is None else self._replay(inputs)

    def _record(self, inputs: Inputs) -> None:
        """Record a pass, where nothing takes part in it that a replay would leave out."""
        self._on.wait()
        self._replay = None
        if watched_module(self._base) is None and not self._base.training:
            try:
                self._replay = self._on.record(self._forward, inputs)
            except Exception as error:  # of whatever kind: the tower runs as it is, where a real error comes up again
                logging.getLogger(__name__).info("The image tower is not recorded as a CUDA graph: %s", error)
        if self._replay is None:
            self._can_record = False
            self._on.release()

    def batch_size(self, pictures: int, most: int, example: Inputs) -> int:
        """Pictures a pass for a job of so many: a power of two that memory has room for, at most `most`.

        Args:
            example: inputs of some pictures, on the CPU.
        """
        wanted = min(most, max(_power_above(pictures), SMALLEST_BATCH))
        if self._on.free() is None:
            return wanted
        with self._lock:
            self._bytes = self._bytes or self._probe(example)
        return min(wanted, _power_below(int(_SHARE * (self._on.free() or 0)) // self._bytes))

    def _probe(self, example: Inputs) -> int:
        """Bytes that a picture takes while it passes the tower."""
        count = _PROBED
        while True:
            some = {name: value[:1].expand(count, *value.shape[1:]) for name, value in example.items()}
            try:
                self(some)  # libraries ask for memory of their own
                return max(self._on.peak(lambda some=some: self(some)) // count, 1)  # type: ignore[misc]
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            self._on.release()
            count //= 2


def embed_ahead(
    tower: DeviceTower,
    found: Iterator[tuple[_N, _P]],
    size: int,
    collate: Callable[[list[_P]], Inputs],
    finish: Callable[[Inputs], Inputs],
    pad_to: int | None = None,
    apart: Callable[[_N], Any] = lambda name: None,
) -> Iterator[tuple[Sequence[_N], Tensor]]:
    """Names and embeddings [B, D] of prepared pictures, in order; while a batch passes the tower the next is copied.

    A batch that finds no memory is halved, and so are those that follow; what was embedded stays.

    Args:
        size: pictures of a batch. collate: makes inputs of a batch, on the CPU. finish: see `DeviceTower.submit`.
        pad_to: fill smaller batches up to so many pictures; by default to a whole batch. apart: pictures for
            whose names it differs are of different batches.
    """
    under_way: deque[tuple[list[_N], Callable[[], Tensor]]] = deque()
    again: deque[tuple[_N, _P]] = deque()

    def following() -> list[tuple[_N, _P]]:
        batch: list[tuple[_N, _P]] = []
        while len(batch) < size and (pair := again.popleft() if again else next(found, None)) is not None:
            if batch and apart(pair[0]) != apart(batch[0][0]):
                again.appendleft(pair)
                break
            batch.append(pair)
        return batch

    while batch := following():
        prepared = [picture for _, picture in batch]
        missing = max(min(size if pad_to is None else pad_to, size) - len(batch), 0)
        try:
            wait = tower.submit(collate(prepared + prepared[-1:] * missing), finish)
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            fits = False
        else:
            fits = True
            under_way.append(([name for name, _ in batch], wait))
        while len(under_way) >= (_UNDER_WAY if fits else 1):
            yield _waited(under_way.popleft())
        if not fits:  # here, where no error holds what it was raised beside
            again.extendleft(reversed(batch))
            size = max((len(batch) + missing) // 2, 1)
            tower.release()
    yield from map(_waited, under_way)


def _waited(pair: tuple[list[_N], Callable[[], Tensor]]) -> tuple[Sequence[_N], Tensor]:
    names, wait = pair
    return names, wait()[: len(names)]
