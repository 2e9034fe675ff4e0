"""`taskres classes` and `taskres merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError
from . import options as opt
from .screen import emit, quiet_libraries, say, say_loading, show_table, when_interrupted
from .values import check_output_folder, read_templates, resolve_base

_CHANGES = "Changes, in this order"
_NamesToAdd = Annotated[
    list[str] | None,
    typer.Option("--add", metavar="NAME", help="Add a class behind the others; repeatable.", rich_help_panel=_CHANGES),
]
_NamesToRemove = Annotated[
    list[str] | None,
    typer.Option("--remove", metavar="NAME", help="Take a class away; repeatable.", rich_help_panel=_CHANGES),
]
_NamesToChange = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="OLD=NEW", help="Another name for a class; repeatable.", rich_help_panel=_CHANGES),
]
_Order = Annotated[
    Path | None,
    typer.Option("--order", metavar="FILE", help="All classes in a new order, one a line.", rich_help_panel=_CHANGES),
]
_Reembed = Annotated[
    bool,
    typer.Option("--reembed", help="Renamed classes get prompts of the new name.", rich_help_panel=_CHANGES),
]
_AddedTemplates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help="Prompt with {} for added classes.", rich_help_panel=_CHANGES),
]
_Pictures = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="DATASET",
        help="Pictures of the added classes, or of all, to learn from.",
        rich_help_panel=_CHANGES,
    ),
]
_Output = Annotated[Path | None, typer.Option("--output-dir", "-o", metavar="FOLDER", help="Folder to write.")]


def classes(
    model: opt.Artifact,
    output_dir: _Output = None,
    rename: _NamesToChange = None,
    reembed: _Reembed = False,
    remove: _NamesToRemove = None,
    add: _NamesToAdd = None,
    templates: _AddedTemplates = None,
    dataset: _Pictures = None,
    shots: opt.Shots = None,
    seed: opt.Seed = 1,
    order: _Order = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """List the classes of a classifier; add, remove, rename or reorder them.

    Added classes answer by their text at once, and better with --dataset.

    Changes are written to -o; --overwrite alone changes the classifier itself.

    Example:  taskres classes pets --add ferret --rename cat=tabby -o more
    """
    when_interrupted(lambda: "The classifier is as it was.")
    changes = any((rename, remove, add, order))
    quiet_libraries(quiet or as_json, heavy=changes, collect=as_json)
    if (dataset or templates) and not add:
        raise ConfigurationError("--dataset and --template are for classes that are added: name them with --add.")
    if reembed and not rename:
        raise ConfigurationError("--reembed is for classes that are renamed: name them with --rename OLD=NEW.")
    if not changes:
        if output_dir is not None:
            raise ConfigurationError("-o writes a changed classifier: say what to change (--add, --remove, --rename).")
        _list(model, revision, as_json)
        return
    folder = _target(model, output_dir, overwrite)
    from ..modeling_taskres import TaskResCLIPForImageClassification

    say_loading(model, quiet or as_json)
    classifier = TaskResCLIPForImageClassification.from_pretrained(
        model, revision=revision, base_model=base_model and resolve_base(base_model), text_tower=bool(add or reembed)
    )
    if rename:
        classifier.rename_classes(_pairs(rename, classifier.class_names), reembed=reembed)
    if remove:
        classifier.remove_classes(remove)
    if add:
        _add(classifier, add, templates, dataset, {"shots": shots, "seed": seed}, quiet or as_json)
    if order:
        from .values import read_class_names

        classifier.reorder_classes(list(read_class_names(str(order)) or []))
    result = _save(classifier, folder)
    emit(as_json, result, lambda: _show(result))


def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Classifiers over one base: folders or Hub ids.")
    ],
    output_dir: _Output = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W", help="Weight of each, such as 0.7,0.3; equal by default.")
    ] = None,
    union: Annotated[bool, typer.Option("--union", help="Bring different classes together instead.")] = False,
    base_model: opt.BaseModel = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Average classifiers of the same base, prompts and classes; or unite the classes of several (--union).

    Example:  taskres merge monday tuesday -o both --weights 0.5,0.5
    """
    when_interrupted(lambda: "Nothing was changed.")
    quiet_libraries(quiet or as_json, collect=as_json)
    if len(models) < 2:
        raise ConfigurationError("Name at least two classifiers to merge.")
    if union and weights:
        raise ConfigurationError("--weights are of an average; --union keeps every class as it is: leave one out.")
    if output_dir is None:
        raise ConfigurationError("Name the folder to write with -o.")
    check_output_folder(output_dir, replace=overwrite)
    shares = None if weights is None else _numbers(weights)
    from ..classes import merge_residuals, unite
    from ..modeling_taskres import TaskResCLIPForImageClassification

    place = base_model and resolve_base(base_model)
    loaded: list[Any] = []
    for name in models:
        say_loading(name, quiet or as_json)
        shared = loaded[0].clip if loaded and _same_base(models[0], name) else place
        loaded.append(TaskResCLIPForImageClassification.from_pretrained(name, base_model=shared, text_tower=True))
    result = _save(unite(loaded) if union else merge_residuals(loaded, shares), output_dir)
    emit(as_json, result, lambda: _show(result))


def _list(model: str, revision: str | None, as_json: bool) -> None:
    """Classes and what was done to them, from the artifact's files alone."""
    from ..description import describe

    facts = describe(model, revision=revision)
    result = {"artifact": model, "classes": facts["class_names"], "changes": facts["changes"] or []}

    def show() -> None:
        show_table(["id", "class"], [[place, name] for place, name in enumerate(result["classes"])])
        _say_changes(result["changes"])

    emit(as_json, result, show)


def _target(model: str, output_dir: Path | None, overwrite: bool) -> Path:
    """Where a changed classifier goes; never the folder it came from unless asked."""
    folder = output_dir or (Path(model) if overwrite and Path(model).is_dir() else None)
    if folder is None:
        raise ConfigurationError(
            "Name the folder to write with -o, or pass --overwrite to change the classifier itself."
        )
    check_output_folder(folder, replace=overwrite)
    return folder


def _pairs(options: list[str], names: list[str]) -> dict[str, str]:
    """OLD=NEW, where names may hold = themselves."""
    pairs: dict[str, str] = {}
    for option in options:
        cuts = [place for place, character in enumerate(option) if character == "="]
        known = [place for place in cuts if option[:place].strip() in names] or cuts[:1]
        if len(known) != 1:
            raise ConfigurationError(f"--rename takes OLD=NEW; {option!r} can be read in {len(known) or 'no'} ways.")
        old = option[: known[0]].strip()
        if old in pairs:
            raise ConfigurationError(f"--rename names {old!r} twice.")
        pairs[old] = option[known[0] + 1 :]
    return pairs


def _add(classifier: Any, names: list[str], templates: Any, dataset: str | None, draw: Any, quiet: bool) -> None:
    if dataset is None:
        classifier.add_classes(names, read_templates(templates))
        return
    from ..data import load_training_data
    from ..training import recorded_arguments

    texts = classifier.config.text_encoding is not None
    data = load_training_data(dataset, eval_split="none", texts=texts)
    if not quiet:
        say("\n".join(data.account.lines()))
    before = classifier.config
    recorded = {"training": before.training, "enhanced_base": before.enhanced_base}
    arguments = recorded_arguments(recorded, **draw, disable_tqdm=quiet)
    classifier.add_classes(names, read_templates(templates), data.train, args=arguments)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--weights takes numbers separated by commas; got {text!r}.") from None


def _same_base(first: str, other: str) -> bool:
    from ..description import describe

    keys = ("base_model", "base_model_revision")
    one, two = describe(first), describe(other)
    return all(one[key] == two[key] for key in keys)


def _save(model: Any, folder: Path) -> dict[str, Any]:
    """Save and read back; what is there now."""
    from ..description import told_changes
    from .run_config import forget_run

    model.save_pretrained(folder)
    forget_run(folder)
    type(model).from_pretrained(folder, base_model=model.clip)  # what does not load again is no result
    changes = told_changes(model.config.training or {})
    return {"output_dir": str(folder), "classes": model.class_names, "changes": changes}


def _show(result: dict[str, Any]) -> None:
    _say_changes(result["changes"])
    say(f"Saved {len(result['classes'])} classes in {result['output_dir']}. Measure it: taskres evaluate MODEL DATASET")


def _say_changes(changes: list[str]) -> None:
    from ..tables import visible

    for change in changes:
        say(visible(change))
