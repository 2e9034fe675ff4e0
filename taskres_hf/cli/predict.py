"""`taskres predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from . import options as opt
from .embed import Address, EngineCluster, Keep, RowsPerBlock, Workers, cluster_of, kept_blocks, tell
from .pack import Classifier, by_several, several_at
from .screen import emit, percent, quiet_libraries, say, say_loading, warn, when_interrupted
from .texts import TextColumn, is_of_texts, predict_texts
from .values import check_device, resolve_base

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..pool import Pack

Model = Annotated[
    str,
    typer.Argument(
        help="Folder or Hub id of a trained classifier; or a packed file, or a folder of classifiers over one base.",
        show_default=False,
    ),
]
Images = Annotated[
    list[str],
    typer.Argument(
        help="Pictures, folders of pictures (searched in depth) and URLs; with --output-dir also parquet files and "
        "WebDataset shards. By a classifier of texts: sentences, tables, or - for the lines of the standard input.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write .csv, .jsonl or .parquet instead of printing."),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output-dir", metavar="FOLDER",
        help="Write parquet files, a block each: for data sets (parquet, .tar, folders), alone or with "
        "--engine-cluster.",
    ),
]  # fmt: skip
AllowSkipped = Annotated[
    bool,
    typer.Option("--allow-skipped", help="End with 0 although pictures were skipped.", rich_help_panel=opt.OUTPUT),
]
ResumeOutput = Annotated[
    bool, typer.Option("--resume", help="Go on with the rows that an interrupted run left.", rich_help_panel=opt.OUTPUT)
]
TopK = Annotated[
    int | None, typer.Option(help="Classes per picture; one, or all labels of several.", min=1, metavar="N")
]


def predict(
    model: Model,
    images: Images,
    top_k: TopK = None,
    output: Output = None,
    output_dir: OutputDir = None,
    classifier: Classifier = None,
    device: opt.Device = None,
    strength: opt.Strength = None,
    text_column: TextColumn = None,
    reject: opt.Rejecting = False,
    unknown_label: opt.UnknownLabel = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    dtype: opt.Dtype = None,
    use_cpu: opt.Cpu = False,
    engine: opt.Engine = opt.EngineName.AUTO,
    precision: opt.Precision = opt.PrecisionName.AUTO,
    batch_size: opt.BatchSize = None,
    resume: ResumeOutput = False,
    engine_cluster: EngineCluster = None,
    address: Address = None,
    workers: Workers = None,
    rows_per_block: RowsPerBlock = 10_000,
    image_column: opt.ImageColumn = None,
    keep: Keep = None,
    allow_skipped: AllowSkipped = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Classify pictures. Unreadable ones are reported and skipped; the exit code is then 3.

    Example:  taskres predict my-classifier holiday/ cat.jpg --top-k 3 --output labels.csv
    Example:  taskres predict pool.safetensors holiday/ --output labels.csv
    """
    when_interrupted(lambda: _what_is_kept(output) if output_dir is None else kept_blocks(output_dir))
    if resume and output is None:
        raise typer.BadParameter("it goes on with a file: name it with --output.", param_hint="--resume")
    if unknown_label is not None and not reject:
        raise typer.BadParameter("it names rejected pictures: add --reject.", param_hint="--unknown-label")
    quiet_libraries(quiet or as_json, collect=as_json)
    if output_dir is not None:
        if output is not None:
            raise typer.BadParameter("give it or --output, a single file.", param_hint="--output-dir")
        say_loading(model, quiet or as_json)
        found, names = several_at(model, classifier, None)
        written = _in_blocks(
            [found[name] for name in names] if isinstance(found, dict) else model, images, output_dir,
            [] if isinstance(found, dict) else names, top_k=top_k, reject=reject,
            unknown=unknown_label or "unknown", image_column=image_column, keep=keep or [],
            rows_per_block=rows_per_block, batch_size=batch_size, engine=engine.value, precision=precision.value,
            device=check_device(device, use_cpu), progress=not (quiet or as_json), strength=strength,
            cluster=cluster_of(engine_cluster, address, workers), base_model=base_model and resolve_base(base_model),
            dtype=dtype and dtype.value, revision=revision,
        )  # fmt: skip
        return tell(written, as_json, allow_skipped, "classified")
    _refuse_alone({"--engine-cluster": engine_cluster, "--address": address, "--workers": workers, "--keep": keep,
                   "--image-column": image_column})  # fmt: skip
    from ..prediction_files import check_output

    if output is not None:
        check_output(output)
    device = check_device(device, use_cpu)
    options: dict[str, Any] = {"base_model": base_model and resolve_base(base_model), "dtype": dtype and dtype.value}
    how: dict[str, Any] = {
        "top_k": top_k, "batch_size": batch_size, "engine": engine.value, "precision": precision.value,
        "progress": not (quiet or as_json), "reject": reject, "unknown": unknown_label or "unknown",
    }  # fmt: skip
    found, names = several_at(model, classifier, revision)
    model = found[names[0]] if isinstance(found, dict) and len(names) == 1 else model
    if len(names) < 2 and is_of_texts(model, revision):
        say_loading(model, quiet or as_json)
        loaded = _loaded(model, None, [], device, {**options, "strength": strength, "revision": revision})
        _end(*predict_texts(loaded, images, text_column, output, resume, how, as_json), allow_skipped, "texts")
        return
    files = _listed(images)
    say_loading(model, quiet or as_json)
    if found is not None and len(names) > 1:
        _refuse({"--reject": reject})
        options |= {"device": device, "engine": engine.value, "precision": precision.value, "strength": strength}
        asked = {key: how[key] for key in ("top_k", "batch_size", "progress")} | {"resume": resume}
        _end(by_several(found, names, files, output, asked, as_json, **options), len(files), allow_skipped)
        return
    packed = None if isinstance(found, dict) else found
    loaded = _loaded(model, packed, names, device, {**options, "strength": strength, "revision": revision})
    if output is not None:
        skipped = _to_file(loaded, files, output, resume, how, as_json)
    else:
        skipped = _to_screen(loaded, files, how, as_json)
    _end(skipped, len(files), allow_skipped)


def _listed(images: list[str]) -> list[str]:
    """Picture files; what else was found is said."""
    from ..picture_files import list_images

    listing = list_images(images)
    for line in listing.lines():
        warn(line)
    if not listing.files:
        raise DataError(f"There are no pictures in {', '.join(images)}.")
    return listing.files


def _in_blocks(model: str | list[str], data: list[str], output_dir: Path, names: list[str], **how: Any) -> Any:
    """What `--output-dir` asks for. The same numbers on every machine: fp32 by torch, unless said otherwise."""
    from ..cluster import predict as run

    for option, plain in {"engine": "torch", "precision": "fp32"}.items():
        how[option] = plain if how[option] == "auto" else how[option]
    given = {name: value for name, value in how.items() if value is not None or name == "cluster"}
    return run(model, data, output_dir, names=names or None, **given)


def _refuse_alone(given: dict[str, Any]) -> None:
    """Options of data sets in blocks, where pictures go to one file or to the screen."""
    for option in (name for name, value in given.items() if value):
        raise typer.BadParameter("it is for data sets in blocks: add --output-dir FOLDER.", param_hint=option)


def _loaded(
    model: str, packed: Pack | None, names: list[str], device: str | None, options: dict[str, Any]
) -> TaskResCLIPForImageClassification:
    if packed is not None:
        from ..pool.classifiers import load_packed

        loaded = load_packed(packed, names[0], **{**options, "revision": None})
    else:
        from ..modeling_taskres import TaskResCLIPForImageClassification

        loaded = TaskResCLIPForImageClassification.from_pretrained(model, **options)
    if device:
        loaded.to(device)  # type: ignore[arg-type]
    return loaded


def _refuse(given: dict[str, Any]) -> None:
    """Options that are for one classifier, where there are several."""
    for option in (name for name, value in given.items() if value):
        raise typer.BadParameter("it is for one classifier: name it with --classifier.", param_hint=option)


def _end(skipped: int, count: int, allow_skipped: bool, what: str = "pictures") -> None:
    if skipped:
        warn(f"{skipped} of {count} {what} were skipped.")
        if not allow_skipped:
            raise typer.Exit(3)


def _to_file(
    classifier: TaskResCLIPForImageClassification,
    files: list[str],
    output: Path,
    resume: bool,
    how: dict[str, Any],
    as_json: bool,
) -> int:
    from ..predicting import classify_to_file

    written = classify_to_file(classifier, files, output, resume=resume, **how)
    for error in written.skipped:
        warn(f"Skipped: {error}")
    result = {"output": str(output), "classified": written.classified, "skipped": len(written.skipped)}
    result["resumed"] = written.resumed
    emit(as_json, result, lambda: say(f"{written.classified} pictures classified in {output}"))
    return len(written.skipped)


def _to_screen(
    classifier: TaskResCLIPForImageClassification, files: list[str], how: dict[str, Any], as_json: bool
) -> int:
    """Rows as they come for people, all at the end as JSON."""
    from ..predicting import classify_files

    how = dict(how, progress=how["progress"] and not sys.stdout.isatty())  # there the rows show the progress
    rows = []
    for row in classify_files(classifier, files, **how):
        rows.append(row)
        if row["error"]:
            warn(f"Skipped: {row['error']}")
        elif not as_json:
            listed = ", ".join(
                top["label"] if top["score"] is None else f"{top['label']} {percent(top['score'])}"
                for top in row["predictions"]
            )
            say(f"{row['file']}: {listed or 'no label'}")
    if as_json:
        emit(True, rows, lambda: None)
    return sum(row["error"] is not None for row in rows)


def _what_is_kept(output: Path | None) -> str:
    if output is None:
        return "Nothing was written; --output FILE keeps what is classified so far."
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        return f"The rows so far are kept in {partial}: the same command with --resume goes on from there."
    return f"{output} was not changed."
