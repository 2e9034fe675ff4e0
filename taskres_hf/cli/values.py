"""Option values that are files, lists or names, read into what the library takes."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import ArtifactError, BaseModelError, ConfigurationError, no_answer
from ..storage import check_can_write
from .screen import say_loading

SHIPPED = "shipped"


def read_class_names(option: str | Sequence[Any] | Mapping[Any, Any] | None) -> list[str] | dict[str, str] | None:
    """Class names in label order, or a mapping from the data's labels (such as folder names) to class names.

    Args:
        option: a .json file (a list, id2label, label2id, or label to name), a text file with one name a line, a comma
            list, or the names themselves (from a config file).

    Raises:
        ConfigurationError: a file that does not exist or cannot be read. ClassNamesError: it holds no class names.
    """
    from ..prompts import check_class_names

    if option is None:
        return None
    value: Any = _listed_names(option) if isinstance(option, str) else option
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value.values()):
        ids = {str(number) for number in range(len(value))}
        if {str(label) for label in value} != ids:  # not id2label
            return {str(label): name for label, name in value.items()}
    return check_class_names(value, minimum=1)


def check_output_folder(folder: Path, replace: bool) -> None:
    """Refuse, before any work, a folder that a classifier cannot be saved in.

    Raises:
        ArtifactError: it holds a model that is not to be replaced, is a file or cannot be written.
    """
    if (folder / "config.json").exists() and not replace:
        raise ArtifactError(f"{folder} already holds a model. Pass --overwrite to replace it, or another --output-dir.")
    check_folder_of_runs(folder)


def check_folder_of_runs(folder: Path) -> None:
    """Refuse, before any work, a folder that nothing can be written into.

    Raises:
        ArtifactError: it is a file or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; --output-dir names a folder.")
    check_can_write(folder)


def read_words(option: str | None) -> list[str] | None:
    """Words of `--words`: a text file with one a line, or a comma list; an empty text is no words.

    Raises:
        ConfigurationError: a file that does not exist, cannot be read, or holds no words.
    """
    if not option:
        return None if option is None else []
    words = _listed_names(option, "--words", "red,made of wood,in the dark")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigurationError(
            f"--words: {option!r} holds no list of words. Give one a line, or with commas between."
        )
    return words


def _listed_names(option: str, flag: str = "--class-names", example: str = "tabby cat,beagle") -> Any:
    path = Path(option).expanduser()
    if path.suffix.lower() == ".json":
        return read_json_option(path)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{flag}: {path} cannot be read as UTF-8 text: {error}") from error
        return [line.strip() for line in lines if line.strip()]
    names = [part.strip() for part in option.split(",")]
    like_a_file = len(names) == 1 or (path.suffix and path.parent != Path(".") and path.parent.is_dir())
    if like_a_file:
        raise ConfigurationError(
            f"{flag}: there is no file {option!r}{_nearest_file(path)}. Give a .txt file with one name a line, "
            f"a .json file, or names separated by commas, such as {example!r}."
        )
    return names


def _nearest_file(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    except OSError:
        return ""
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def read_templates(option: Sequence[str] | str | None) -> str | list[str] | None:
    """One template as a string, several as a list, none as None."""
    if not option:
        return None
    if isinstance(option, str):
        return option
    return option[0] if len(option) == 1 else list(option)


def label_options(config: Any, separator: str | None, columns: str | None) -> dict[str, Any]:
    """How to read the labels of data for a classifier: several per picture as it was trained on, unless said."""
    several = config.problem_type == "multi_label_classification"
    asked = separator is not None or columns is not None
    recorded = (config.data or {}).get("labels") or {} if several and not asked else {}
    return {
        "multi_label": several, "label_separator": recorded.get("separator", separator),
        "label_columns": recorded.get("columns", columns),
    }  # fmt: skip


def read_json_option(path: Path | str | None) -> Any:
    """The value in a JSON file; None for None.

    Raises:
        ConfigurationError: it cannot be read, or a key occurs twice.
    """
    if path is None:
        return None
    path = Path(path).expanduser()
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        near = "" if path.exists() else _nearest_file(path)
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}{near}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def read_mapping(option: Path | str | Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """A JSON object from a file, or the mapping itself (from a config file)."""
    value = read_json_option(option) if isinstance(option, (str, Path)) else option
    if value is not None and not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} must hold a JSON object; {option} holds a {type(value).__name__}.")
    return None if value is None else dict(value)


def read_descriptions(option: Path | str | Mapping[str, Any] | None) -> dict[str, list[str]] | None:
    """Sentences per class; a string is one sentence."""
    value = read_mapping(option, "--descriptions")
    if value is None:
        return None
    return {name: [text] if isinstance(text, str) else text for name, text in value.items()}


def read_label_map(option: str | Mapping[str, str] | None) -> dict[str, str] | str | None:
    """`"position"`, or dataset name to model name from a JSON file."""
    return "position" if option == "position" else read_mapping(option, "--label-map")


def read_indices(option: Path | str | Sequence[Any], rows: int) -> list[int]:
    """Rows of a stored draw: a JSON list, a trained folder that remembers its own, or the rows themselves.

    Args:
        rows: how many the dataset has.

    Raises:
        ConfigurationError: no rows, a row twice, or one outside the dataset.
    """
    value: Any = option
    if isinstance(option, (str, Path)):
        path = Path(option).expanduser()
        value = read_json_option(path / "config.json" if path.is_dir() else path)
    if isinstance(value, Mapping):
        value = (value.get("few_shot") or value).get("indices")
        if value is None:
            raise ConfigurationError(
                f"--indices: {option} remembers no rows: it was trained on all pictures. Leave --indices out."
            )
    whole = isinstance(value, (list, tuple)) and all(isinstance(row, int) and row is not True for row in value)
    if not whole or not value:
        raise ConfigurationError(f"--indices: {option} holds no list of rows to replay.")
    if min(value) < 0 or max(value) >= rows:
        wrong = min(value) if min(value) < 0 else max(value)
        raise ConfigurationError(
            f"--indices: {option} speaks of row {wrong}; the split has {rows}, from 0. It is of another dataset."
        )
    if len(set(value)) != len(value):
        raise ConfigurationError(f"--indices: {option} names a row twice.")
    return list(value)


def read_numbers(text: str, option: str) -> list[int]:
    """A comma list of whole numbers from 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{option} must be whole numbers separated by commas; got {text!r}.")
    return values


def public_name(dataset: str) -> str:
    """A Hub id as it is; of a path on this machine the last part only."""
    return Path(dataset).resolve().name if os.path.exists(dataset) else dataset


def default_output(dataset: str) -> Path:
    """`photos-taskres` for `photos/`, `labels.csv` becomes `labels-taskres`, a Hub id gives its last part."""
    path = Path(dataset).expanduser()
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else dataset.rsplit("/", 1)[-1]
    return Path(f"{name or 'dataset'}-taskres")


def one_dataset(context: typer.Context, argument: str | None, option: str | None) -> str:
    """The dataset from the argument or from `--dataset`, two spellings of one thing."""
    if argument is not None and option is not None and argument != option:
        context.fail(f"The dataset is given twice: DATASET is {argument!r}, --dataset {option!r}.")
    dataset = argument if argument is not None else option
    if dataset is None:
        context.fail("Missing argument 'DATASET': a folder of pictures, a table, or a Hub dataset id.")
    return dataset


def resolve_base(name: str) -> str:
    """`shipped` as the folder of the small CLIP in this package; any other name as it is."""
    if name != SHIPPED or os.path.exists(name):
        return name
    from ..demo import demo_model

    return demo_model()


def zero_shot_model(name: str, class_names: list[str], quiet: bool, **options: Any) -> Any:
    """A classifier that is not trained, on a base by the name that a user gave; `options` are of `from_base`.

    Raises:
        BaseModelError: there is no such base, or it cannot be had here; says what to do.
    """
    from ..modeling_taskres import TaskResCLIPForImageClassification

    base = resolve_base(name)
    say_loading(f"the base model {name}", quiet)
    try:
        return TaskResCLIPForImageClassification.from_base(base, class_names, **options)
    except OSError as error:
        raise without_base(name, error) from error


def without_base(name: str, error: OSError) -> Exception:
    """What to do when the base cannot be had."""
    from ..storage import is_path
    from .options import BASE_VARIABLE

    if is_path(name) or no_answer(error) is None:
        return error
    return BaseModelError(
        f"{str(error).splitlines()[0]}\n"
        f"Download it where there is a network (hf download {name}), then name its folder with --base-model or "
        f"${BASE_VARIABLE}; or train on the small model in this package with --base-model {SHIPPED}."
    )


def check_device(name: str | None, cpu: bool = False) -> str | None:
    """A device that is there, or None for the fastest.

    Raises:
        ConfigurationError: no such kind of device, or this machine has none.
    """
    if cpu and name not in (None, "cpu"):
        raise ConfigurationError(f"--cpu and --device {name} contradict each other: leave one out.")
    if cpu or name in (None, "auto"):
        return "cpu" if cpu else None
    import torch

    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise ConfigurationError(f"--device {name} is not a device: use cpu, cuda, cuda:1, mps or xpu.") from None
    if device.type == "cpu" and device.index in (None, 0):
        return "cpu"
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "is_available") or not backend.is_available():
        raise ConfigurationError(
            f"--device {name}: torch finds no {device.type} device on this machine. Leave --device out to use the "
            "fastest there is, or pass --device cpu."
        )
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    if device.index is not None and device.index >= count:
        raise ConfigurationError(f"--device {name}: this machine has {count}, numbered from 0.")
    return str(name)


def use_device(name: str | None) -> None:
    """Make Accelerate, and so the trainer, take that device."""
    if name is not None and name != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = name
