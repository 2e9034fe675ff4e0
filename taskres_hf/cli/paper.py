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
    Debug,
    Engine,
    EngineName,
    Json,
    Precision,
    PrecisionName,
    Quiet,
    console,
    emit,
    public_name,
    quiet_libraries,
    read_class_names,
    read_numbers,
    read_templates,
)
from .screen import when_interrupted


def benchmark(
    dataset: Annotated[
        str,
        typer.Option(help="Comma list of names; `paper` for the 11, `shipped` for the demo's.", rich_help_panel=DATA),
    ] = "shipped",
    root: Annotated[
        Path | None, typer.Option(help="Folder of the official images, as CoOp lays them out.", rich_help_panel=DATA)
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id or folder; the shipped one by default.", rich_help_panel=MODEL)
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the base.", rich_help_panel=MODEL)] = None,
    shots: Annotated[str, typer.Option(help="Comma list.", rich_help_panel=TRAINING)] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Comma list.", rich_help_panel=TRAINING)] = "1,2,3",
    recipes: Annotated[str, typer.Option(help="Comma list of paper, auto.", rich_help_panel=TRAINING)] = "paper,auto",
    views: Annotated[
        int, typer.Option(help="Augmented views cached per picture.", min=0, rich_help_panel=TRAINING)
    ] = 0,
    enhanced_base: Annotated[
        bool,
        typer.Option("--enhanced-base", help="TaskRes*: tune the text projection first.", rich_help_panel=TRAINING),
    ] = False,
    keep_underscores: Annotated[
        bool,
        typer.Option("--keep-underscores", help="Prompts as the published code writes them.", rich_help_panel=MODEL),
    ] = False,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Comma list of datasets with the same classes to also measure on; 'none'.", rich_help_panel=DATA
        ),
    ] = None,
    allow_other_split: Annotated[
        bool,
        typer.Option(
            "--allow-other-split", help="Accept a copy that is not the published split.", rich_help_panel=DATA
        ),
    ] = False,
    list_datasets: Annotated[
        bool, typer.Option("--list", help="List the datasets and stop.", rich_help_panel=DATA)
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check that the data are complete.", rich_help_panel=DATA)
    ] = False,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Finished runs here are not run again.", rich_help_panel=OUTPUT)
    ] = Path("taskres-benchmark"),
    batch_size: BatchSize = None,
    engine: Engine = EngineName.AUTO,
    precision: Precision = PrecisionName.AUTO,
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
    from ..paper import datasets as suite
    from ..paper import runner as benchmarking

    known = suite.suite_datasets()
    if list_datasets:
        _list(known, as_json)
        return
    groups = {
        "paper": [name for name, spec in known.items() if "template_set" in spec],
        "shipped": [name for name, spec in known.items() if spec["layout"]["kind"] == "shipped"],
    }
    names = [name for part in dataset.split(",") for name in groups.get(part.strip(), [part.strip()])]
    if check:
        facts = {}
        for name in names:
            data = suite.open_dataset(name, root, allow_other_split=allow_other_split)
            facts[name] = {"classes": len(data.class_names), "notes": data.notes}
            facts[name] |= {split: len(pictures) for split, pictures in data.splits.items()}
        emit(as_json, facts, lambda: typer.echo("\n".join(f"{name}: {fact}" for name, fact in facts.items())))
        return
    model = base_model or demo_model()
    chosen = [part.strip() for part in recipes.split(",")]
    wanted = None if targets is None else [] if targets == "none" else [part.strip() for part in targets.split(",")]
    arguments: dict[str, Any] = {"embed_batch_size": batch_size, "engine": engine, "precision": precision}
    if cache_dir is not None:
        arguments["cache_dir"] = str(cache_dir)
    total = len(names) * len(counts) * len(draws) * len(chosen)
    finished: list[dict[str, Any]] = []
    with _Live(total, show=not (quiet or as_json)) as live:

        def on_cell(cell: Any, result: dict[str, Any], was_done: bool) -> None:
            finished.append(result)
            live.update(len(finished), benchmarking.summarise(finished), counts)

        results = benchmarking.run_benchmark(
            model, names, output_dir, shots=counts, seeds=draws, recipes=chosen, root=root, revision=base_revision,
            views=views, enhanced_base=enhanced_base, keep_underscores=keep_underscores, targets=wanted,
            allow_other_split=allow_other_split, arguments=arguments, on_cell=on_cell,
        )  # fmt: skip
    files = benchmarking.write_reports(results, output_dir, model)
    summary = {
        "base_model": public_name(model),
        "rows": benchmarking.summarise(results),
        "files": [str(file) for file in files],
    }

    def show() -> None:
        if not live.shown:
            console().print(live.table(benchmarking.summarise(results), counts))
        for row in benchmarking.comparable_results(model, results):
            typer.echo(
                f"published: {row['dataset']}, {row['method']} {row['accuracy']} ({row['certainty']}; {row['source']})"
            )
        typer.echo("Written: " + ", ".join(map(str, files)))

    emit(as_json, summary, show)


class _Live:
    """A table that fills while the runs finish, on a terminal; nothing elsewhere."""

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.shown = total, show and sys.stdout.isatty()

    def __enter__(self) -> _Live:
        if self.shown:
            from rich.live import Live

            self._live = Live(console=console(), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._live.stop()

    def update(self, done: int, rows: list[dict[str, Any]], counts: list[int]) -> None:
        if self.shown:
            self._live.update(self.table(rows, counts, f"{done} of {self.total} runs"))

    @staticmethod
    def table(rows: list[dict[str, Any]], counts: list[int], caption: str | None = None) -> Any:
        from rich.table import Table

        shown = Table(title="Accuracy (%), mean over seeds", title_justify="left", caption=caption)
        for name in ("dataset", "recipe"):
            shown.add_column(name)
        for name in ("zero-shot", *(f"{count} shot{'s' * (count > 1)}" for count in counts)):
            shown.add_column(name, justify="right")
        for row in rows:
            scores = [f"{row['accuracy'][count]:.1f}" if count in row["accuracy"] else "" for count in counts]
            shown.add_row(row["dataset"], row["recipe"], f"{row['zero_shot']:.1f}", *scores)
        return shown


def _list(known: dict[str, dict[str, Any]], as_json: bool) -> None:
    rows = [
        {
            "name": name, "title": spec["title"],
            "classes": len(spec.get("wnids") or spec.get("class_names") or []) or None,
            "sizes": spec.get("sizes"), "hub": (spec.get("hub") or {}).get("id"), "licence": spec.get("licence"),
            "traps": spec["traps"],
        }
        for name, spec in known.items()
    ]  # fmt: skip

    def show() -> None:
        from rich.table import Table

        table = Table()
        for column in ("name", "title", "classes", "train/validation/test", "licence"):
            table.add_column(column)
        for row in rows:
            sizes = "/".join(str(size) for size in (row["sizes"] or {}).values())
            table.add_row(row["name"], row["title"], str(row["classes"] or ""), sizes, row["licence"] or "")
        console().print(table)

    emit(as_json, rows, show)


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="prompt_learner/model.pth.tar-N of the published code.")],
    base_model: Annotated[
        str, typer.Option(help="Hub id or folder of the CLIP it was trained on.", rich_help_panel=MODEL)
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write.", rich_help_panel=OUTPUT)],
    dataset: Annotated[
        str | None,
        typer.Option(help="Take names, template and alpha from this dataset of the suite.", rich_help_panel=DATA),
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="File or comma list, in the order of training.", rich_help_panel=DATA)
    ] = None,
    template: Annotated[list[str] | None, typer.Option(help="As in training.", rich_help_panel=MODEL)] = None,
    alpha: Annotated[
        float | None, typer.Option(help="As in training; not stored in the file.", rich_help_panel=MODEL)
    ] = None,
    replace_underscores: Annotated[
        bool,
        typer.Option(
            "--replace-underscores", help="If training did; the published code does not.", rich_help_panel=MODEL
        ),
    ] = False,
    enhanced_base: Annotated[
        bool,
        typer.Option("--enhanced-base", help="It was trained on an enhanced base (TaskRes*).", rich_help_panel=MODEL),
    ] = False,
    keep_base: Annotated[
        bool,
        typer.Option(
            "--keep-base",
            help="Keep the file's own base, rounded to fp16: logits equal to 2e-5.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a classifier in OUTPUT_DIR.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of the published TaskRes code into an artifact. Nothing in it is executed."""
    from ..errors import ArtifactError, ConfigurationError

    if (output_dir / "config.json").exists() and not overwrite:
        raise ArtifactError(
            f"{output_dir} already holds a model. Pass --overwrite to replace it, or another --output-dir."
        )
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
    emit(as_json, result, lambda: typer.echo(text))
