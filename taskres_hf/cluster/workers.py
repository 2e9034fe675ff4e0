"""What one worker does with a block: read, decode, embed, classify, write. It is the same alone and in a cluster."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..embedding.embedder import Embedder
from ..encoders import BaseSource, load_image_processor
from ..errors import ConfigurationError, DataError, ImageError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..pictures import Remarks, picture_digest, read_image
from ..pool import ClassifierPool, is_pack
from ..predicting import best_answers, classes_given
from ..prediction_files import as_utf8
from ..storage import digest_of
from ..vision.tower import is_image_tower_at, load_tower
from .inputs import Block, Row, read_rows
from .outputs import may_try, no_longer_tried, write_part

_NUMBERS = {"fp32": "float32", "fp16": "float16"}


@dataclass
class Job:
    """What every worker is told; plain values, so that any process can be.

    Attributes:
        kind: `embed` or `predict`. model: base, or classifiers (folders, Hub ids, a packed file). output: the folder.
        loading: how to load the model. device: None for the fastest. engine, precision: see `embedding.engines`.
        batch_size: pictures a forward pass; None for the engine's best. numbers: `fp32` or `fp16` of embeddings.
        answering: `top_k`, `reject`, `unknown`, `names`. column, keep: as in `find_inputs`.
        run: digest of the run; empty before it is known. model_digest: what the model must be.
    """

    kind: str
    model: Any
    output: str
    loading: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    engine: str = "torch"
    precision: str = "fp32"
    batch_size: int | None = None
    numbers: str = "fp32"
    answering: dict[str, Any] = field(default_factory=dict)
    column: str | None = None
    keep: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    model_digest: str = ""


class Worker:
    """A loaded model that does blocks.

    Attributes:
        digest: of the model: base, image processor and classifiers. dim: D. batch_size: pictures a forward pass.

    Raises:
        ConfigurationError: the model is another one than the job says, as where machines hold other files.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        clip, processor, facts = self._load()
        self.embedder = Embedder(clip, processor, job.engine, job.precision)
        self.embedder.get_ready()
        self.batch_size = job.batch_size or self.embedder.batch_size
        self.dim = 0 if job.kind != "embed" else int(self.embedder([PIL.Image.new("RGB", (64, 64))]).shape[1])
        parts = [self.embedder.key[0], str(clip.dtype), processor.to_json_string(), *facts]
        self.digest = digest_of(part.encode() for part in parts)
        if job.model_digest and job.model_digest != self.digest:
            raise ConfigurationError(
                f"A worker loads another {job.model} than the process that began the run: its weights, its image "
                "processor or its classifiers differ. Put the same files on all machines."
            )

    def _load(self) -> tuple[Any, Any, list[str]]:
        """Image tower, image processor, and what tells the classifiers from others."""
        job = self.job
        self.answer: Any = None
        if job.kind == "embed":
            return (*_base(job), [])
        several = isinstance(job.model, (list, tuple)) or is_pack(job.model)
        self.answer = (_Several if several else _One)(job)
        return self.answer.clip, self.answer.image_processor, self.answer.facts

    def __call__(self, block: Block) -> dict[str, Any]:
        """Do a block; returns what its part says, or under `problem` why its file cannot be read."""
        here = {"number": block.number, "source": block.source}
        if not may_try(self.job.output, block.number):
            return {**here, "problem": f"{block.source}, block {block.number}, ended its worker again and again."}
        try:
            return self._do(block)
        except DataError as error:
            return {**here, "problem": str(error)}
        finally:  # not where the process dies
            no_longer_tried(self.job.output, block.number)

    def _do(self, block: Block) -> dict[str, Any]:
        remarks, counts = Remarks(), {"rows": 0, "errors": 0}
        columns, digests, errors = _Columns(self), [], []
        for rows, embeds in self._stream(block, remarks):
            for row, values in zip(rows, self._values(rows, embeds), strict=True):
                columns.add(row, values)
                digests.append(row.digest.encode())
                counts["rows"] += len(values)
                if row.error:
                    counts["errors"] += 1
                    errors.append(row.error)
        facts = {
            **counts, "pictures": len(digests), "pictures_sha256": digest_of(digests),
            "first": block.first, "engine": self.embedder.engine.name,
        }  # fmt: skip
        said = write_part(self.job.output, block, self.job.run, columns.arrays(), facts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            remarks.warn()
        return {**said, "messages": errors[:20], "remarks": [str(one.message) for one in caught]}

    def _stream(self, block: Block, remarks: Remarks) -> Iterator[tuple[Sequence[Row], Any]]:
        rows = read_rows(block, self.job.column, list(self.job.keep))

        def load(row: Row) -> PIL.Image.Image | None:
            if row.error is not None:
                row.error = f"{row.name}: {row.error}"
                return None
            try:
                row.digest = _digest(row)
                picture = read_image(row.cell, remarks=remarks)
                self.embedder.preprocess.check(picture)
            except ImageError as error:
                row.error, row.digest = f"{row.name}: {error}", ""
                return None
            finally:
                row.cell = None  # the bytes are not needed any more
            return picture

        # Every batch has the same size, so that no embedding depends on how a data set is cut.
        yield from self.embedder.stream(_batched(rows, self.batch_size), load, augmented=False, pad_to=self.batch_size)

    def _values(self, rows: Sequence[Row], embeds: Any) -> Iterator[list[dict[str, Any]]]:
        """What is written of each row: one set of values, or one a classifier."""
        found: Iterator[list[dict[str, Any]]] = iter(())
        usable: Iterator[bool] = iter(())
        if embeds is not None:
            finite = embeds.isfinite().all(dim=1)
            usable = iter(finite.tolist())
            known = embeds.masked_fill(~finite[:, None], 0.0)
            found = iter([[{"embedding": one}] for one in known]) if self.answer is None else self.answer(known)
        nothing = [{"embedding": None}] if self.answer is None else self.answer.nothing
        for row in rows:
            values = nothing if row.error else next(found)
            if not row.error and not next(usable):
                what = "embedding" if self.answer is None else "scores"
                row.error, values = f"{row.name} has no {what}: the model gives NaN for it.", nothing
            yield values


def _digest(row: Row) -> str:
    """Of the picture's content; of an address none, which would be fetched twice."""
    cell = row.cell
    return "" if isinstance(cell, str) and not os.path.isfile(cell) else picture_digest(cell)


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _base(job: Job) -> tuple[Any, Any]:
    """The image tower of a dual encoder or of an image model alone, and its processor."""
    options = dict(job.loading)
    dtype, trusted = options.pop("dtype", None) or "float32", options.pop("trust_remote_code", False)
    revision = options.pop("revision", None)
    source = BaseSource(str(job.model), revision, options, trusted)
    if not is_image_tower_at(source):
        pool = ClassifierPool(
            job.model, revision=revision, dtype=dtype, device=job.device, trust_remote_code=trusted, **options
        )
        return pool.clip, pool.image_processor
    tower = load_tower(source, dtype, {})[0].to(getattr(torch, str(dtype).removeprefix("torch.")))
    return tower.to(job.device) if job.device else tower, load_image_processor(source)


# ---------------------------------------------------------------------- classifiers


class _One:
    """One classifier: the answers of `classify_files`."""

    def __init__(self, job: Job) -> None:
        model = TaskResCLIPForImageClassification.from_pretrained(job.model, **job.loading)
        if job.device:
            model.to(job.device)
        self.clip, self.image_processor = model.clip, model.image_processor
        how = job.answering
        self.rejecting = model.rejecting(how.get("unknown", "unknown")) if how.get("reject") else None
        self.head = self.rejecting.head if self.rejecting else model.classifier
        self.top_k = classes_given(self.head, how.get("top_k"))
        nothing: dict[str, Any] = {"labels": [], "scores": []}
        self.nothing = [nothing | {"rejected": None}] if self.rejecting else [nothing]
        bias = [] if self.head.class_bias is None else [self.head.class_bias]
        rows = digest_of(one.detach().float().cpu().numpy().tobytes() for one in (self.head.weight(), *bias))
        rejection = self.rejecting and self.rejecting.rejection.as_dict()
        self.facts = [rows, json.dumps([self.head.config.class_names, self.head.extra_repr(), rejection])]

    @torch.no_grad()
    def __call__(self, embeds: torch.Tensor) -> Iterator[list[dict[str, Any]]]:
        names = self.head.config.class_names
        logits = self.head(embeds.to(self.head.residual.device))
        rejected = self.rejecting.rejection.rejects(embeds).tolist() if self.rejecting else [None] * len(embeds)
        for tops, unknown in zip(best_answers(self.head, logits, names, self.top_k), rejected, strict=True):
            row: dict[str, Any] = {"predictions": tops, "error": None}
            if self.rejecting:
                row = self.rejecting.said_of(row, unknown)
            values = _columns_of(row["predictions"])
            yield [values | {"rejected": row["rejected"]} if self.rejecting else values]


class _Several:
    """A pool of classifiers: one row for each picture and classifier."""

    def __init__(self, job: Job) -> None:
        if job.answering.get("reject"):
            raise ConfigurationError("`reject` is for one classifier; there are several.")
        options = {key: value for key, value in job.loading.items() if value is not None}
        base = options.pop("base_model", None)
        self.pool = ClassifierPool(base, job.model, device=job.device, **options)
        self.clip, self.image_processor = self.pool.clip, self.pool.image_processor
        self.view, self.top_k = self.pool.view(), job.answering.get("top_k")
        self.names = list(job.answering.get("names") or self.view.names)
        self.nothing = [{"classifier": name, "labels": [], "scores": []} for name in self.names]
        self.facts = [self.view.digest(self.names)]

    def __call__(self, embeds: torch.Tensor) -> Iterator[list[dict[str, Any]]]:
        logits = self.view.logits(embeds, self.names)
        found = {name: self.view.predictions(name, logits[name], self.top_k) for name in self.names}
        for place in range(len(embeds)):
            yield [{"classifier": name, **_columns_of(found[name][place])} for name in self.names]


def _columns_of(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "labels": [as_utf8(top["label"]) for top in predictions],
        "scores": [top["score"] for top in predictions],
    }


# ---------------------------------------------------------------------- rows to columns


class _Columns:
    """Rows of one part, as columns."""

    def __init__(self, worker: Worker) -> None:
        self._job, self._dim = worker.job, worker.dim
        self._rows: dict[str, list[Any]] = {}

    def add(self, row: Row, values: Sequence[Mapping[str, Any]]) -> None:
        for one in values:
            whole = {
                "source": row.source, "row": row.row, "picture": row.picture and as_utf8(row.picture), **row.kept,
                **one, "error": row.error and as_utf8(row.error),
            }  # fmt: skip
            for name, value in whole.items():
                self._rows.setdefault(name, []).append(value)

    def arrays(self) -> dict[str, Any]:
        import pyarrow as pa

        kinds = {
            "source": pa.string(), "row": pa.int64(), "picture": pa.string(), **self._job.keep, "error": pa.string(),
            "classifier": pa.string(), "labels": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
            "rejected": pa.bool_(),
        }  # fmt: skip
        names = list(self._rows)
        return {
            name: self._embeddings(self._rows[name])
            if name == "embedding"
            else pa.array(self._rows.get(name, []), kinds[name])
            for name in names
        }

    def _embeddings(self, rows: Sequence[Any]) -> Any:
        """[N] lists of D numbers, null where a picture has none."""
        import pyarrow as pa

        dtype, there = getattr(torch, _NUMBERS[self._job.numbers]), [one for one in rows if one is not None]
        whole = torch.stack(there).to(dtype) if there else torch.zeros(0, self._dim, dtype=dtype)
        missing = np.array([one is None for one in rows])
        offsets = np.concatenate([[0], np.cumsum(~missing)]).astype(np.int32) * self._dim
        # Lists of any length: pyarrow 25 does not read files whose lists of one length have a null among them
        values = pa.array(whole.flatten().numpy())
        return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(missing))
