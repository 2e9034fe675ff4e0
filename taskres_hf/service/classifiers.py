"""The classifiers that are served, by name: those of one base share it, and a picture passes it once for all."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..artifact import find_artifact, read_checked
from ..embedding.embedder import Embedder
from ..errors import BaseMismatchError, ConfigurationError, ImageError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..pictures import Remarks, read_image
from ..pool.classifiers import ClassifierPool, Source
from ..pool.naming import LONGEST_NAME, checked_name, named
from ..pool.stacked import PooledClassifier, PoolView, entry_of
from ..storage import is_path
from ..tables import visible
from .batching import Batcher, Predictions, Waiting
from .settings import ServiceSettings

Models = Mapping[str, Source] | Sequence[Source] | Source
_BASE = ("base_model_name_or_path", "base_model_revision", "base_model_subfolder")


class BusyError(ConfigurationError):
    """More pictures wait than the service takes."""


class UnknownModelError(ConfigurationError):
    """There is no classifier of that name."""


class _HeadsView(PoolView):
    """Of classifiers that no pool takes: one head after the other."""

    def __init__(self, heads: Mapping[str, Any]) -> None:
        super().__init__(torch.empty(0, 0), torch.empty(0), {name: entry_of(head) for name, head in heads.items()})
        self.heads = heads

    def logits(self, image_embeds: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        heads = [(name, self.heads[name]) for name in names or self]
        return {name: head(image_embeds.to(head.residual.device)) for name, head in heads}


class _Heads:
    """Classifiers over one image model alone, whose embeddings count by their length: asked as a `ClassifierPool`."""

    def __init__(self, first: TaskResCLIPForImageClassification, engine: str, precision: str, exact: bool) -> None:
        self.clip, self.image_processor = first.clip, first.image_processor
        self.embedder = Embedder(self.clip, self.image_processor, engine, precision, exact)
        self._view = _HeadsView({})

    def view(self) -> PoolView:
        return self._view

    def add(self, name: str, source: Source) -> None:
        """One more, loaded over the very base.

        Raises:
            ConfigurationError: it is not.
        """
        model = source if isinstance(source, TaskResCLIPForImageClassification) else None
        ours = self.image_processor.to_json_string()
        if model is None or model.clip is not self.clip or model.image_processor.to_json_string() != ours:
            raise ConfigurationError("It is no model over this base.")
        model.classifier.check_can_say_no()
        self._view = _HeadsView({**self._view.heads, name: model.classifier})

    def remove(self, name: str) -> None:
        self._view = _HeadsView({other: head for other, head in self._view.heads.items() if other != name})


class _SharedBase:
    """Classifiers over one base with one image processor, and the thread that runs it.

    Attributes:
        origin: name, commit and folder of the base, as the first of them has them. dtype: what it runs in.
    """

    def __init__(
        self,
        first: TaskResCLIPForImageClassification,
        settings: ServiceSettings,
        turn: threading.Lock,
        on_batch: Callable[[int], None],
        strength: float | None = None,
    ) -> None:
        engine, precision, exact = settings.engine, settings.precision, settings.exact_preprocessing
        self.pool = (
            ClassifierPool(
                first, engine=engine, precision=precision, exact_preprocessing=exact, strength=strength
            ) if first.config.base_classifier is None else _Heads(first, engine, precision, exact)
        )  # fmt: skip
        self.origin, self.dtype = tuple(getattr(first.config, name) for name in _BASE), _name_of(first.clip.dtype)
        self.embedder = self.pool.embedder
        self.batcher = Batcher(
            self.answer, max_batch=settings.max_batch, max_wait=settings.max_wait_ms / 1000, turn=turn,
            on_batch=on_batch,
        )  # fmt: skip

    def prepare(self, picture: PIL.Image.Image) -> dict[str, torch.Tensor]:
        """Inputs of the tower for one picture, in any thread."""
        self.embedder.preprocess.check(picture)
        return self.embedder.preprocess([picture])

    @torch.no_grad()
    def answer(self, items: Sequence[Waiting]) -> list[Predictions | Exception]:
        """Predictions of each picture by each of its classifiers, or the error that it has no scores."""
        embeds, found = self._embeds(items), [Predictions() for _ in items]
        usable = embeds.isfinite().all(dim=1)
        embeds = embeds.masked_fill(~usable[:, None], 0.0)  # it must not keep the others from their answers
        together: dict[Any, list[int]] = {}
        for place, item in enumerate(items):
            together.setdefault((id(item.view), item.names), []).append(place)
        for (_, names), places in together.items():
            view, top_k = items[places[0]].view, max(items[place].top_k for place in places)
            for name, logits in view.logits(embeds[places], names).items():
                for place, listed in zip(places, view.predictions(name, logits, top_k), strict=True):
                    found[place][name] = listed[: items[place].top_k]
        no_scores = "the picture has no scores: the model gives NaN for it."
        return [
            predictions if fine else ImageError(no_scores)
            for predictions, fine in zip(found, usable.tolist(), strict=True)
        ]

    def _embeds(self, items: Sequence[Waiting]) -> torch.Tensor:
        """Embeddings [N, D]; pictures of different sizes, where the processor makes such, pass the tower apart."""
        self.embedder.get_ready()
        shapes = [[tuple(value.shape) for value in item.inputs.values()] for item in items]
        parts: dict[int, torch.Tensor] = {}
        order = sorted(range(len(items)), key=lambda place: shapes[place])
        for _, group in groupby(order, key=lambda place: shapes[place]):
            places = list(group)
            names = items[places[0]].inputs
            inputs = {name: torch.cat([items[place].inputs[name] for place in places]) for name in names}
            parts.update(zip(places, self.embedder.engine(inputs), strict=True))
        return torch.stack([parts[place] for place in range(len(items))])


class Seats:
    """Pictures that a request has been promised an answer for; released when it is over."""

    def __init__(self, service: Classifiers) -> None:
        self._service, self.count = service, 0

    def __enter__(self) -> Seats:
        self.grow(1)
        return self

    def grow(self, to: int) -> None:
        """Take more seats.

        Raises:
            BusyError: there are none, or the service is closing.
        """
        if to > self.count:
            self._service._occupy(to - self.count)
            self.count = to

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._service._occupy(-self.count)
        self._service.given_up += kind is not None and issubclass(kind, asyncio.CancelledError)


class Classifiers:
    """Classifiers by name, and the way of a picture through them.

    Args:
        models: folders, Hub ids or loaded models, by name or named after the folder or repository.
        settings: see `ServiceSettings`.
        on_batch: told the size of each batch.
        options: `device`, `dtype`, `base_model`, and what else `from_pretrained` takes, for those that are loaded.

    Attributes:
        closed: whether it takes no more. given_up: requests that were cut off because it had to end.

    Raises:
        ConfigurationError: no classifier, two of one name, or a name that cannot be one. ArtifactError, BaseModelError,
            HubError: one cannot be loaded.
    """

    def __init__(
        self,
        models: Models,
        settings: ServiceSettings,
        on_batch: Callable[[int], None] = lambda size: None,
        **options: Any,
    ) -> None:
        self.settings, self._on_batch, self._options = settings, on_batch, options
        self._device = options.pop("device", None)
        self._served: dict[str, _SharedBase] = {}
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._occupied, self.given_up, self.closed = 0, 0, False
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="taskres-decode")
        sources = named(models)
        if not sources:
            raise ConfigurationError("There is no classifier to serve: give folders, Hub ids or loaded models.")
        for name, source in sources.items():
            self.add(name, source)

    # ---------------------------------------------------------------------- what is served

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def add(self, name: str, source: Source) -> None:
        """Serve one more, or another under a name; its base is shared where one is loaded that is the same.

        Raises:
            ConfigurationError: the name cannot be one, or the classifier gives several labels per picture and was never
                trained. ArtifactError, BaseModelError, HubError: it cannot be loaded.
        """
        checked_name(name)
        base = self._taken(name, source)
        if base is None:
            model = source if isinstance(source, TaskResCLIPForImageClassification) else self._loaded(source)
            model.train(False)
            base = self._taken(name, model)
        if base is None:
            strength = self._options.get("strength")
            base = _SharedBase(model, self.settings, self._turn, self._on_batch, strength)
            base.pool.add(name, model)  # now it says why, where it takes it no more than the others did
        self._publish(name, base)

    def remove(self, name: str) -> None:
        """Serve it no longer; what was accepted for it is answered.

        Raises:
            UnknownModelError: there is none of that name.
        """
        self.find(name)
        self._publish(name, None)

    def _publish(self, name: str, base: _SharedBase | None) -> None:
        """Let a name stand for a classifier of this base, or for none, at once for whoever reads it meanwhile."""
        with self._lock:
            before = self._served.get(name)
            kept = {other: old for other, old in self._served.items() if other != name or base is not None}
            self._served = kept if base is None else {**kept, name: base}
            if before is not None and before is not base:
                before.pool.remove(name)

    def _taken(self, name: str, source: Source) -> _SharedBase | None:
        """The base whose pool a classifier was put into; None where none takes it, whatever the reason."""
        dtype = self._facts(source)[1]
        for base in self.bases():
            with suppress(BaseMismatchError, ConfigurationError):
                if dtype in (base.dtype, "auto"):
                    base.pool.add(name, source)
                    return base
        return None

    def _facts(self, source: Source) -> tuple[tuple[Any, ...], str]:
        """Name, commit and folder of the base of a classifier, and what it runs in."""
        if isinstance(source, TaskResCLIPForImageClassification):
            return tuple(getattr(source.config, name) for name in _BASE), _name_of(source.clip.dtype)
        values = read_checked(*find_artifact(source))[0]
        return tuple(map(values.get, _BASE)), _name_of(self._options.get("dtype") or values.get("dtype") or "float32")

    def _loaded(self, source: str | os.PathLike[str]) -> TaskResCLIPForImageClassification:
        """A classifier over a base of its own, or over one that is there."""
        options, (origin, dtype) = dict(self._options), self._facts(source)
        for base in self.bases():
            if dtype in (base.dtype, "auto") and (origin == base.origin or options.get("base_model")):
                options["base_model"] = base.pool.clip
                break
        made = TaskResCLIPForImageClassification.from_pretrained(source, **options)
        return made.to(self._device) if self._device else made  # type: ignore[no-any-return]

    def find(self, name: str) -> PooledClassifier:
        """What is known of a classifier.

        Raises:
            UnknownModelError: there is none of that name.
        """
        return self._found([name])[0][1][name]

    def _found(self, names: Sequence[str]) -> list[tuple[_SharedBase, PoolView, list[str]]]:
        """Each base that these are over, its classifiers at one moment, and which of them are meant."""
        found: dict[int, tuple[_SharedBase, PoolView, list[str]]] = {}
        with self._lock:
            for name in names:
                if name not in self._served:
                    known = ", ".join(list(self._served)[:20]) + (", ..." if len(self) > 20 else "")
                    wrong = visible(name[:LONGEST_NAME])
                    raise UnknownModelError(f"There is no classifier {wrong!r}. There are: {known}.")
                base = self._served[name]
                if id(base) not in found:
                    found[id(base)] = (base, base.pool.view(), [])
                found[id(base)][2].append(name)
        return list(found.values())

    def bases(self) -> list[_SharedBase]:
        """Each base once."""
        return list({id(base): base for base in self._served.values()}.values())

    def describe(self, name: str) -> dict[str, Any]:
        """What a client may know of a classifier: no path of this machine.

        Raises:
            UnknownModelError: there is none of that name.
        """
        one = self.find(name)
        base = one.about["base_model"]
        return {
            "name": name,
            "classes": len(one.class_names),
            **one.about,
            "base_model": Path(base).name if is_path(base) else base,
            "several_labels": one.several_labels,
            "label_threshold": one.threshold if one.several_labels else None,
        }

    def class_names(self, name: str) -> list[str]:
        """Its classes in label order."""
        return list(self.find(name).class_names)

    # ---------------------------------------------------------------------- classifying

    def seats(self) -> Seats:
        """Room for a request: `with service.seats() as seats: seats.grow(len(pictures))`."""
        return Seats(self)

    def _occupy(self, count: int) -> None:
        with self._lock:
            if count > 0 and (self.closed or self._occupied + count > self.settings.max_queue):
                why = "is shutting down" if self.closed else f"answers {self._occupied} pictures already"
                raise BusyError(f"The service {why}. Try again in a moment.")
            self._occupied += count

    @property
    def occupied(self) -> int:
        """Pictures that were accepted and are not answered."""
        return self._occupied

    def start(self, read: Callable[[], bytes], names: Sequence[str], top_k: int) -> list[Future[Predictions]]:
        """Classify one picture by several classifiers.

        Args:
            read: gives the picture's bytes, in a thread that decodes. names: classifiers. top_k: classes of each.

        Returns:
            Predictions by name, one future a base. Each may hold an `ImageError` instead.

        Raises:
            UnknownModelError: there is no such classifier.
        """
        jobs = [(base, Waiting(view, tuple(asked), top_k)) for base, view, asked in self._found(names)]
        for base, _ in jobs:
            base.batcher.expect()
        self._pool.submit(_decode, read, jobs)
        return [job.future for _, job in jobs]

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """What a function returns, run where pictures are decoded."""
        return await asyncio.wrap_future(self._pool.submit(function))

    def warm_up(self) -> None:
        """Let a picture pass every base, so that the first request does not wait for what is made once."""
        for base in self.bases():
            with self._turn:
                base.embedder([PIL.Image.new("RGB", (64, 64), (127, 127, 127))])

    def close(self) -> None:
        """Take nothing more, and answer what was accepted."""
        self.closed = True
        self._pool.shutdown(wait=True)
        for base in self.bases():
            base.batcher.close()


def _decode(read: Callable[[], bytes], jobs: Sequence[tuple[_SharedBase, Waiting]]) -> None:
    """Read a picture once and hand it to every base that is to see it."""
    left = list(jobs)
    try:
        if all(job.future.cancelled() for _, job in jobs):
            raise ImageError("nobody waits for it any more")
        picture = read_image({"bytes": read()}, remarks=Remarks())
        while left:
            base, job = left[0]
            job.inputs = base.prepare(picture)
            base.batcher.put(left.pop(0)[1])
    except Exception as error:
        for base, job in left:
            base.batcher.give_up()
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
