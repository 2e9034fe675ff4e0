"""The settings of a training run as a YAML file: read for `--config`, written beside each classifier.

Names are those of the Python arguments. What is typed on the command line wins over the file, the file over defaults.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import typer

from .._version import __version__
from ..errors import ConfigurationError

RUN_FILE = "run.yaml"
_WRITES = {"train": "this classifier, trained", "compare": "this comparison, made", "analyze": "this analysis, made"}
# Where and how a command runs, not what comes out of it: accepted in a file where it makes sense, never written.
_NEVER = {
    "config", "as_json", "quiet", "debug", "dataset_option", "data_option", "list_methods", "use_cpu",
    "keep_underscores", "disable_tqdm", "kind",
}  # fmt: skip
_ACTIONS = {
    "output_dir", "overwrite", "resume", "cache_dir", "hub_model_id", "hub_private_repo", "include_code", "report",
}  # fmt: skip
_SECRETS = {"hub_token", "push_to_hub"}
# Of each pair one rules the other out: what is typed also wins over the other one in a file.
_EITHER_OR = (("shots", "indices"), ("holdout", "indices"), ("holdout", "eval_split"), ("use_cpu", "device"))
# Options that name a file may hold what is in it.
_INLINE: dict[str, tuple[type, ...]] = {
    "class_names": (str, list, dict),
    "class_descriptions": (str, dict),
    "prompt_names": (str, dict),
    "label_map": (str, dict),
    "indices": (str, list),
    "templates": (str, list),
    "report_to": (str, list),
    "data": (str, list),
    "label_columns": (str, list),
}


def read_run(context: typer.Context, config: Path | None, training: bool = True) -> dict[str, Any]:
    """All settings of a command: options typed by the user, else those in the config file, else defaults.

    Args:
        context: of the running command. config: the file of `--config`, or None.
        training: whether the command takes settings of training that have no option of their own.

    Returns:
        Name to value; choices and paths as strings.

    Raises:
        ConfigurationError: the file cannot be read, or has an unknown name or a value of the wrong kind.
    """
    command = context.command.callback
    names = [str(parameter.name) for parameter in context.command.params if parameter.name in context.params]
    values = {name: _value(context.params[name]) for name in names}
    if config is None or command is None:
        return values
    hints = typing.get_type_hints(command)
    known = (_training_hints() if training else {}) | {name: hints[name] for name in values if name not in _NEVER}
    sources = {name: context.get_parameter_source(name) for name in values}
    settled = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    settled |= {pair[1 - place] for pair in _EITHER_OR for place in (0, 1) if pair[place] in settled}
    return values | {name: value for name, value in read_file(config, known).items() if name not in settled}


def _training_hints() -> dict[str, Any]:
    """Settings of training that have no option of their own."""
    from ..training import TaskResTrainingArguments

    hints = typing.get_type_hints(TaskResTrainingArguments)
    return {name: hint for name, hint in hints.items() if name not in _NEVER | _SECRETS and name in _fields()}


def _fields() -> set[str]:
    from dataclasses import fields

    from ..training import TaskResTrainingArguments

    return {field.name for field in fields(TaskResTrainingArguments)}


def training_only(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that `TaskResTrainingArguments` takes."""
    return {name: value for name, value in values.items() if name in _fields()}


def _value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    return os.fspath(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------------------------------------------- reading


def read_file(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        path: the file. known: name to type of each setting there is.

    Raises:
        ConfigurationError: see `read_run`.
    """
    import yaml

    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        loader = _loader()(text)
        node = loader.get_single_node()
        _refuse_repeats(node, path)
        values = loader.construct_document(node) if node is not None else {}
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"--config: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config: {path} must hold `name: value` lines; it holds {type(values).__name__}.")
    problems = [_problem(name, value, known) for name, value in values.items()]
    if any(problems):
        raise ConfigurationError(f"--config: {path}: {'; '.join(filter(None, problems))}.")
    return {name: value for name, value in values.items() if value is not None}


def _problem(name: Any, value: Any, known: Mapping[str, Any]) -> str | None:
    """What is wrong with one line of the file."""
    if name in _SECRETS:
        advice = "use HF_TOKEN or `hf auth login`" if name == "hub_token" else "name the repository in `hub_model_id`"
        return f"`{name}` is not read from a file: {advice}"
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        return f"there is no setting {name!r}" + (f"; did you mean `{near[0]}`?" if near else "")
    if value is None or (name in _INLINE and isinstance(value, _INLINE[name])):
        return None
    kinds = typing.get_args(known[name]) or (known[name],)
    choices = _choices(kinds)
    if choices and value in choices:
        return None
    allowed = {kind for kind in kinds if isinstance(kind, type) and kind is not NoneType and not issubclass(kind, Enum)}
    allowed |= {str} if Path in allowed else set()
    allowed |= {int} if float in allowed else set()
    if type(value) in allowed:
        return None
    wanted = choices or sorted(_KINDS.get(kind, kind.__name__) for kind in allowed if kind is not Path)
    return f"`{name}` must be {' or '.join(wanted)}; it is {value!r}"


def _choices(kinds: Iterable[Any]) -> list[str]:
    """The words that an option accepts, of enums and of `Literal`s, bare or in a union."""
    choices: list[str] = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            choices += [str(member.value) for member in kind]
        elif typing.get_origin(kind) is typing.Literal:
            choices += typing.get_args(kind)
        elif isinstance(kind, str):  # the arguments of a bare Literal
            choices.append(kind)
    return choices


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def _refuse_repeats(node: Any, path: Path) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        names = Counter(str(key.value) for key, _ in node.value)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ConfigurationError(f"--config: {path} sets {twice[0]!r} twice.")
        for _, value in node.value:
            _refuse_repeats(value, path)


_FLOAT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.nan$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


def _loader() -> Any:
    """YAML 1.2's scalars: `1e-3` is a number; `no`, `on` and `2024-01-01`, which classes may be called, are text."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    dropped = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp")}
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in dropped]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return loader


# ---------------------------------------------------------------------------------------------------- writing


def write_run(folder: Path, values: Mapping[str, Any], command: str = "train") -> Path:
    """Write the settings beside a classifier, so that `taskres train --config` gives it again.

    Args:
        folder: of the classifier. values: settings by name; what says only where and how is left out.
        command: whose settings they are.
    """
    import yaml

    from ..storage import write_bytes

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))  # so that "1e3" is quoted
    dropped = _NEVER | _ACTIONS | _SECRETS
    stored = {name: value for name, value in values.items() if value not in (None, []) and name not in dropped}
    head = (
        f"# The settings of {_WRITES.get(command, 'this folder')} with taskres_hf {__version__}.\n"
        f"# The same run again: taskres {command} --config run.yaml -o NEW_FOLDER\n"
    )
    text = yaml.dump(stored, Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)
    path = folder / RUN_FILE
    write_bytes(path, (head + text).encode("utf-8"))
    return path


def forget_run(folder: Path) -> None:
    """Take away the settings beside a classifier that no run of them gives any more; a file of the user's stays."""
    path = folder / RUN_FILE
    if path.is_file() and path.read_bytes().startswith(f"# The settings of {_WRITES['train']}".encode()):
        path.unlink()
