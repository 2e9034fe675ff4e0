"""`taskres benchmark` and `taskres import`: the paper's experiments, and checkpoints of its code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    MODEL,
    OUTPUT,
    TRAINING,
    BatchSize,
    CacheDir,
    Crop,
    Debug,
    Engine,
    EngineName,
    Json,
    Overwrite,
    Precision,
    PrecisionName,
    Quiet,
    Recipe,
)
from .screen import console, emit, quiet_libraries, say, when_interrupted
from .values import (
    check_folder_of_runs,
    check_output_folder,
    public_name,
    read_class_names,
    read_numbers,
    read_templates,
)

_Dataset = Annotated[
    str,
    typer.Option(help="Comma list of names; `paper` for the 11, `shipped` for the demo's.", rich_help_panel=DATA),
]
_Root = Annotated[
    Path | None, typer.Option(help="Folder of the official images, as CoOp lays them out.", rich_help_panel=DATA)
]
_BaseModel = Annotated[
    str | None, typer.Option(help="Hub id or folder; the shipped one by default.", rich_help_panel=MODEL)
]
_BaseRevision = Annotated[str | None, typer.Option(help="Commit of the base.", rich_help_panel=MODEL)]
_Shots = Annotated[str, typer.Option(help="Comma list.", rich_help_panel=TRAINING)]
_Seeds = Annotated[str, typer.Option(help="Comma list.", rich_help_panel=TRAINING)]
_Recipes = Annotated[str, typer.Option(help="Comma list of paper, auto, auto-v1.", rich_help_panel=TRAINING)]
_Views = Annotated[
    int | None,
    typer.Option(help="Augmented views cached per picture; 10 for paper, else none.", min=0, rich_help_panel=TRAINING),
]
_AugmentOnline = Annotated[
    bool,
    typer.Option("--augment-online", help="paper: augment afresh each epoch, as published.", rich_help_panel=TRAINING),
]
_Epochs = Annotated[int | None, typer.Option(help="Override the recipes.", min=1, rich_help_panel=TRAINING)]
_LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help="Override the recipes.", rich_help_panel=TRAINING)
]
_EnhancedBase = Annotated[
    bool,
    typer.Option("--enhanced-base", help="TaskRes*: tune the text projection first.", rich_help_panel=TRAINING),
]
_KeepUnderscores = Annotated[
    bool | None,
    typer.Option(
        "--keep-underscores/--replace-underscores",
        help="Of class names in prompts; kept for paper, else replaced.",
        rich_help_panel=MODEL,
    ),
]
_Targets = Annotated[
    str | None,
    typer.Option(help="Comma list of datasets with the same classes to also measure on; 'none'.", rich_help_panel=DATA),
]
_AllowOtherSplit = Annotated[
    bool,
    typer.Option("--allow-other-split", help="Accept a copy that is not the published split.", rich_help_panel=DATA),
]
_ListDatasets = Annotated[bool, typer.Option("--list", help="List the datasets and stop.", rich_help_panel=DATA)]
_Check = Annotated[bool, typer.Option("--check", help="Only check that the data are complete.", rich_help_panel=DATA)]
_OutputDir = Annotated[
    Path, typer.Option("--output-dir", "-o", help="Finished runs here are not run again.", rich_help_panel=OUTPUT)
]


def benchmark(
    dataset: _Dataset = "shipped",
    root: _Root = None,
    base_model: _BaseModel = None,
    base_revision: _BaseRevision = None,
    shots: _Shots = "1,2,4,8,16",
    seeds: _Seeds = "1,2,3",
    recipes: _Recipes = "paper,auto",
    views: _Views = None,
    augment_online: _AugmentOnline = False,
    epochs: _Epochs = None,
    learning_rate: _LearningRate = None,
    enhanced_base: _EnhancedBase = False,
    keep_underscores: _KeepUnderscores = None,
    targets: _Targets = None,
    allow_other_split: _AllowOtherSplit = False,
    list_datasets: _ListDatasets = False,
    check: _Check = False,
    output_dir: _OutputDir = Path("taskres-benchmark"),
    batch_size: BatchSize = None,
    engine: Engine = EngineName.AUTO,
    precision: Precision = PrecisionName.AUTO,
    crop: Crop = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run datasets x shots x seeds x recipes with resume; write CSV, Markdown and a figure.

    Example:  taskres benchmark --dataset oxford_pets,dtd --root DATA --base-model openai/clip-vit-base-patch16
    """
    counts, draws = read_numbers(shots, "--shots"), read_numbers(seeds, "--seeds")
    when_interrupted(lambda: f"Finished runs are kept in {output_dir}: the same command goes on from there.")
    quiet_libraries(True)
    from ..demo import demo_model
    from ..paper.datasets import dataset_names, suite_datasets
    from ..paper.runner import run_benchmark

    if list_datasets:
        _list(suite_datasets(), as_json)
        return
    names = [name for part in dataset.split(",") for name in dataset_names(part.strip())]
    if check:
        _check(names, root, allow_other_split, as_json)
        return
    check_folder_of_runs(output_dir)
    model = base_model or demo_model()
    wanted = None if targets is None else [] if targets == "none" else [part.strip() for part in targets.split(",")]
    arguments: dict[str, Any] = {"embed_batch_size": batch_size, "engine": engine.value, "precision": precision.value}
    overrides = {
        "cache_dir": cache_dir and str(cache_dir), "num_train_epochs": epochs, "learning_rate": learning_rate,
        "crop": crop and crop.value,
    }  # fmt: skip
    arguments |= {key: value for key, value in overrides.items() if value is not None}
    chosen = _recipe_names(recipes)
    total = len(names) * len(counts) * len(draws) * len(chosen)
    with _Live(total, len(draws), show=not (quiet or as_json)) as live:
        results = run_benchmark(
            model, names, output_dir, shots=counts, seeds=draws, recipes=chosen, root=root, revision=base_revision,
            views=views, augment_online=augment_online, enhanced_base=enhanced_base, keep_underscores=keep_underscores,
            targets=wanted, allow_other_split=allow_other_split, arguments=arguments, on_cell=live.add,
        )  # fmt: skip
    _report(results, output_dir, model, live.shown, as_json)


def _report(results: list[dict[str, Any]], output_dir: Path, model: str, table_shown: bool, as_json: bool) -> None:
    """Write the reports and say what they say."""
    from ..paper.reports import (
        accuracy_table,
        comparable_results,
        count_seeds,
        published_table,
        summarise,
        what_ran,
        write_reports,
    )

    files = write_reports(results, output_dir, model)
    rows, published, ran = summarise(results), comparable_results(model, results), what_ran(results)
    summary = {
        "base_model": public_name(model), "rows": rows, "what_ran": ran, "published": published,
        "files": [str(file) for file in files],
    }  # fmt: skip

    def show() -> None:
        if not table_shown:
            console().print(accuracy_table(rows, count_seeds(results)).rich())
        if published:
            console().print(published_table(published).rich())
        say("\n".join([*ran, "Written: " + ", ".join(map(str, files))]))

    emit(as_json, summary, show)


def _recipe_names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    known = [recipe.value for recipe in Recipe]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"--recipes must be a comma list of {', '.join(known)}; got {unknown[0]!r}.")
    return names


def _check(names: list[str], root: Path | None, allow_other_split: bool, as_json: bool) -> None:
    from ..paper.datasets import open_dataset, overlaps
    from ..tables import Table

    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        data = open_dataset(name, root, allow_other_split=allow_other_split)
        facts[name] = {"classes": len(data.class_names), "notes": data.notes, "overlaps": overlaps(data.splits)}
        facts[name] |= {
            split: len(data.splits[split]) for split in ("train", "validation", "test") if split in data.splits
        }

    def show() -> None:
        columns = ["dataset", "classes", "train", "validation", "test"]
        console().print(
            Table(columns, [[name, *(fact.get(key) for key in columns[1:])] for name, fact in facts.items()]).rich()
        )
        for name, fact in facts.items():
            for line in fact["notes"] + fact["overlaps"]:
                say(f"{name}: {line}")

    emit(as_json, facts, show)


class _Live:
    """A table that fills while the runs finish, on a terminal; nothing elsewhere."""

    def __init__(self, total: int, seeds: int, show: bool) -> None:
        self.total, self.seeds, self.shown = total, seeds, show and sys.stdout.isatty()
        self.finished: list[dict[str, Any]] = []

    def __enter__(self) -> _Live:
        if self.shown:
            from rich.live import Live

            self._live = Live(console=console(), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._live.stop()

    def add(self, cell: Any, result: dict[str, Any], was_done: bool) -> None:
        """A run that is finished."""
        from ..paper.reports import accuracy_table, summarise

        self.finished.append(result)
        if self.shown:
            caption = f"{len(self.finished)} of {self.total} runs"
            self._live.update(accuracy_table(summarise(self.finished), self.seeds, caption=caption).rich())


def _list(known: dict[str, dict[str, Any]], as_json: bool) -> None:
    rows = [
        {
            "name": name, "title": spec["title"],
            "classes": len(spec.get("wnids") or spec.get("class_names") or []) or None,
            "sizes": spec.get("sizes"), "sizes_are": spec.get("sizes_are"), "hub": (spec.get("hub") or {}).get("id"),
            "licence": spec.get("licence"), "traps": spec["traps"],
        }
        for name, spec in known.items()
    ]  # fmt: skip

    def show() -> None:
        from ..tables import Table

        columns, splits = ["name", "classes"], ["train", "validation", "test"]
        cells = []
        for row in rows:
            sizes = [(row["sizes"] or {}).get(split) for split in splits]
            cells.append([*(row[column] for column in columns), *sizes, row["licence"]])
        console().print(Table([*columns, *splits, "licence"], cells).rich())

    emit(as_json, rows, show)


_Checkpoint = Annotated[Path, typer.Argument(help="prompt_learner/model.pth.tar-N of the published code.")]
_ImportedBaseModel = Annotated[
    str, typer.Option(help="Hub id or folder of the CLIP it was trained on.", rich_help_panel=MODEL)
]
_ImportedOutputDir = Annotated[
    Path, typer.Option("--output-dir", "-o", help="Folder to write.", rich_help_panel=OUTPUT)
]
_ImportedDataset = Annotated[
    str | None,
    typer.Option(help="Take names, template and alpha from this dataset; see benchmark --list.", rich_help_panel=DATA),
]
_ClassNames = Annotated[
    str | None, typer.Option(help="File or comma list, in the order of training.", rich_help_panel=DATA)
]
_Template = Annotated[list[str] | None, typer.Option(help="As in training.", rich_help_panel=MODEL)]
_Alpha = Annotated[float | None, typer.Option(help="As in training; not stored in the file.", rich_help_panel=MODEL)]
_ReplaceUnderscores = Annotated[
    bool,
    typer.Option("--replace-underscores", help="If training did; the published code does not.", rich_help_panel=MODEL),
]
_ImportedEnhancedBase = Annotated[
    bool,
    typer.Option("--enhanced-base", help="It was trained on an enhanced base (TaskRes*).", rich_help_panel=MODEL),
]
_KeepBase = Annotated[
    bool,
    typer.Option(
        "--keep-base",
        help="Keep the file's own base, rounded to fp16: logits equal to 2e-5.",
        rich_help_panel=MODEL,
    ),
]


def import_checkpoint(
    checkpoint: _Checkpoint,
    base_model: _ImportedBaseModel,
    output_dir: _ImportedOutputDir,
    dataset: _ImportedDataset = None,
    class_names: _ClassNames = None,
    template: _Template = None,
    alpha: _Alpha = None,
    replace_underscores: _ReplaceUnderscores = False,
    enhanced_base: _ImportedEnhancedBase = False,
    keep_base: _KeepBase = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of the published TaskRes code into an artifact. Nothing in it is executed."""
    from ..errors import ConfigurationError

    check_output_folder(output_dir, replace=overwrite)
    quiet_libraries(True)
    from ..paper.checkpoints import import_checkpoint as convert
    from ..paper.datasets import describe_dataset, unique_names

    names: Any = read_class_names(class_names)
    templates, prompt_names = read_templates(template), None
    if dataset is not None:
        spec = describe_dataset(dataset)
        names, prompt_names = unique_names(spec["class_names"], spec["all_wnids"])
        templates = templates or spec.get("template_set") or spec.get("template")
        alpha = spec["alpha"] if alpha is None else alpha
    if names is None:
        raise ConfigurationError("Give the classes in the order of training: --dataset NAME or --class-names FILE.")
    model = convert(
        checkpoint, base_model, names, templates, 0.5 if alpha is None else alpha,
        underscores="replace" if replace_underscores else "keep", enhanced_base=enhanced_base, keep_base=keep_base,
        prompt_names=prompt_names or None,
    )  # fmt: skip
    model.save_pretrained(output_dir)
    base = "ours" if model.classifier.shift is None else "enhanced" if enhanced_base else "the checkpoint's"
    result = {
        "output_dir": str(output_dir), "classes": len(names), "alpha": model.classifier.alpha,
        "enhanced_base": enhanced_base, "base": base,
    }  # fmt: skip
    text = f"{len(names)} classes imported into {output_dir}: alpha {model.classifier.alpha:g}, base classifier {base}."
    emit(as_json, result, lambda: say(text))
