"""What the commands do for texts: which base or classifier is of texts, its options, sentences to rows."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BaseModelError, ConfigurationError, DataError
from . import options as opt
from .screen import emit, percent, say, warn
from .values import resolve_base

if TYPE_CHECKING:
    from ..language.modeling import TaskResForSequenceClassification

TEXTS = "Texts"


class PoolingName(opt.Choice):
    MEAN = "mean"
    CLS = "cls"
    MAX = "max"


TextColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of texts; recognised by itself.", rich_help_panel=TEXTS)
]
Pooling = Annotated[
    PoolingName | None,
    typer.Option(help="How tokens become one embedding; as the base says, else mean.", rich_help_panel=TEXTS),
]
TextPrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Stands before each text, such as 'query: ' for E5.", rich_help_panel=TEXTS),
]

_OWN = {"text_column": "--text-column", "pooling": "--pooling", "text_prompt": "--text-prompt"}
_FOR_PICTURES = {
    "multi_label": False, "label_separator": None, "label_columns": None, "class_folder": None, "image_column": None,
    "views": 0, "augment_online": None, "enhanced_base": False, "crop": None, "residual_side": "text",
    "prompt_average": "raw", "include_code": False, "report": None,
}  # fmt: skip


def base_is_of_texts(run: dict[str, Any]) -> bool:
    """Whether `taskres train` is to read texts: by its base's config.json, or by the classifier of `--from`.

    Raises:
        ConfigurationError: options that are for the other kind.
    """
    from ..encoders import BaseSource
    from ..language.tower import is_text_model_at

    found = False
    if run["from_classifier"] is not None:
        found = is_of_texts(run["from_classifier"])
    else:
        with suppress(BaseModelError, OSError):  # said once the data is read, as ever
            found = is_text_model_at(BaseSource(resolve_base(run["base_model"]), run["base_revision"]))
    given = [name for name, default in _FOR_PICTURES.items() if run[name] not in (default, [], False)]
    if found and given:
        what = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(f"{what}: not to be had for texts, and the base is a model of texts. Leave it out.")
    own = [option for name, option in _OWN.items() if run[name] is not None]
    if own and not found:
        raise ConfigurationError(f"{', '.join(own)}: for a base of texts alone, which this is not. Leave it out.")
    return found


def is_of_texts(model: str, revision: str | None = None) -> bool:
    """Whether a saved classifier is of texts, by its config.json alone; a packed file never is."""
    from ..artifact import find_artifact
    from ..pool.packing import is_pack
    from ..storage import read_json

    if is_pack(model):
        return False
    return read_json(find_artifact(model, revision)[0]).get("text_encoding") is not None


def reading_texts(classifier: Any, text_column: str | None) -> dict[str, Any]:
    """What `load_evaluation_data` is told for a classifier of texts; nothing for one of pictures."""
    return {} if classifier.config.text_encoding is None else {"texts": True, "image_column": text_column}


def make_text_model(run: dict[str, Any], class_names: list[str]) -> TaskResForSequenceClassification:
    """The classifier of `taskres train` over a base of texts."""
    from ..language.modeling import TaskResForSequenceClassification

    names = ("base_classifier", "class_descriptions", "prompt_names", "underscores", "pooling")
    return TaskResForSequenceClassification.from_base(
        resolve_base(run["base_model"]), class_names, run["templates"], run["alpha"], prompt=run["text_prompt"],
        revision=run["base_revision"], trust_remote_code=run["trust_remote_code"], dtype=run["dtype"] or "float32",
        **{name: run[name] for name in names},
    )  # fmt: skip


def texts_of(arguments: list[str], text_column: str | None) -> list[Any]:
    """The texts that a person names: sentences, tables of them, or `-` for the lines of the standard input.

    Raises:
        DataError: a table that is not there or has no column of texts; nothing at all.
    """
    from ..data.tables import TABLE_ENDINGS
    from ..data.texts import read_lines

    texts: list[Any] = []
    for argument in arguments:
        path = Path(argument)
        table = path.suffix.lower() in TABLE_ENDINGS and not any(mark in argument for mark in "\n\t")
        if argument == "-":
            texts += [line.rstrip("\r\n") for line in sys.stdin]
        elif path.suffix.lower() == ".txt" and path.is_file():
            texts += path.read_text(encoding="utf-8-sig").splitlines()
        elif table and (path.is_file() or " " not in argument):
            texts += read_lines(path, text_column)
        else:
            texts.append(argument)
    if not texts:
        raise DataError("There is no text to classify. Give sentences, a table, or - for the standard input.")
    return texts


def predict_texts(
    classifier: Any, arguments: list[str], text_column: str | None, output: Path | None, resume: bool,
    how: dict[str, Any], as_json: bool,
) -> tuple[int, int]:  # fmt: skip
    """Classify and print, or write; how many texts were skipped, of how many."""
    from ..predicting import classify_texts, classify_to_file

    texts = texts_of(arguments, text_column)
    if output is not None:
        written = classify_to_file(classifier, texts, output, resume=resume, **how)
        for error in written.skipped:
            warn(f"Skipped: {error}")
        result = {"output": str(output), "classified": written.classified, "skipped": len(written.skipped)}
        result["resumed"] = written.resumed
        emit(as_json, result, lambda: say(f"{written.classified} texts classified in {output}"))
        return len(written.skipped), len(texts)
    how = {name: value for name, value in how.items() if name not in ("engine", "precision")}
    rows = list(classify_texts(classifier, texts, **dict(how, progress=how["progress"] and not sys.stdout.isatty())))
    for row in rows:
        if row["error"]:
            warn(f"Skipped: {row['error']}")
        elif not as_json:
            listed = [
                top["label"] if top["score"] is None else f"{top['label']} {percent(top['score'])}"
                for top in row["predictions"]
            ]
            say(f"{_short(row['text'])}: {', '.join(listed)}")
    if as_json:
        emit(True, rows, lambda: None)
    return sum(row["error"] is not None for row in rows), len(texts)


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
