"""Classify picture files, or texts, with a trained model and write the answers as CSV, JSON lines or parquet.

Answers go to `NAME.partial` beside the output as they come, one checked line each. When all are there, the output is
made from it in one step: it is whole or absent, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from .embedding import Embedder, TextEmbedder
from .errors import ArtifactError, ConfigurationError, ImageError, TextError
from .modeling_taskres import TaskResCLIPForImageClassification
from .pictures import Remarks, read_image, size_and_time
from .prediction_files import as_utf8, check_output, csv_separator, write_predictions
from .residual import TaskResClassifier, label_threshold
from .storage import digest_of
from .tables import visible

_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link there may point at anything
# How the first line begins, which says what the run is; such a line without an end was cut short.
_BEGINNING = re.compile(rb'[0-9a-f]{0,16}|[0-9a-f]{16} (\{("[^\n]*)?)?')
_LONGEST_BEGINNING = 4096  # bytes


def classify_files(
    model: TaskResCLIPForImageClassification,
    files: Sequence[str | os.PathLike[str]],
    *,
    top_k: int | None = None,
    batch_size: int | None = None,
    engine: str = "torch",
    precision: str = "fp32",
    progress: bool = False,
    reject: bool = False,
    unknown: str = "unknown",
) -> Iterator[dict[str, Any]]:
    """Classes of picture files and addresses, in order; what cannot be read is reported, not raised.

    What is odd about the pictures (transparency, more than 8 bits) is one warning of each kind, at the end.

    Args:
        files: what `read_image` takes as text, see also `list_images`; one named twice has two rows.
        top_k: classes per picture, at most K; by default one or, of several labels per picture, every label whose
            score is at least the classifier's threshold, which may be none.
        batch_size: pictures a forward pass, by default the engine's best.
        engine, precision: see `embedding.engines`.
        reject: by the threshold stored with the classifier, say of pictures of no class that they are.
        unknown: what their label is then.

    Yields:
        `{"file", "predictions": [{"label", "score"}], "error"}`; scores are softmax probabilities (of several labels
        per picture the sigmoid of each logit), and `error` is None or says why there are no predictions. Bytes
        of a file name that are not UTF-8 are escaped, as `\\udcff`. With `reject` also `rejected`, true or
        false (null where there is an `error`); the first label of a rejected picture is `unknown`, whose score
        is None, and the classes follow.

    Raises:
        ConfigurationError: `reject` without a threshold for the classifier as it is, or of one that gives several
            labels per picture; `unknown` is one of its classes.
    """
    rejecting = model.rejecting(unknown) if reject else None
    head = rejecting.head if rejecting else model.classifier
    if head.config.text_encoding is not None:
        raise ConfigurationError("The classifier is of texts: use classify_texts.")
    items = Pictures(Embedder(model.clip, model.image_processor, engine, precision), files)
    items.embedder.get_ready(len(files))
    top_k = classes_given(head, top_k)
    yield from _classify(head, items, top_k, batch_size or items.embedder.batch_size, progress, 0, rejecting)


def classify_texts(
    model: Any,
    texts: Sequence[Any],
    *,
    top_k: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    reject: bool = False,
    unknown: str = "unknown",
) -> Iterator[dict[str, Any]]:
    """Classes of texts, in order; what is empty or no text is reported, not raised.

    Args:
        model: a `TaskResForSequenceClassification`. top_k, batch_size, reject, unknown: as in `classify_files`.

    Yields:
        As `classify_files`, with `text` in the place of `file`.
    """
    rejecting = model.rejecting(unknown) if reject else None
    head = rejecting.head if rejecting else model.classifier
    items = _Texts(TextEmbedder(model.clip, model.tokenizer, model.encoding), texts)
    size = batch_size or items.embedder.batch_size
    yield from _classify(head, items, classes_given(head, top_k), size, progress, 0, rejecting)


def classes_given(head: TaskResClassifier, top_k: int | None) -> int:
    """Classes per picture; 0 for every one from the threshold on.

    Raises:
        ConfigurationError: a classifier of several labels per picture that was never trained.
    """
    head.check_can_say_no()
    names = head.config.class_names
    return min((0 if head.several_labels else 1) if top_k is None else top_k, len(names))


def best_answers(
    head: TaskResClassifier, logits: torch.Tensor, names: Sequence[str], top_k: int
) -> Iterator[list[Any]]:
    """Labels and scores of each picture, the likeliest first."""
    scores = logits.sigmoid() if head.several_labels else logits.softmax(dim=1)
    values, labels = scores.cpu().topk(top_k or len(names), dim=1)
    least = label_threshold(head.facts) if not top_k else -1.0
    for ids, row in zip(labels.tolist(), values.tolist(), strict=True):
        pairs = zip(ids, row, strict=True)
        yield [{"label": names[label], "score": score} for label, score in pairs if score >= least]


class Pictures:
    """Picture files, and why some cannot be read."""

    column, what, unit = "file", "Classifying", "img"

    def __init__(self, embedder: Embedder, files: Sequence[str | os.PathLike[str]]) -> None:
        self.embedder, self.files = embedder, files
        self.paths = [os.fsdecode(file) for file in files]
        self.errors: dict[int, str] = {}
        self.remarks = Remarks()

    def identity(self) -> dict[str, str]:
        """What tells these files from others, and from what they were before, without reading them."""
        parts = ((file, os.path.abspath(file), repr(size_and_time(file))) for file in self.files)
        return {"files, sizes or times of files": digest_of(os.fsencode(part) for each in parts for part in each)}

    def load(self, place: int) -> PIL.Image.Image | None:
        try:
            picture = read_image(self.paths[place], remarks=self.remarks)
            self.embedder.preprocess.check(picture)
        except ImageError as error:
            named = visible(self.paths[place]) in str(error)
            self.errors[place] = str(error) if named else f"'{visible(self.paths[place])}': {error}"
            return None
        return picture

    def called(self, place: int) -> str:
        return f"'{visible(self.paths[place])}'"

    def cell(self, place: int) -> str:
        return as_utf8(self.paths[place])

    def finish(self) -> None:
        self.remarks.warn(stacklevel=3)


class _Texts:
    """Texts, and why some are none."""

    column, what, unit = "text", "Classifying", " texts"

    def __init__(self, embedder: TextEmbedder, texts: Sequence[Any]) -> None:
        self.embedder, self.paths = embedder, list(texts)
        self.errors: dict[int, str] = {}

    def identity(self) -> dict[str, str]:
        return {"texts": digest_of([json.dumps([str(text) for text in self.paths]).encode()])}

    def load(self, place: int) -> str | None:
        try:
            self.embedder.check(self.paths[place])
            return str(self.paths[place])
        except TextError as error:
            self.errors[place] = f"{self.called(place)}: {error}"
            return None

    def called(self, place: int) -> str:
        return f"row {place + 1}"

    def cell(self, place: int) -> str:
        value = self.paths[place]
        return as_utf8("" if value is None else str(value))

    def finish(self) -> None:
        self.embedder.warn_of_cut(len(self.paths))


def _classify(
    head: TaskResClassifier,
    items: Any,
    top_k: int,
    batch_size: int,
    progress: bool,
    done: int = 0,
    rejecting: Any = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the items from number `done` on, by a head with the names that belong to it."""
    names, count = head.config.class_names, len(items.paths)
    batches = [range(start, min(start + batch_size, count)) for start in range(done, count, batch_size)]
    with tqdm(total=count, initial=done, desc=items.what, unit=items.unit, disable=not progress) as bar:
        total = math.ceil(count / batch_size)
        for places, embeds in items.embedder.stream(batches, items.load, augmented=False, total=total):
            answers: Iterator[list[dict[str, Any]]] = iter(())
            finite, rejected = iter(list[bool]()), iter(list[bool]())
            if embeds is not None:
                usable = embeds.isfinite().all(dim=1)
                finite = iter(usable.tolist())
                with torch.no_grad():  # a picture without an embedding must not keep the others from their answers
                    embeds = embeds.masked_fill(~usable[:, None], 0.0)
                    logits = head(embeds.to(head.residual.device))
                if rejecting is not None:
                    rejected = iter(rejecting.rejection.rejects(embeds).tolist())
                answers = best_answers(head, logits, names, top_k)
            for place in places:
                problem = items.errors.pop(place, None)
                predictions = [] if problem else next(answers)
                unknown = next(rejected) if rejecting is not None and not problem else None
                if not problem and not next(finite):
                    predictions, problem = [], f"{items.called(place)} has no scores: the model gives NaN for it."
                row = {items.column: items.cell(place), "predictions": predictions, "error": problem}
                yield row if rejecting is None else rejecting.said_of(row, unknown)
            bar.update(len(places))
    items.finish()


# ---------------------------------------------------------------------- to a file


@dataclass(frozen=True)
class WrittenPredictions:
    """What `classify_to_file` wrote.

    Attributes:
        path: the file. classified: number of pictures with an answer. resumed: how many rows an earlier run had left.
        skipped: why pictures have no answer, one message each.
    """

    path: Path
    classified: int
    skipped: list[str]
    resumed: int = 0


def classify_to_file(
    model: TaskResCLIPForImageClassification,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    batch_size: int | None = None,
    engine: str = "torch",
    precision: str = "fp32",
    progress: bool = False,
    resume: bool = False,
    reject: bool = False,
    unknown: str = "unknown",
) -> WrittenPredictions:
    """Classify picture files (or texts) into a .csv, .jsonl or .parquet file; a run that was stopped can go on.

    The output appears, or replaces another, when every file has its row. Until then rows are in `OUTPUT.partial`, which
    is left there when the run is interrupted, killed or out of disk space.

    Args:
        output: see `write_predictions` for what is in it.
        resume: go on with `OUTPUT.partial` if there is one; the outcome is that of an uninterrupted run.
        top_k, batch_size, engine, precision, reject, unknown: see `classify_files`.

    Raises:
        ConfigurationError: as there; a file name that cannot be written (`check_output`); a partial file that is
            another run's (other model, files, options), that another process is writing, or that is there without
            `resume`.
        ArtifactError: the rows cannot be written, such as on a full disk.
    """
    output = Path(output)
    check_output(output)
    rejecting = model.rejecting(unknown) if reject else None
    head = rejecting.head if rejecting else model.classifier
    if model.config.text_encoding is not None:
        text_model: Any = model
        items: Any = _Texts(TextEmbedder(text_model.clip, text_model.tokenizer, text_model.encoding), files)
    else:
        items = Pictures(Embedder(model.clip, model.image_processor, engine, precision), files)
    embedder = items.embedder
    # To go on, not to measure again: forms of the tower that are as fast as each other differ in the last bits.
    embedder.get_ready(0 if resume else len(files))
    size = batch_size or embedder.batch_size
    names = head.config.class_names
    top_k = classes_given(head, top_k)
    separator = None if top_k else csv_separator(names, output)
    bias = [] if head.class_bias is None else [head.class_bias.cpu().numpy().tobytes()]
    run = {
        **items.identity(),
        "classifier": digest_of(
            [
                head.weight().detach().cpu().numpy().tobytes(),
                head.residual.detach().cpu().numpy().tobytes(),
                *bias,
                json.dumps([head.extra_repr(), *names, *([label_threshold(head.facts)] * (not top_k))]).encode(),
            ]
        ),
        "base model or engine": digest_of([json.dumps([*embedder.key, embedder.engine.is_stock]).encode()]),
        "top_k": top_k,
        "batch_size": size,
    }
    if rejecting is not None:
        run["rejection"] = digest_of([json.dumps([rejecting.rejection.as_dict(), unknown]).encode()])
    with PredictionWriter(output, run, resume=resume, batch_size=size) as writer:
        done = writer.rows
        for row in _classify(head, items, top_k, size, progress, done, rejecting):
            writer.write(row)
        skipped = writer.finish(top_k, reject, separator, [items.column])
    return WrittenPredictions(output, len(files) - len(skipped), skipped, done)


class PredictionWriter:
    """Rows kept beside an output file as they come, until the output is made from them.

    Use it as a context manager. Leaving it without `finish` keeps `OUTPUT.partial`, unless that has no rows.

    Args:
        output: the file to make in the end.
        run: what rows depend on, name by name; only the same run can be resumed.
        resume: go on with the rows that are there.
        batch_size: rows beyond the last whole batch are made again, so that batches are those of an uninterrupted run.

    Attributes:
        rows: number of rows in the partial file.

    Raises:
        ConfigurationError: the partial file is another run's, in use, or there without `resume`.
        ArtifactError: it cannot be written.
    """

    def __init__(
        self, output: str | os.PathLike[str], run: Mapping[str, Any], *, resume: bool = False, batch_size: int = 1
    ) -> None:
        self.output = Path(output)
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        self.rows, self._last = 0, b""
        try:
            self._stream: IO[bytes] = os.fdopen(os.open(self.partial, _OPEN, 0o666), "r+b")
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._lock()
            self._begin(dict(run), resume, batch_size)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self.rows:
            self.partial.unlink(missing_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row of `classify_files`; it is with the operating system when this returns."""
        try:
            self._write(row)
        except OSError as error:
            raise self._failure(error) from error
        self.rows += 1

    def finish(
        self,
        top_k: int,
        reject: bool = False,
        separator: str | None = None,
        columns: Sequence[str] = ("file",),
        spread: Callable[[Any], Iterable[Any]] = lambda row: [row],
    ) -> list[str]:
        """Make the output from the rows (or what `spread` makes of each), in one step, and remove the partial file;
        returns the errors in the rows."""
        self._stream.seek(0)
        skipped: list[str] = []

        def rows() -> Iterator[dict[str, Any]]:
            number = 0
            for number, (row, _, _) in enumerate(_checked_lines(self._stream)):
                if number > 0:  # the first line is the run
                    skipped.extend([row["error"]] if row["error"] else [])
                    yield from spread(row)
            if number != self.rows:
                raise ArtifactError(f"{self.partial} was changed while it was written: only {number} rows are whole.")

        try:
            write_predictions(self.output, rows(), top_k, reject, separator, columns)
        except ArtifactError as error:
            raise ArtifactError(f"{error} {self.partial} stays: go on with resume=True (--resume).") from error
        self._stream.close()
        self.partial.unlink(missing_ok=True)
        self.rows = 0
        return skipped

    def _close(self) -> None:
        with suppress(OSError):  # what could not be written is tried again here; it was reported then
            self._stream.close()

    def _write(self, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
        checksum = _checksum(self._last, text)
        self._stream.write(b"%s %s\n" % (checksum, text))
        self._stream.flush()
        self._last = checksum

    def _lock(self) -> None:
        """Keep other processes away until this one closes the file or ends, where the system can."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"Another process is writing {self.partial}. Wait for it, or choose another output."
            ) from None
        except OSError:  # a file system without locks
            return

    def _begin(self, run: dict[str, Any], resume: bool, batch_size: int) -> None:
        """Read what is there, cut it after the last whole batch, and be ready to add rows."""
        begun: Any = None
        ends: list[tuple[int, bytes]] = []  # position after each line, and its checksum
        for number, (value, end, checksum) in enumerate(_checked_lines(self._stream)):
            begun = value if number == 0 else begun
            ends.append((end, checksum))
        if not ends and not self._was_never_begun():
            raise ConfigurationError(f"{self.partial} is in the way: it holds no rows of this library. Move it away.")
        rows = len(ends) - 1
        if rows > 0 and not resume:
            raise ConfigurationError(
                f"{self.partial} holds {rows} rows of a run that was stopped. Go on with resume=True (--resume), or "
                "delete it to start anew."
            )
        if rows > 0 and begun != run:
            other = [name for name in {**run, **begun} if run.get(name) != begun.get(name)]
            raise ConfigurationError(
                f"{self.partial} was begun with other {', '.join(other)}, so its {rows} rows would not fit. Repeat the "
                "call that began it, or delete it to start anew."
            )
        self._stream.seek(ends[-1][0] if ends else 0)
        if self._stream.readline().endswith(b"\n"):  # a line that was only cut short has no end
            warnings.warn(
                f"{self.partial} is damaged after row {rows}: what follows is made again. Rows before it are whole.",
                stacklevel=4,
            )
        self.rows = max(rows, 0) // batch_size * batch_size
        end, self._last = ends[self.rows] if self.rows else (0, b"")
        self._stream.seek(end)
        self._stream.truncate()
        if not self.rows:
            self._write(run)

    def _was_never_begun(self) -> bool:
        """Whether the file holds nothing, or a first line of ours that was cut short."""
        self._stream.seek(0)
        start = self._stream.read(_LONGEST_BEGINNING)
        return len(start) < _LONGEST_BEGINNING and bool(_BEGINNING.fullmatch(start))

    def _failure(self, error: OSError) -> ArtifactError:
        advice = f"Its {self.rows} rows stay: make room and go on with resume=True (--resume)." if self.rows else ""
        return ArtifactError(f"Cannot write {self.partial}: {error.strerror or error}. {advice}".rstrip())


def _checksum(before: bytes, text: bytes) -> bytes:
    """Of a line and the checksum before it, so that lines lost, changed, repeated or in part are noticed."""
    return hashlib.sha256(before + text).hexdigest()[:16].encode()


def _checked_lines(stream: IO[bytes]) -> Iterator[tuple[Any, int, bytes]]:
    """Each value, the position after it and its checksum, up to the first line that is not as it was written."""
    position, before = stream.tell(), b""
    for line in iter(stream.readline, b""):
        checksum, text = line[:16], line[17:-1]
        if line[-1:] != b"\n" or line[16:17] != b" " or checksum != _checksum(before, text):
            return
        position, before = position + len(line), checksum
        yield json.loads(text), position, checksum
