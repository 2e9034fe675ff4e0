"""`taskres compare`: few-shot methods on the user's own data, with one command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .run_config import read_run, write_run
from .screen import console, emit, quiet_libraries, say, say_loading, warn, when_interrupted
from .values import (
    check_device,
    check_folder_of_runs,
    public_name,
    read_class_names,
    read_numbers,
    read_templates,
    resolve_base,
    use_device,
    without_base,
)

_EMBEDDING = ("engine", "precision", "crop", "embed_batch_size", "cache_dir", "on_error")
_READING = {
    "train_split": "train_split", "eval_split": "eval_split", "config_name": "config_name",
    "class_folder": "class_folder", "image_column": "image_column", "label_column": "label_column",
    "class_names": "class_names", "drop_unlabelled": "drop_unlabelled", "dataset_revision": "revision",
}  # fmt: skip

_Data = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="DATA...",
        show_default=False,
        help=f"{opt.DATA_HELP} Several are compared on together; NAME=DATA names one. Also a dataset of "
        "`taskres benchmark --list`, 'paper' for the 11, 'shipped' for the demo's.",
    ),
]
DataOption = Annotated[
    list[str] | None, typer.Option("--dataset", hidden=True, help="The same as DATA.", rich_help_panel=opt.DATA)
]
Output = Annotated[
    Path, typer.Option("--output-dir", "-o", metavar="FOLDER", help="Folder to write; what is finished there stays.")
]
_Methods = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Comma list of methods; 'default' for those that take seconds on a CPU, 'all'. See --list.",
    ),
]
Shots = Annotated[str, typer.Option(metavar="LIST", help="Pictures per class, a comma list.")]
Seeds = Annotated[str, typer.Option(metavar="LIST", help="Of the draws, a comma list.")]
_ListMethods = Annotated[bool, typer.Option("--list", help="List the methods and stop.")]
Root = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Official images of described datasets.", rich_help_panel=opt.DATA),
]
AllowOtherSplit = Annotated[
    bool,
    typer.Option(
        "--allow-other-split",
        help="Accept a copy of a described dataset that is not its published split.",
        rich_help_panel=opt.DATA,
    ),
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split to measure on: test, else validation. 'none': hold a part out each seed.",
        rich_help_panel=opt.DATA,
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of every class that each seed holds out and measures on; 0.5 where no split is there for that.",
        rich_help_panel=opt.DATA,
    ),
]


def compare(
    context: typer.Context,
    data: _Data = None,
    output_dir: Output = Path("taskres-compare"),
    base_model: opt.TrainBase = None,
    methods: _Methods = "default",
    shots: Shots = "1,2,4,8,16",
    seeds: Seeds = "1,2,3",
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    device: opt.Device = None,
    config: opt.Config = None,
    list_methods: _ListMethods = False,
    # ---- dataset
    data_option: DataOption = None,
    root: Root = None,
    allow_other_split: AllowOtherSplit = False,
    train_split: opt.TrainSplit = None,
    eval_split: EvalSplit = None,
    holdout: Holdout = None,
    on_error: opt.OnError = opt.BrokenPicture.RAISE,
    drop_unlabelled: opt.DropUnlabelled = False,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    class_folder: opt.ClassFolder = None,
    config_name: opt.ConfigName = None,
    dataset_revision: opt.DatasetRevision = None,
    # ---- base model, speed, output
    base_revision: opt.BaseRevision = None,
    views: opt.Views = 0,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    crop: opt.Crop = None,
    embed_batch_size: opt.BatchSize = None,
    cache_dir: opt.CacheDir = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Compare few-shot methods on your own pictures: accuracy, harm, calibration, cost, significance.

    All methods see the same draws. Finished fits are kept: the same command goes on from there.

    Example:  taskres compare photos/ --shots 1,4,16
    """
    quiet_libraries(quiet or as_json, collect=as_json)
    if list_methods:
        _list(as_json)
        return
    run = read_run(context, config, training=False)
    given = [*(data or []), *(data_option or [])] or run["data"] or []
    sources = sources_of(context, [given] if isinstance(given, str) else given)
    counts, draws, folder = grid_of(run)
    use_device(check_device(run["device"]))
    from ..paper.compare import choose_methods

    chosen = choose_methods([name.strip() for name in run["methods"].split(",") if name.strip()])
    when_interrupted(lambda: f"Finished fits are kept in {folder}: the same command goes on from there.")
    results = _run(run, sources, folder, chosen, counts, draws, quiet or as_json)
    write_run(folder, {**run, "data": [f"{name}={source}" for name, source in portable(sources)]}, "compare")
    _report(results, folder, run["base_model"] or opt.default_base_model(), as_json)


def grid_of(run: dict[str, Any]) -> tuple[list[int], list[int], Path]:
    """Shots, seeds, and the folder to write.

    Raises:
        ArtifactError: that is a file or cannot be written.
    """
    counts, draws = read_numbers(run["shots"], "--shots"), read_numbers(run["seeds"], "--seeds")
    folder = Path(run["output_dir"])
    check_folder_of_runs(folder)
    return counts, draws, folder


def sources_of(context: typer.Context, texts: list[str]) -> dict[str, str] | list[str]:
    """What to compare on: sources as they are or, where one of them is named, by name."""
    if not texts:
        context.fail("Missing argument 'DATA...': a folder of pictures, a table, a Hub dataset id, or 'shipped'.")
    texts = list(dict.fromkeys(texts))
    pairs = [("", text) if os.path.exists(text) else _pair(text) for text in texts]
    if not any(name for name, _ in pairs):
        return texts
    from ..paper.tasks import default_name

    named = {name or default_name(source): source for name, source in pairs}
    if len(named) < len(pairs):
        context.fail("Two datasets have one name: give each its own, as in first=PATH second=PATH.")
    return named


def _pair(text: str) -> tuple[str, str]:
    name, sign, source = text.partition("=")
    return (name.strip(), source.strip()) if sign and name.strip() and source.strip() else ("", text)


def portable(sources: dict[str, str] | list[str]) -> list[tuple[str, str]]:
    """Names and sources that hold from any folder."""
    from ..paper.tasks import default_name, named_sources

    pairs = [(name or default_name(source), source) for name, source in named_sources(sources)]
    return [(name, str(Path(source).resolve()) if os.path.exists(source) else source) for name, source in pairs]


def _run(
    run: dict[str, Any],
    sources: Any,
    folder: Path,
    methods: list[str],
    shots: list[int],
    seeds: list[int],
    quiet: bool,
) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    from ..paper.compare import compare_methods

    name = run["base_model"] or opt.default_base_model()
    say_loading(f"the base model {name}", quiet)
    with tqdm(desc="Fitting", unit="fit", disable=quiet, leave=False) as bar:

        def show(cell: Any, result: dict[str, Any], was_done: bool) -> None:
            bar.set_description(f"{cell.dataset}, {cell.shots} shots, seed {cell.seed}, {cell.method}", refresh=False)
            bar.update()
            if "error" in result and not quiet and (cell.method, result["error"]) not in told:
                told.add((cell.method, result["error"]))
                bar.write(f"{cell.method}: {result['error']}")

        told: set[tuple[str, str]] = set()
        try:
            return compare_methods(
                resolve_base(name), sources, folder, methods=methods, shots=shots, seeds=seeds, on_cell=show,
                on_start=lambda total: bar.reset(total), **task_options(run, quiet),
            )  # fmt: skip
        except OSError as error:
            raise without_base(name, error) from error


def task_options(run: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """What the options say of the tasks, how they are read, and how their pictures are embedded."""
    arguments = {key: run[key] for key in _EMBEDDING if run[key] is not None}
    arguments |= {"use_cpu": run["device"] == "cpu", "disable_tqdm": quiet}
    reading = {theirs: run[ours] for ours, theirs in _READING.items()}
    reading["class_names"] = read_class_names(run["class_names"])
    return {
        "templates": read_templates(run["templates"]), "root": run["root"], "holdout": run["holdout"],
        "allow_other_split": run["allow_other_split"], "reading": reading, "revision": run["base_revision"],
        "views": run["views"], "arguments": arguments,
    }  # fmt: skip


def _report(results: list[dict[str, Any]], folder: Path, base_model: str, as_json: bool) -> None:
    """Write the reports and say what they say."""
    from ..paper import comparison
    from ..paper.figures import can_draw

    name = public_name(base_model)
    files = comparison.write_report(results, folder, name)
    rows, pairs = comparison.summarise_methods(results), comparison.paired_differences(results)
    ran = comparison.what_ran(results, name)
    no_figures = "" if can_draw() else 'No figures without matplotlib: pip install "taskres_hf[plots]", then run again.'
    summary = {
        "base_model": name, "methods": rows, "against_taskres": pairs, "failures": comparison.failures(results),
        "what_ran": ran, "files": [str(file) for file in files], **({"no_figures": no_figures} if no_figures else {}),
    }  # fmt: skip

    def show() -> None:
        tables = [comparison.accuracy_table(rows, results), comparison.cost_table(rows, results)]
        tables += [comparison.difference_table(pairs)] if pairs else []
        for table in tables:
            console().print(table.rich())
            say("")
        say("\n".join([*ran, *comparison.failure_lines(results)]))
        say(no_figures or "The figures show the same: accuracy.png and time.png.")
        say("Written: " + ", ".join(map(str, files)))

    emit(as_json, summary, show)
    if not comparison.finished(results):
        warn("Error: no method has a result.")
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    from ..methods.method import METHODS
    from ..paper.compare import choose_methods, known_methods

    quick = set(choose_methods())
    rows: list[dict[str, Any]] = []
    for name in known_methods():
        method = METHODS[name]()
        rows.append({
            "name": name, "title": method.title, "source": method.source, "needs": sorted(method.needs),
            "default": name in quick,
        })  # fmt: skip

    def show() -> None:
        from ..tables import Table

        cells = [
            [row["name"], row["title"], ", ".join(row["needs"]), "yes" if row["default"] else "no"] for row in rows
        ]
        console().print(Table(["name", "method", "needs besides embeddings", "default"], cells).rich())

    emit(as_json, rows, show)
