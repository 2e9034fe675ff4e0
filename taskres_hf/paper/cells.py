"""Runs as files: a finished one is taken again where everything it rests on is the same, and refused otherwise.

What the benchmark and the comparison of methods have in common.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base_classifier import same_base
from ..data.labelled import LabelledImages
from ..errors import ArtifactError, ConfigurationError
from ..storage import read_sealed, write_sealed

CHANGE_NOTHING = ("embed_batch_size", "cache_dir", "buffer_mb", "use_cpu")  # settings that only cost or save time


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def read_cell(path: Path) -> dict[str, Any] | None:
    """A finished run; None where there is none, or with a warning where the file is damaged."""
    if not path.is_file():
        return None
    try:
        return read_sealed(path)
    except ArtifactError as error:
        warnings.warn(f"{error} This run is made again.", stacklevel=4)
        return None


def require_same_run(
    path: Path,
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    dataset: str,
    pictures: Callable[[], Mapping[str, str]],
) -> None:
    """Refuse a finished run that would come out otherwise today.

    Args:
        path, stored: the run's file and what it holds.
        now: what the run would be made with; stands under the same names in `stored`.
        base: fingerprint of the base. dataset: its name, for the message.
        pictures: digests of the pictures; reads every picture, so it is asked last.

    Raises:
        ConfigurationError: something differs; says what.
    """
    different = [key for key, value in now.items() if stored.get(key) != value]
    if not same_base(stored.get("base") or {}, base or {}):
        different.insert(0, "base")
    if not different and stored.get("pictures") != pictures():
        different.append("pictures")
    if not different:
        return
    said = {
        "base": "the base's weights, tokenizer or prompts were others",
        "pictures": f"pictures or labels of {dataset} were others",
    }
    shown = "; ".join(said.get(key) or f"{key} was {json.dumps(stored.get(key))[:300]}" for key in different)
    raise ConfigurationError(
        f"{path} was run otherwise ({shown}), so its numbers do not belong beside new ones. Choose another output "
        "folder, or remove that one."
    )


def write_draw(
    folder: Path, dataset: str, shots: int, seed: int, train: LabelledImages, rows: Sequence[int], place: str = ""
) -> None:
    """Write which pictures were drawn, by row, label and file, to replay the draw elsewhere.

    Args:
        folder: of all draws and results. place: the dataset's folder in it; its name by default.
        train: the pictures drawn from. rows: the positions drawn.
    """
    path = folder / "few_shot" / (place or dataset) / f"shot_{shots}-seed_{seed}.json"
    if path.is_file() and _is_whole(path):
        return
    files = []
    for row in rows:
        source = train.source(row)
        file = source.get("path") if isinstance(source, Mapping) else source
        # A picture in memory has no file; its digest names it as well.
        named = isinstance(file, (str, Path)) and str(file)
        files.append("/".join(Path(str(file)).parts[-2:]) if named else train.digest(row))
    draw = {"dataset": dataset, "shots": shots, "seed": seed, "indices": list(rows)}
    write_sealed(path, {**draw, "labels": [train.labels[row] for row in rows], "files": files})


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_sealed(path))
    except ArtifactError as error:
        warnings.warn(f"{error} It is written again.", stacklevel=4)
        return False
