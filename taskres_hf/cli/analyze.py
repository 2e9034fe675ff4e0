"""`taskres analyze`: how hard a task is for zero-shot, and how far its residual went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .compare import (
    AllowOtherSplit,
    DataOption,
    EvalSplit,
    Holdout,
    Output,
    Root,
    Seeds,
    Shots,
    grid_of,
    portable,
    sources_of,
    task_options,
)
from .run_config import read_run, write_run
from .screen import console, emit, quiet_libraries, say, say_loading, show_table, warn, when_interrupted
from .values import check_device, public_name, resolve_base, use_device, without_base


class Kind(opt.Choice):
    MODEL = "model"
    DATA = "data"


_What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL|DATA...",
        show_default=False,
        help="One trained classifier (folder or Hub id), or tasks to train on, as `taskres compare` takes them: "
        "folders of pictures, tables, Hub datasets, 'shipped' for the demo's. NAME=DATA names one.",
    ),
]
_Kind = Annotated[
    Kind | None,
    typer.Option("--kind", help="What MODEL|DATA is, where it can be either.", show_default=False),
]
_Recipes = Annotated[str, typer.Option(metavar="NAMES", help="Comma list of paper, auto and auto-v1.")]
_OF_MODELS = {"what", "kind", "base_model", "revision", "device", "as_json", "quiet", "debug"}
_NOT_OF_DATA = {"revision"}


def analyze(
    context: typer.Context,
    data: _What = None,
    output_dir: Output = Path("taskres-analysis"),
    base_model: opt.TrainBase = None,
    recipes: _Recipes = "paper,auto",
    shots: Shots = "1,2,4,8,16",
    seeds: Seeds = "1,2,3",
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    device: opt.Device = None,
    config: opt.Config = None,
    kind: _Kind = None,
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
    # ---- models, speed, output
    revision: opt.Revision = None,
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
    """Set how far residuals went against how hard the tasks are for zero-shot.

    Of one trained classifier, class by class, or of every task x shots x seed x recipe, with rank correlations.
    Finished runs are kept.

    Example:  taskres analyze my-classifier
    Example:  taskres analyze shipped --base-model shipped --shots 1,16
    """
    quiet_libraries(quiet or as_json, collect=as_json)
    run = read_run(context, config, training=False)
    given = [*(data or []), *(data_option or [])] or run["data"] or []
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        context.fail("Missing argument 'MODEL|DATA...': a trained classifier, or data as for taskres compare.")
    chosen = kind or (Kind.DATA if data_option else _kind(texts))
    _refuse_others(context, chosen)
    if chosen is Kind.MODEL:
        if len(texts) > 1:
            context.fail("One classifier at a time: name a single MODEL, or only DATA.")
        _analyze_model(texts[0], run, quiet or as_json, as_json)
    else:
        _analyze_data(context, run, texts, quiet or as_json, as_json)


# ---------------------------------------------------------------------------------------------------- which of both


def _kind(texts: list[str]) -> Kind:
    from ..analysis.analyzing import kind_of

    return Kind(kind_of(texts))


def _refuse_others(context: typer.Context, kind: Kind) -> None:
    """Refuse options that mean nothing for what was given."""
    typed = {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if (source := context.get_parameter_source(str(parameter.name))) is not None and source.name == "COMMANDLINE"
    }
    wrong = [
        option for name, option in typed.items()
        if (name not in _OF_MODELS | {"data"} if kind is Kind.MODEL else name in _NOT_OF_DATA)
    ]  # fmt: skip
    if wrong:
        other = "DATA" if kind is Kind.MODEL else "a MODEL"
        context.fail(f"{', '.join(wrong)} is for {other}, and this is {'a MODEL' if kind is Kind.MODEL else 'DATA'}.")


# ---------------------------------------------------------------------------------------------------- one classifier


def _analyze_model(name: str, run: dict[str, Any], quiet: bool, as_json: bool) -> None:
    use_device(check_device(run["device"]))
    from ..analysis import analyzing, magnitude

    when_interrupted(lambda: "Nothing was changed.")
    say_loading(name, quiet)
    base = run["base_model"] and resolve_base(run["base_model"])
    facts = analyzing.analyse_model(name, revision=run["revision"], base_model=base)
    told = {key: vars(value) for key, value in facts["correlations"].items()}
    value = {**facts, "difficulty": analyzing.finite(facts["difficulty"]), "correlations": told}
    emit(as_json, value, lambda: _show_model(facts, magnitude.DIFFICULTIES, magnitude.MAGNITUDES))


def _show_model(facts: dict[str, Any], difficulties: dict[str, str], magnitudes: dict[str, str]) -> None:
    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    said = ["mean_abs", "relative_length", "turn", "turn_apart"]
    cells = [
        [row["name"], row["support"], share(row["zero_shot_accuracy"]), share(row["accuracy"]),
         *(f"{row[key]:.3f}" if place < 2 else f"{row[key]:.1f}" for place, key in enumerate(said))]
        for row in facts["classes"]
    ]  # fmt: skip
    columns = ["class", "pictures", "zero-shot", "accuracy", *(magnitudes[key] for key in said)]
    title = f"{facts['artifact']}: how far the residual of each class went, accuracies in percent"
    show_table(columns, cells, title=title)
    say("")
    if facts["difficulty"] is None:
        say("Difficulty: not told, because no zero-shot accuracy is recorded; see taskres evaluate.")
    else:
        names = "; ".join(f"{difficulties[key]} {value:.3f}" for key, value in facts["difficulty"].items())
        say(f"Difficulty: {names} (zero-shot accuracy {share(facts['zero_shot_accuracy'])} %)")
    say("Magnitude: " + "; ".join(f"{magnitudes[key]} {value:.3f}" for key, value in facts["magnitude"].items()))
    for key in ("relative_length", "turn_apart"):
        told = facts["correlations"][key]
        say(f"Rank correlation over {told.count} classes of zero-shot error with {magnitudes[key]}: {told}")


# ---------------------------------------------------------------------------------------------------- many tasks


def _analyze_data(context: typer.Context, run: dict[str, Any], texts: list[str], quiet: bool, as_json: bool) -> None:
    sources = sources_of(context, texts)
    counts, draws, folder = grid_of(run)
    use_device(check_device(run["device"]))
    from ..analysis import analyzing

    recipes = [name.strip() for name in run["recipes"].split(",") if name.strip()]
    analyzing.check_recipes(recipes)
    when_interrupted(lambda: f"Finished runs are kept in {folder}: the same command goes on from there.")
    results = _train(
        analyzing.analyse_transfer, run, sources, folder, quiet, recipes=recipes, shots=counts, seeds=draws
    )
    name = public_name(run["base_model"] or opt.default_base_model())
    files = analyzing.write_transfer(results, folder, name)
    write_run(folder, {**run, "data": [f"{key}={source}" for key, source in portable(sources)]}, "analyze")

    def show() -> None:
        for table in analyzing.shown_tables(results, [max(counts)]):
            console().print(table.rich())
            say("")
        say("\n".join([f"Base model {name}", *analyzing.notes(results)]))
        say("Written: " + ", ".join(map(str, files)))

    emit(as_json, {**analyzing.summary(results, name), "files": [str(file) for file in files]}, show)
    failed = [result for result in results if "error" in result]
    for reason in dict.fromkeys(f"{result['recipe']}: {result['error']}" for result in failed):
        warn(f"No result: {reason}")
    if not files:
        warn("Error: no run has a result.")
        raise typer.Exit(1)


def _train(
    analyse: Any, run: dict[str, Any], sources: Any, folder: Path, quiet: bool, **grid: Any
) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    name = run["base_model"] or opt.default_base_model()
    say_loading(f"the base model {name}", quiet)
    with tqdm(desc="Training", unit="run", disable=quiet, leave=False) as bar:

        def show(cell: Any, result: dict[str, Any], was_done: bool) -> None:
            bar.set_description(f"{cell.dataset}, {cell.shots} shots, seed {cell.seed}, {cell.method}", refresh=False)
            bar.update()

        try:
            results: list[dict[str, Any]] = analyse(
                resolve_base(name), sources, folder, on_cell=show, on_start=lambda total: bar.reset(total),
                **grid, **task_options(run, quiet),
            )  # fmt: skip
            return results
        except OSError as error:
            raise without_base(name, error) from error
