"""Six tasks of photographs, for measuring: read from a folder, or built from public repositories.

    python -m benchmarks.photos                              # what the folder of TASKRES_PHOTOS holds
    python -m benchmarks.photos --root CLONES --out FOLDER   # build the tasks from clones of their sources

Built are the very pictures of the tables in docs/results.md, by the row numbers in `benchmarks/photos_draw.json`;
`--draw rule` draws others.

The pictures are no part of the project. `TASKRES_PHOTOS` names their folder (default `../shared/photos`, beside the
repository, where it exists) and `TASKRES_PHOTO_CLIP` the dual encoder they are measured with (default `photo-clip`
beside that folder).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetDict, disable_progress_bars

from taskres_hf.data.sources import load_splits
from taskres_hf.errors import ConfigurationError, TaskResError

from . import photo_sources

_DEFAULT = Path(__file__).parents[2] / "shared" / "photos"


def photo_root() -> Path:
    """Folder of the tasks.

    Raises:
        ConfigurationError: `TASKRES_PHOTOS` names none, or is not set and the default is not there.
    """
    named = os.environ.get("TASKRES_PHOTOS")
    root = Path(named).expanduser() if named else _DEFAULT
    if not (root / "tasks.json").is_file():
        where = f"TASKRES_PHOTOS is {named}, which holds no tasks.json" if named else "TASKRES_PHOTOS is not set"
        raise ConfigurationError(
            f"The photographs are not here: {where}. Build them with "
            "`python -m benchmarks.photos --root CLONES --out FOLDER` and set TASKRES_PHOTOS to that folder."
        )
    return root


def photo_tasks() -> dict[str, dict[str, Any]]:
    """Task name to its classes, template, sizes, source and licence.

    Raises:
        ConfigurationError: see `photo_root`.
    """
    tasks: dict[str, dict[str, Any]] = json.loads((photo_root() / "tasks.json").read_text(encoding="utf-8"))
    return tasks


def photo_dataset(name: str) -> DatasetDict:
    """Splits `train`, `validation` and `test` of a task, their rows in the order of its files.

    Raises:
        ConfigurationError: there is no such task, or see `photo_root`.
    """
    tasks = photo_tasks()
    if name not in tasks:
        raise ConfigurationError(f"There is no task {name!r} among the photographs: {', '.join(tasks)}.")
    return load_splits(photo_root() / name)


def photo_model_path() -> str:
    """Folder of the dual encoder for the photographs.

    Raises:
        ConfigurationError: it is not there.
    """
    named = os.environ.get("TASKRES_PHOTO_CLIP")
    folder = Path(named).expanduser() if named else photo_root().parent / "photo-clip"
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"There is no model for the photographs in {folder}: set TASKRES_PHOTO_CLIP to a CLIP-like one."
        )
    return str(folder)


def missing() -> str | None:
    """Why the photographs cannot be measured here, in a sentence; None if they can."""
    try:
        photo_root()
        photo_model_path()
    except ConfigurationError as error:
        return str(error)
    return None


def _read_draw(path: Path) -> photo_sources.Draw | Path:
    """A folder of tasks, or the rows of an earlier build.

    Raises:
        ConfigurationError: there is neither.
    """
    if path.is_dir():
        return path
    if not path.is_file():
        raise ConfigurationError(f"{path} is neither a draw.json, nor a folder of tasks, nor the word rule.")
    draw: photo_sources.Draw = json.loads(path.read_text(encoding="utf-8"))
    return draw


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| task | classes | train / validation / test | source | licence |", "|---|---:|---:|---|---|"]
    for name, spec in tasks.items():
        sizes = " / ".join(str(count) for count in spec["sizes"].values())
        lines.append(f"| {name} | {spec['n_classes']} | {sizes} | {spec['source']} | {spec['licence']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder that holds the clones, each under its repository's name")
    parser.add_argument("--out", type=Path, help="folder to write the tasks to")
    parser.add_argument("--tasks", nargs="+", choices=list(photo_sources.SOURCES), help="default: all")
    parser.add_argument(
        "--draw", default=str(photo_sources.PUBLISHED), metavar="FILE|FOLDER|rule",
        help="draw.json of an earlier build, a folder of tasks whose very pictures are wanted, or the word rule, to "
        "draw by a fixed seed; default: the pictures of the tables in docs/results.md",
    )  # fmt: skip
    options = parser.parse_args()
    if (options.root is None) != (options.out is None):
        parser.error("--root and --out go together")
    disable_progress_bars()
    try:
        if options.root is None:
            print(_table(photo_tasks()))
            return
        draw = None if options.draw == "rule" else _read_draw(Path(options.draw))
        tasks = photo_sources.build(options.root, options.out, options.tasks, draw)
    except TaskResError as error:
        parser.exit(1, f"Error: {error}\n")
    print(_table(tasks))
    if draw is None:
        print(
            "\nDrawn by the rule in benchmarks/photo_sources.py: the classes and groups of the published draw, and "
            "nearly their sizes, but not their very pictures, so numbers will differ by what draws differ by."
        )
    print(f"\nTo measure on them: export TASKRES_PHOTOS={options.out.absolute()}")


if __name__ == "__main__":
    main()
