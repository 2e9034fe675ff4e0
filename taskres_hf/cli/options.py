"""What the commands of `taskres` share: options with their help, and how their values are read and results shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DATA_HELP = (
    "Hub dataset id, a folder of train/validation/test.parquet, or a folder of pictures (class/file.jpg, with or "
    "without train/ and test/ above)."
)
DATA = "Dataset"
TRAINING = "Training"
MODEL = "Model"
OUTPUT = "Output"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
DatasetOption = Annotated[str, typer.Option("--dataset", help=DATA_HELP, rich_help_panel=DATA)]
DatasetConfig = Annotated[
    str | None,
    typer.Option("--dataset-config", help="Configuration of a Hub dataset.", rich_help_panel=DATA),
]
DatasetRevision = Annotated[
    str | None, typer.Option("--dataset-revision", help="Branch, tag or commit of it.", rich_help_panel=DATA)
]
ImageColumn = Annotated[str | None, typer.Option(help="Column of pictures, if not found.", rich_help_panel=DATA)]
LabelColumn = Annotated[str | None, typer.Option(help="Column of labels, if not found.", rich_help_panel=DATA)]
LabelMap = Annotated[
    str | None,
    typer.Option(help="JSON file {dataset name: model name}, or 'position'.", rich_help_panel=DATA),
]
DropUnlabelled = Annotated[
    bool, typer.Option("--drop-unlabelled", help="Leave out rows without a label.", rich_help_panel=DATA)
]
OnError = Annotated[
    str, typer.Option(help="Unreadable pictures: 'raise' (name them all) or 'skip'.", rich_help_panel=DATA)
]
BatchSize = Annotated[
    int | None, typer.Option(help="Pictures a forward pass; the engine's best.", min=1, rich_help_panel=MODEL)
]
Engine = Annotated[str, typer.Option(help="auto, torch, openvino or onnxruntime.", rich_help_panel=MODEL)]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or int8, for the frozen tower.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto, for the base.", rich_help_panel=MODEL)
]
Device = Annotated[str | None, typer.Option(help="Such as cpu, cuda:1 or mps; found by itself.", rich_help_panel=MODEL)]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Load the base from here instead.", rich_help_panel=MODEL)
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder of cached embeddings (default: $TASKRES_CACHE).", rich_help_panel=OUTPUT),
]
Artifact = Annotated[str, typer.Argument(help="Folder or Hub id of a trained classifier.")]


def open_splits(dataset: str, config: str | None, revision: str | None) -> DatasetDict:
    from ..data.sources import load_splits

    return load_splits(dataset, name=config, revision=revision)


def pick_split(splits: DatasetDict, name: str) -> Dataset:
    from ..errors import DataError

    if name in splits:
        return splits[name]
    if len(splits) == 1 and name in ("train", "test"):
        return next(iter(splits.values()))
    raise DataError(f"There is no split {name!r}; the dataset has {', '.join(splits)}.")


def pick_eval_split(splits: DatasetDict, wanted: str | None, trained: str) -> str | None:
    """The split to measure on: never, by itself, the one that was trained on."""
    if wanted is not None:
        return None if wanted == "none" else wanted
    return next((name for name in ("test", "validation") if name in splits and name != trained), None)


def read_class_names(option: str | None) -> list[str] | None:
    if option is None:
        return None
    path = Path(option)
    if path.suffix == ".json" or not path.is_file():
        return list(read_json_option(path)) if path.suffix == ".json" else [part.strip() for part in option.split(",")]
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_templates(option: Sequence[str] | None) -> str | list[str] | None:
    if not option:
        return None
    return option[0] if len(option) == 1 else list(option)


def read_json_option(path: Path | None) -> Any:
    from ..errors import ConfigurationError

    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error


def read_indices(path: Path, rows: int) -> list[int]:
    """Rows of a stored draw: a JSON list, or a trained folder that remembers its own."""
    from ..errors import ConfigurationError

    value = read_json_option(path / "config.json" if path.is_dir() else path)
    if isinstance(value, dict):
        value = (value.get("few_shot") or value).get("indices")
    if not isinstance(value, list) or not value or not all(isinstance(row, int) for row in value):
        raise ConfigurationError(f"{path} holds no list of rows to replay.")
    if min(value) < 0 or max(value) >= rows:
        raise ConfigurationError(f"{path} speaks of row {max(value)}; the split has {rows}. It is another dataset.")
    return value


def read_numbers(text: str, option: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{option} must be whole numbers separated by commas; got {text!r}.")
    return values


def public_name(dataset: str) -> str:
    """A Hub id as it is; of a path on this machine the last part only."""
    return Path(dataset).name if os.path.exists(dataset) else dataset


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def emit(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False, default=str))
    else:
        show()


def quiet_libraries(no_bars: bool) -> None:
    """Silence what other libraries say about themselves; warnings of ours become one line each."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if no_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
