"""`taskres analyze`: how hard a task is for zero-shot, and how far its residual went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import ConfigurationError
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
    portable,
    sources_of,
    task_options,
)
from .run_config import read_run, write_run
from .screen import console, emit, quiet_libraries, say, say_loading, warn, when_interrupted
from .values import check_device, public_name, read_numbers, resolve_base, use_device, without_base


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
    """Set how far residuals went against how hard the tasks are for zero-shot: of one trained classifier, class by
    class, or of every task x shots x seed x recipe, with rank correlations. Finished runs are kept.

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
    """Whether these are a trained classifier or data.

    Raises:
        ConfigurationError: it can be either, or both are named.
    """
    kinds = {text: _kind_of(text) for text in dict.fromkeys(texts)}
    if len(set(kinds.values())) > 1:
        model = next(text for text, kind in kinds.items() if kind is Kind.MODEL)
        raise ConfigurationError(f"{model} is a trained classifier and the rest is data: analyze one or the other.")
    return next(iter(kinds.values()))


def _kind_of(text: str) -> Kind:
    from ..paper.datasets import suite_datasets
    from ..paper.tasks import named_sources
    from ..storage import is_path

    path = Path(text).expanduser()
    if path.is_dir() and _is_artifact(path):
        if _has_pictures_below(path):
            _either(text, "holds a trained classifier and folders of pictures")
        return Kind.MODEL
    if is_path(text) or "=" in text or text in suite_datasets() or named_sources(text) != [(None, text)]:
        return Kind.DATA
    from huggingface_hub import HfApi

    try:
        found = [kind for kind, name in ((Kind.MODEL, "model"), (Kind.DATA, "dataset"))
                 if HfApi().repo_exists(text, repo_type=name)]  # fmt: skip
    except Exception as error:  # the client's errors of the network have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _either(text, f"is no path here, and the Hub could not be asked ({reason})")
    if len(found) > 1:
        _either(text, "is a model and a dataset on the Hub")
    return found[0] if found else Kind.DATA


def _either(text: str, why: str) -> NoReturn:
    raise ConfigurationError(f"{text} {why}: say which is meant, with --kind model or --kind data.")


def _is_artifact(folder: Path) -> bool:
    from ..artifact import CONFIG, WEIGHTS
    from ..errors import ArtifactError
    from ..storage import read_json

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return False
    try:
        return read_json(folder / CONFIG).get("model_type") == "taskres"
    except ArtifactError:
        return True  # a damaged one; loading it says what is wrong


def _has_pictures_below(folder: Path) -> bool:
    from ..pictures import find_images, is_ignored

    return any(find_images([entry]) for entry in folder.iterdir() if entry.is_dir() and not is_ignored(entry.name))


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
    from ..analysis.magnitude import describe_residual
    from ..modeling_taskres import TaskResCLIPForImageClassification

    when_interrupted(lambda: "Nothing was changed.")
    say_loading(name, quiet)
    base = run["base_model"] and resolve_base(run["base_model"])
    model = TaskResCLIPForImageClassification.from_pretrained(name, revision=run["revision"], base_model=base)
    model.classifier.check_one_label("The analysis")
    facts = describe_residual(model.classifier, model.class_names, model.config.metrics)
    measured_on = (model.config.metrics or {}).get("method"), (model.config.metrics or {}).get("split")
    about = {
        "artifact": name, "recipe": (model.config.training or {}).get("recipe"), "alpha": model.config.alpha,
        "strength": model.strength, "measured_by": measured_on[0], "split": measured_on[1],
    }  # fmt: skip
    told = {key: vars(value) for key, value in facts["correlations"].items()}
    emit(as_json, {**about, **facts, "correlations": told}, lambda: _show_model(about, facts))


def _show_model(about: dict[str, Any], facts: dict[str, Any]) -> None:
    from ..analysis.magnitude import DIFFICULTIES, MAGNITUDES
    from ..tables import Table

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    said = ["mean_abs", "relative_length", "turn", "turn_apart"]
    cells = [
        [row["name"], row["support"], share(row["zero_shot_accuracy"]), share(row["accuracy"]),
         *(f"{row[key]:.3f}" if place < 2 else f"{row[key]:.1f}" for place, key in enumerate(said))]
        for row in facts["classes"]
    ]  # fmt: skip
    columns = ["class", "pictures", "zero-shot", "accuracy", *(MAGNITUDES[key] for key in said)]
    title = f"{about['artifact']}: how far the residual of each class went, accuracies in percent"
    console().print(Table(columns, cells, title).rich())
    say("")
    if facts["difficulty"] is None:
        say("Difficulty: not told, because no zero-shot accuracy is recorded; see taskres evaluate.")
    else:
        names = "; ".join(f"{DIFFICULTIES[key]} {value:.3f}" for key, value in facts["difficulty"].items())
        say(f"Difficulty: {names} (zero-shot accuracy {share(facts['zero_shot_accuracy'])} %)")
    say("Magnitude: " + "; ".join(f"{MAGNITUDES[key]} {value:.3f}" for key, value in facts["magnitude"].items()))
    for key in ("relative_length", "turn_apart"):
        told = facts["correlations"][key]
        say(f"Rank correlation over {told.count} classes of zero-shot error with {MAGNITUDES[key]}: {told}")


# ---------------------------------------------------------------------------------------------------- many tasks


def _analyze_data(context: typer.Context, run: dict[str, Any], texts: list[str], quiet: bool, as_json: bool) -> None:
    sources = sources_of(context, texts)
    counts, draws = read_numbers(run["shots"], "--shots"), read_numbers(run["seeds"], "--seeds")
    folder = Path(run["output_dir"])
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file; --output-dir names a folder.")
    use_device(check_device(run["device"]))
    from ..analysis import transfer

    recipes = [name.strip() for name in run["recipes"].split(",") if name.strip()]
    transfer.check_recipes(recipes)
    when_interrupted(lambda: f"Finished runs are kept in {folder}: the same command goes on from there.")
    results = _train(run, sources, folder, quiet, recipes=recipes, shots=counts, seeds=draws)
    name = public_name(run["base_model"] or opt.default_base_model())
    files = transfer.write_transfer(results, folder, name)
    write_run(folder, {**run, "data": [f"{key}={source}" for key, source in portable(sources)]}, "analyze")

    def show() -> None:
        for table in transfer.shown_tables(results, [max(counts)]):
            console().print(table.rich())
            say("")
        say("\n".join([f"Base model {name}", *transfer.notes(results)]))
        say("Written: " + ", ".join(map(str, files)))

    emit(as_json, {**transfer.summary(results, name), "files": [str(file) for file in files]}, show)
    failed = [result for result in results if "error" in result]
    for reason in dict.fromkeys(f"{result['recipe']}: {result['error']}" for result in failed):
        warn(f"No result: {reason}")
    if not files:
        warn("Error: no run has a result.")
        raise typer.Exit(1)


def _train(run: dict[str, Any], sources: Any, folder: Path, quiet: bool, **grid: Any) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    from ..analysis.transfer import analyse_transfer

    name = run["base_model"] or opt.default_base_model()
    say_loading(f"the base model {name}", quiet)
    with tqdm(desc="Training", unit="run", disable=quiet, leave=False) as bar:

        def show(cell: Any, result: dict[str, Any], was_done: bool) -> None:
            bar.set_description(f"{cell.dataset}, {cell.shots} shots, seed {cell.seed}, {cell.method}", refresh=False)
            bar.update()

        try:
            return analyse_transfer(
                resolve_base(name), sources, folder, on_cell=show, on_start=lambda total: bar.reset(total),
                **grid, **task_options(run, quiet),
            )  # fmt: skip
        except OSError as error:
            raise without_base(name, error) from error
