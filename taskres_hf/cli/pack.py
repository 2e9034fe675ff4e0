"""`taskres pack`, and what other commands do with a packed file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .screen import emit, percent, quiet_libraries, say, show_table, warn, when_interrupted
from .values import resolve_base

if TYPE_CHECKING:
    from ..pool import Pack

Classifier = Annotated[
    list[str] | None,
    typer.Option(
        "--classifier", metavar="NAME", show_default=False, rich_help_panel=opt.MODEL,
        help="One of those in a packed file or a folder of classifiers; again for more. All by default.",
    ),
]  # fmt: skip
_COLUMNS = ["classifier", "classes", "base", "recipe", "shots", "KB"]


def pack(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...",
            show_default=False,
            help="Folders or Hub ids of classifiers over one base, NAME=FOLDER, or a folder of such folders. With "
            "--list and --unpack the packed file.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The packed file; with --unpack the folder.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Say what is in a packed file.")] = False,
    unpacking: Annotated[bool, typer.Option("--unpack", help="Write the very folders that were packed.")] = False,
    classifier: Classifier = None,
    base_rows: Annotated[
        bool,
        typer.Option(
            "--base-rows/--no-base-rows",
            rich_help_panel=opt.OUTPUT,
            help="Pack the text embeddings of the classes too, so that loading needs no text tower. Without, the file "
            "is half as large and the base is not loaded now.",
        ),
    ] = True,
    base_model: opt.BaseModel = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Put many classifiers over one base into one file; list one, or unpack it again.

    Example:  taskres pack classifiers/ -o pool.safetensors
    """  # fmt: skip
    when_interrupted(lambda: "Nothing was changed.")
    if show and unpacking:
        raise typer.BadParameter("give one of --list and --unpack.", param_hint="--list")
    if (show or unpacking) and len(sources) != 1:
        raise typer.BadParameter("name one packed file.", param_hint="FOLDER...")
    if (output is None) != show:
        hint = "it writes nothing." if show else "say where to, with --output PATH."
        raise typer.BadParameter(hint, param_hint="--output")
    if show:
        _show(sources[0], classifier, as_json)
    elif unpacking:
        assert output is not None
        from ..pool.packing import unpack

        folders = [str(folder) for folder in unpack(sources[0], output, classifier)]
        emit(as_json, {"folders": folders}, lambda: say(f"Unpacked {_many(len(folders))} into {output}"))
    else:
        assert output is not None
        quiet_libraries(quiet or as_json, collect=as_json)
        packed = _packed(sources, output, base_rows, base_model and resolve_base(base_model))
        result = {"output": str(output), "classifiers": packed.names, "bytes": output.stat().st_size}
        size = f"{output.stat().st_size / 1e6:.1f} MB"
        emit(as_json, result, lambda: say(f"Packed {_many(len(packed))} in {output}, {size}"))


def _many(count: int) -> str:
    return f"{count} classifier{'s' if count != 1 else ''}"


def _packed(sources: list[str], output: Path, base_rows: bool, base_model: str | None) -> Pack:
    from ..pool import pack, pack_with_base
    from ..pool.packing import folders_in

    folders = folders_in(sources)
    return pack_with_base(folders, output, base_model) if base_rows else pack(folders, output)


def _show(path: str, names: list[str] | None, as_json: bool) -> None:
    from ..pool.packing import Pack, described

    packed = Pack(path)
    rows = [row for row in described(packed) if names is None or row["name"] in names]
    for name in names or ():
        packed.files(name)  # says which there are
    result = {"classifiers": rows, "base_rows": packed.has_base, "bytes": os.path.getsize(path)}

    def tell() -> None:
        cells = [
            [row["name"], row["classes"], Path(row["base_model"]).name, row["recipe"], row["shots"],
             round(row["bytes"] / 1e3)]
            for row in rows
        ]  # fmt: skip
        show_table(_COLUMNS, cells, caption="" if packed.has_base else "Without the text embeddings of the classes.")

    emit(as_json, result, tell)


@contextmanager
def unpacked(sources: Sequence[str]) -> Iterator[list[str]]:
    """Classifiers as they were named, of a packed file each of its own as NAME=FOLDER, while this lasts."""
    from ..pool.packing import Pack, is_pack, unpack

    with tempfile.TemporaryDirectory() as scratch:
        found: list[str] = []
        for number, source in enumerate(sources):
            if not is_pack(source):
                found.append(source)
                continue
            from ..pool.classifiers import keep_tables

            packed = Pack(source)
            keep_tables(packed, packed.names)
            found += [f"{folder.name}={folder}" for folder in unpack(packed, Path(scratch, str(number)))]
        yield found


def several_at(
    model: str, names: Sequence[str] | None, revision: str | None
) -> tuple[Pack | dict[str, str] | None, list[str]]:
    """The classifiers that a packed file or a folder of their folders holds, and the names of those to ask."""
    from ..pool.packing import classifiers_at

    found = classifiers_at(model, names or ())
    if found is None and names:
        hint = f"it is for packed files and folders of classifiers, and {model!r} is neither."
        raise typer.BadParameter(hint, param_hint="--classifier")
    if found is not None and revision is not None:
        raise typer.BadParameter("it is for the Hub, and these classifiers are files.", param_hint="--revision")
    return found, list(dict.fromkeys(names or found or ()))


def by_several(
    found: Pack | dict[str, str],
    names: list[str],
    files: list[str],
    output: Path | None,
    how: dict[str, Any],
    as_json: bool,
    base_model: Any,
    **options: Any,
) -> int:
    """Classify files by several classifiers, to the screen or to a file. Returns how many could not be read.

    Pictures are prepared as for one classifier, see `predicting`.

    Args:
        how: `top_k`, `batch_size`, `resume` and `progress`.
    """
    from ..pool import ClassifierPool

    chosen = {name: found[name] for name in names} if isinstance(found, dict) else found
    pool = ClassifierPool(base_model, chosen, exact_preprocessing=False, **options)
    if output is None:
        return _to_screen(pool.classify_files(files, names, top_k=how["top_k"], batch_size=how["batch_size"]), as_json)
    written = pool.classify_to_file(files, output, names, **how)
    for error in written.skipped:
        warn(f"Skipped: {error}")
    result = {"output": str(output), "classifiers": names, "classified": written.classified}
    result |= {"skipped": len(written.skipped), "resumed": written.resumed}
    many = f"{written.classified} pictures classified by {_many(len(names))} in {output}"
    emit(as_json, result, lambda: say(many))
    return len(written.skipped)


def _to_screen(answers: Iterator[dict[str, Any]], as_json: bool) -> int:
    rows = []
    for row in answers:
        rows.append(row)
        if row["error"]:
            warn(f"Skipped: {row['error']}")
        elif not as_json:
            say(f"{row['file']}:")
            for name, found in row["classifiers"].items():
                listed = ", ".join(f"{top['label']} {percent(top['score'])}" for top in found)
                say(f"  {name}: {listed or 'no label'}")
    if as_json:
        emit(True, rows, lambda: None)
    return sum(row["error"] is not None for row in rows)
