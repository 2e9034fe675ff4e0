"""Classify picture files with a trained model and write what was found as CSV, JSON lines or parquet."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from .embedding.embedder import Embedder
from .errors import ConfigurationError, ImageError
from .modeling_taskres import TaskResCLIPForImageClassification
from .pictures import read_image
from .storage import write_bytes

_SUFFIXES = (".csv", ".jsonl", ".parquet")


def classify_files(
    model: TaskResCLIPForImageClassification,
    files: Sequence[str | os.PathLike[str]],
    *,
    top_k: int = 1,
    batch_size: int | None = None,
    engine: str = "torch",
    precision: str = "fp32",
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Classes of picture files, in order; what cannot be read is reported, not raised.

    Args:
        top_k: classes per picture, at most K.
        batch_size: pictures a forward pass, by default the engine's best.
        engine, precision: see `engines`.

    Yields:
        `{"file", "predictions": [{"label", "score"}], "error"}`; scores are softmax probabilities, and `error` is None
        or says why there are no predictions.
    """
    names = model.class_names
    embedder = Embedder(model.clip, model.image_processor, engine, precision)
    size = batch_size or embedder.batch_size
    batches = [[os.fspath(file) for file in files[start : start + size]] for start in range(0, len(files), size)]
    errors: dict[str, str] = {}

    def load(file: str) -> PIL.Image.Image | None:
        try:
            picture = read_image(file)
            embedder.preprocess.check(picture)
            return picture
        except ImageError as error:
            errors[file] = str(error)
            return None

    with tqdm(total=len(files), desc="Classifying", unit="img", disable=not progress) as bar:
        for chunk, embeds in embedder.stream(batches, load, augmented=False):
            found: Iterator[list[dict[str, Any]]] = iter(())
            if embeds is not None:
                with torch.no_grad():
                    logits = model.classifier(embeds.to(model.classifier.residual.device))
                scores, labels = logits.softmax(dim=1).cpu().topk(min(top_k, len(names)), dim=1)
                found = (
                    [{"label": names[label], "score": score} for label, score in zip(ids, values, strict=True)]
                    for ids, values in zip(labels.tolist(), scores.tolist(), strict=True)
                )
            for file in chunk:
                bad = errors.get(file)
                yield {"file": file, "predictions": [] if bad else next(found), "error": bad}
            bar.update(len(chunk))


def check_output(path: Path) -> None:
    """Refuse a file name that cannot be written, before hours of work.

    Raises:
        ConfigurationError: unknown ending, or no such folder.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigurationError(f"Cannot tell the format of {path}: end its name in {', '.join(_SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"There is no folder {path.parent} to write {path.name} into.")


def write_predictions(path: Path, rows: Sequence[dict[str, Any]], top_k: int = 1) -> None:
    """Write the rows of `classify_files` in one step.

    CSV has the columns file, label, score, label_2, score_2, ..., error; text that a spreadsheet would run as a formula
    gets a leading apostrophe. JSON lines hold the rows as they are; parquet has the lists `labels` and `scores`.
    """
    if path.suffix == ".csv":
        content = _csv(rows, top_k).encode("utf-8")
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    else:
        content = _parquet(rows)
    write_bytes(path, content)


def _csv(rows: Sequence[dict[str, Any]], top_k: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    suffixes = ["", *(f"_{number}" for number in range(2, top_k + 1))]
    writer.writerow(["file", *(f"{kind}{suffix}" for suffix in suffixes for kind in ("label", "score")), "error"])
    for row in rows:
        cells: list[Any] = []
        for top in row["predictions"]:
            cells += [_safe(top["label"]), f"{top['score']:.6f}"]
        cells += [""] * (2 * top_k - len(cells))
        writer.writerow([_safe(row["file"]), *cells, _safe(row["error"] or "")])
    return text.getvalue()


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "file": pa.array([row["file"] for row in rows], pa.string()),
            "labels": pa.array([[top["label"] for top in row["predictions"]] for row in rows], pa.list_(pa.string())),
            "scores": pa.array([[top["score"] for top in row["predictions"]] for row in rows], pa.list_(pa.float32())),
            "error": pa.array([row["error"] for row in rows], pa.string()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
