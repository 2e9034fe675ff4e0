"""The classifiers that are served, by name: those of one base share it, and a picture passes it once for all."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..artifact import find_artifact, read_checked
from ..embedding.embedder import Embedder
from ..errors import ConfigurationError, ImageError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..pictures import Remarks, read_image
from ..pool.naming import LONGEST_NAME, as_name
from ..residual import label_threshold
from ..storage import is_path
from ..tables import visible
from .batching import Batcher, Predictions, Waiting
from .settings import ServiceSettings

Source = str | os.PathLike[str] | TaskResCLIPForImageClassification
Models = Mapping[str, Source] | Sequence[Source] | Source
_BASE = ("base_model_name_or_path", "base_model_revision", "base_model_subfolder")


class BusyError(ConfigurationError):
    """More pictures wait than the service takes."""


class UnknownModelError(ConfigurationError):
    """There is no classifier of that name."""


class _SharedBase:
    """One base with one image processor, and the thread that runs it."""

    def __init__(
        self,
        model: TaskResCLIPForImageClassification,
        settings: ServiceSettings,
        turn: threading.Lock,
        on_batch: Callable[[int], None],
    ) -> None:
        exact = settings.exact_preprocessing
        processor = model.image_processor
        self.embedder = Embedder(model.clip, processor, settings.engine, settings.precision, exact)
        self.key = _key_of(model)
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
        wanted: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
        for place, item in enumerate(items):
            for name, head in item.heads.items():
                wanted.setdefault(id(head), (head, []))[1].append((place, name))
        for head, users in wanted.values():
            names = head.config.class_names
            top_k = min(max(items[place].top_k for place, _ in users), len(names))
            logits = head(embeds[[place for place, _ in users]].to(head.residual.device))
            # As `pipeline`, which has a sigmoid for several labels per picture and for a classifier of one class.
            shares = logits.sigmoid() if head.several_labels or len(names) == 1 else logits.softmax(dim=1)
            scores, labels = (values.tolist() for values in shares.cpu().topk(top_k, dim=1))
            for row, (place, name) in enumerate(users):
                pairs = zip(labels[row], scores[row], strict=True)
                listed = [{"label": names[label], "score": score} for label, score in pairs]
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
        self._served: dict[str, tuple[TaskResCLIPForImageClassification, _SharedBase]] = {}
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._occupied, self.given_up, self.closed = 0, 0, False
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="taskres-decode")
        named = _named(models)
        if not named:
            raise ConfigurationError("There is no classifier to serve: give folders, Hub ids or loaded models.")
        for name, source in named.items():
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
        if not isinstance(name, str) or not name or name != as_name(name):
            raise ConfigurationError(
                f"A classifier cannot be served as {visible(str(name)[:LONGEST_NAME])!r}: a name has letters, digits, "
                f"'.', '_' and '-', at most {LONGEST_NAME}. Name it, as {{'pets': 'folder'}} or pets=folder."
            )
        model = source if isinstance(source, TaskResCLIPForImageClassification) else self._loaded(source)
        model.classifier.check_can_say_no()
        model.train(False)
        key = _key_of(model)
        shared = next((base for _, base in self._served.values() if base.key == key), None)
        shared = shared or _SharedBase(model, self.settings, self._turn, self._on_batch)
        self._served = {**self._served, name: (model, shared)}  # at once, for whoever reads it meanwhile

    def remove(self, name: str) -> None:
        """Serve it no longer; what was accepted for it is answered.

        Raises:
            UnknownModelError: there is none of that name.
        """
        self.find(name)
        self._served = {other: entry for other, entry in self._served.items() if other != name}

    def _loaded(self, source: str | os.PathLike[str]) -> TaskResCLIPForImageClassification:
        options = dict(self._options)
        values = read_checked(*find_artifact(source))[0]
        for model, _ in self._served.values():
            same = all(values.get(name) == getattr(model.config, name) for name in _BASE) or options.get("base_model")
            dtype = str(options.get("dtype") or values.get("dtype") or "float32").removeprefix("torch.")
            if same and dtype in (str(model.clip.dtype).removeprefix("torch."), "auto"):
                options["base_model"] = model.clip
                break
        made = TaskResCLIPForImageClassification.from_pretrained(source, **options)
        return made.to(self._device) if self._device else made  # type: ignore[no-any-return]

    def find(self, name: str) -> tuple[TaskResCLIPForImageClassification, _SharedBase]:
        """A classifier and its base.

        Raises:
            UnknownModelError: there is none of that name.
        """
        served = self._served
        if name not in served:
            known = ", ".join(list(served)[:20]) + (", ..." if len(served) > 20 else "")
            raise UnknownModelError(f"There is no classifier {visible(name[:LONGEST_NAME])!r}. There are: {known}.")
        return served[name]

    def bases(self) -> list[_SharedBase]:
        """Each base once."""
        return list({id(base): base for _, base in self._served.values()}.values())

    def describe(self, name: str) -> dict[str, Any]:
        """What a client may know of a classifier: no path of this machine.

        Raises:
            UnknownModelError: there is none of that name.
        """
        config = self.find(name)[0].classifier.config
        base = str(config.base_model_name_or_path or "")
        training = config.training or {}
        return {
            "name": name,
            "classes": len(config.class_names),
            "base_model": Path(base).name if is_path(base) else base,
            "base_revision": config.base_model_revision,
            "recipe": training.get("recipe") or training.get("method"),
            "shots": (config.few_shot or {}).get("shots"),
            "strength": float(config.strength),
            "several_labels": self.find(name)[0].classifier.several_labels,
            "label_threshold": label_threshold(config.facts) if self.find(name)[0].classifier.several_labels else None,
        }

    def class_names(self, name: str) -> list[str]:
        """Its classes in label order."""
        return list(self.find(name)[0].classifier.config.class_names)

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
        jobs: dict[int, tuple[_SharedBase, Waiting]] = {}
        for name in names:
            model, base = self.find(name)
            head = model.classifier
            _, job = jobs.setdefault(id(base), (base, Waiting({}, top_k)))
            job.heads = {**job.heads, name: head}
        for base, _ in jobs.values():
            base.batcher.expect()
        self._pool.submit(_decode, read, list(jobs.values()))
        return [job.future for _, job in jobs.values()]

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


def _key_of(model: TaskResCLIPForImageClassification) -> tuple[int, str]:
    """What classifiers must have in common to be served from one embedding."""
    return id(model.clip), model.image_processor.to_json_string()


def _told(source: Any) -> str:
    return "a loaded model" if isinstance(source, TaskResCLIPForImageClassification) else visible(os.fspath(source))


def _named(models: Models) -> dict[str, Source]:
    """Classifiers by name; those without one are named after their folder or repository."""
    if isinstance(models, Mapping):
        return dict(models)
    alone = isinstance(models, (str, os.PathLike, TaskResCLIPForImageClassification))
    found: dict[str, Source] = {}
    for source in [models] if alone else models:  # type: ignore[union-attr]
        if isinstance(source, TaskResCLIPForImageClassification):
            where = str(source.config._name_or_path or "classifier")
        else:
            where = os.fspath(source)  # type: ignore[arg-type]
        name, sign, rest = where.partition("=")
        if sign and not os.path.exists(where) and isinstance(source, str):
            source, where = rest, name
        name = as_name((Path(where).resolve() if os.path.isdir(where) else Path(where)).name)
        if not name:
            raise ConfigurationError(f"{visible(where)!r} gives no name to serve it by: say NAME={visible(where)}.")
        if name in found:
            raise ConfigurationError(
                f"Two classifiers would be served as {name!r}: {_told(found[name])} and {_told(source)}. Name them, as "
                f"in {{{name!r}: ..., '{name}-2': ...}} or {name}-2=FOLDER."
            )
        found[name] = source  # type: ignore[assignment]
    return found
