"""The runner of the paper's experiments: datasets x shots x seeds x recipes with resume, and what is reported of them.

`paper/published.json` holds published accuracies with their sources and how certain they are; they are shown
beside ours only where backbone and dataset are the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..data.labelled import LabelledImages
from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError, DataError
from ..evaluation import accuracy
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import library_versions, read_json, write_bytes, write_json
from ..training.arguments import TaskResTrainingArguments
from ..training.trainer import TaskResTrainer
from .datasets import SuiteData, describe_dataset, open_dataset, suite_datasets


def published_results() -> list[dict[str, Any]]:
    """Published accuracies in percent: method, backbone, dataset, accuracy by shots, source, certainty."""
    text = resources.files("taskres_hf").joinpath("paper/published.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


@dataclass(frozen=True)
class Cell:
    """One run: a dataset, a number of shots, a seed and a recipe."""

    dataset: str
    shots: int
    seed: int
    recipe: str

    @property
    def file_name(self) -> str:
        return f"{self.dataset}-{self.shots}shots-seed{self.seed}-{self.recipe}.json"


def run_benchmark(
    base_model: str,
    datasets: Sequence[str],
    output_dir: str | os.PathLike[str],
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    recipes: Sequence[str] = ("paper", "auto"),
    root: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    views: int = 0,
    enhanced_base: bool = False,
    keep_underscores: bool = False,
    targets: Sequence[str] | None = None,
    allow_other_split: bool = False,
    arguments: Mapping[str, Any] | None = None,
    on_cell: Callable[[Cell, dict[str, Any], bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and measure every dataset x shots x seed x recipe; what is finished is not run again.

    Each finished cell is a small JSON file in `output_dir/cells`, written in one step; the drawn pictures are in
    `output_dir/few_shot`. Every picture is embedded once.

    Args:
        base_model: Hub id or folder. root: see `open_dataset`. revision: of the base model.
        recipes: of `TaskResTrainingArguments`. views: augmented views cached per picture.
        keep_underscores: prompts with the underscores of class names, as the published code writes them.
        targets: further datasets with the same classes to evaluate each run on; None for the ones the dataset names.
        arguments: further settings of `TaskResTrainingArguments`.
        on_cell: called with each cell, its result and whether it was already finished.

    Returns:
        One dict per cell: dataset, shots, seed, recipe, zero_shot_accuracy, accuracy (from 0 to 1), num_images,
        train_images, `targets` with both accuracies each, and the settings.

    Raises:
        DataError: before the first run, if a dataset is not complete.
        ConfigurationError: `output_dir` holds cells of other settings.
    """
    folder = Path(output_dir)
    settings: dict[str, Any] = {
        "base_model": base_model, "revision": revision, "views": views, "enhanced_base": enhanced_base,
        "keep_underscores": keep_underscores, "arguments": dict(arguments or {}),
    }  # fmt: skip
    results = []
    opened = {name: open_dataset(name, root, allow_other_split=allow_other_split) for name in datasets}
    for name, data in opened.items():
        wanted = describe_dataset(name).get("targets", []) if targets is None else list(targets)
        cells = [Cell(name, count, seed, recipe) for count in shots for recipe in recipes for seed in seeds]
        done = {cell: _read_cell(folder / "cells" / cell.file_name, settings, wanted) for cell in cells}
        run = None
        for cell in cells:
            result = done[cell]
            if result is None:
                run = run or _DatasetRun(data, settings, wanted, cells, root, allow_other_split)
                result = run.cell(cell, folder)
                write_json(folder / "cells" / cell.file_name, result)
            results.append(result)
            if on_cell is not None:
                on_cell(cell, result, done[cell] is not None)
    return results


def _read_cell(path: Path, settings: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    result = read_json(path)
    if result.get("settings") != json.loads(json.dumps(settings)) or set(result.get("targets", {})) != set(targets):
        raise ConfigurationError(
            f"{path} was run with other settings ({result.get('settings')}). Choose another output folder."
        )
    return result


class _DatasetRun:
    """Everything one dataset needs, made once: model, embeddings of all splits and targets."""

    def __init__(
        self,
        data: SuiteData,
        settings: Mapping[str, Any],
        targets: Sequence[str],
        cells: Sequence[Cell],
        root: Any,
        allow_other_split: bool,
    ) -> None:
        spec = describe_dataset(data.name)
        self.data, self.settings, self.spec = data, settings, spec
        self.model = TaskResCLIPForImageClassification.from_base(
            settings["base_model"],
            data.class_names,
            spec.get("template") or spec["template_set"],
            spec["alpha"],
            prompt_names=data.prompt_names or None,
            underscores="keep" if settings["keep_underscores"] else "replace",
            revision=settings["revision"],
        )
        labels = data.splits["train"].labels
        self.draws = {
            (cell.shots, cell.seed): few_shot_indices(labels, cell.shots, cell.seed, on_short="ignore")
            for cell in cells
        }
        self.pools: dict[int, tuple[ImageFeatures, dict[int, int]]] = {}
        self.test = self._embed(data.splits["test"], 0)
        self.targets: dict[str, tuple[ImageFeatures, list[int]]] = {}
        for name in targets:
            target = open_dataset(name, root, allow_other_split=allow_other_split)
            if target.class_names != data.class_names:
                raise DataError(f"{name} does not have the classes of {data.name}.")
            wnids = describe_dataset(name).get("wnids")
            order = {wnid: index for index, wnid in enumerate(spec["all_wnids"] or [])}
            rows = sorted(order[wnid] for wnid in wnids) if wnids else sorted(set(target.splits["test"].labels))
            self.targets[name] = (self._embed(target.splits["test"], 0), rows)

    def _embed(self, pictures: LabelledImages, views: int, seed: int = 1) -> ImageFeatures:
        arguments = TaskResTrainingArguments(views=views, seed=seed, disable_tqdm=True, **self.settings["arguments"])
        return TaskResTrainer(self.model, arguments).embed(pictures, views=views)

    def cell(self, cell: Cell, folder: Path) -> dict[str, Any]:
        rows = self.draws[cell.shots, cell.seed]
        self._write_draw(cell, folder, rows)
        pool, position = self._pool(cell.seed)
        embedded = pool.select([position[row] for row in rows])
        self.model.classifier.reset()
        options = dict(self.settings["arguments"])
        if cell.recipe == "paper" and "learning_rate" in self.spec:
            options.setdefault("learning_rate", self.spec["learning_rate"])
        arguments = TaskResTrainingArguments(
            recipe=cell.recipe, seed=cell.seed, on_short="ignore", views=self.settings["views"],
            enhanced_base=self.settings["enhanced_base"], disable_tqdm=True, **options,
        )  # fmt: skip
        TaskResTrainer(self.model, arguments, embedded).train()
        zero_shot, trained = self._accuracies(self.test, None)
        scores = {name: self._accuracies(test, rows) for name, (test, rows) in self.targets.items()}
        return {
            **asdict(cell), "zero_shot_accuracy": zero_shot, "accuracy": trained, "num_images": len(self.test),
            "train_images": len(rows), "settings": json.loads(json.dumps(self.settings)), "notes": self.data.notes,
            "targets": {name: {"zero_shot_accuracy": pair[0], "accuracy": pair[1]} for name, pair in scores.items()},
            "base_model_type": self.model.config.base_model_type, "library_versions": library_versions(),
        }  # fmt: skip

    def _pool(self, seed: int) -> tuple[ImageFeatures, dict[int, int]]:
        """Embeddings of every picture that any draw needs, each embedded once (once per seed for augmented views)."""
        views = self.settings["views"]
        key = seed if views else 0
        if key not in self.pools:
            draws = [rows for (_, drawn), rows in self.draws.items() if not views or drawn == seed]
            needed = sorted({row for rows in draws for row in rows})
            embedded = self._embed(self.data.splits["train"].select(needed), views, seed)
            self.pools[key] = (embedded, {row: place for place, row in enumerate(needed)})
        return self.pools[key]

    @torch.no_grad()
    def _accuracies(self, test: ImageFeatures, rows: Sequence[int] | None) -> tuple[float, float]:
        """Zero-shot and trained; with `rows`, only those classes compete (ImageNet-A and -R)."""
        head = self.model.classifier
        pair = []
        for logits in (head.zero_shot_logits(test.image_embeds[0]), head(test.image_embeds[0])):
            if rows is not None:
                allowed = torch.full_like(logits, float("-inf"))
                allowed[:, list(rows)] = 0.0
                logits = logits + allowed
            pair.append(accuracy(logits, test.labels))
        return pair[0], pair[1]

    def _write_draw(self, cell: Cell, folder: Path, rows: Sequence[int]) -> None:
        """Which pictures were drawn, by row, label and file, to replay it elsewhere."""
        path = folder / "few_shot" / cell.dataset / f"shot_{cell.shots}-seed_{cell.seed}.json"
        if path.exists():
            return
        train = self.data.splits["train"]
        files = []
        for row in rows:
            source = train.source(row)
            place = source.get("path") if isinstance(source, Mapping) else source
            files.append("/".join(Path(str(place)).parts[-2:]) if place else train.digest(row))
        labels = [train.labels[row] for row in rows]
        write_json(
            path,
            {
                "dataset": cell.dataset,
                "shots": cell.shots,
                "seed": cell.seed,
                "indices": list(rows),
                "labels": labels,
                "files": files,
            },
        )


# ---------------------------------------------------------------------- tables


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy over seeds in percent per dataset, recipe and shots, and over datasets as `mean`.

    Returns:
        Rows with `dataset`, `recipe`, `zero_shot` and `accuracy` {shots: percent}; targets as `dataset -> target`.
    """
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        measured = {result["dataset"]: result}
        measured |= {f"{result['dataset']} -> {name}": pair for name, pair in result["targets"].items()}
        for name, pair in measured.items():
            row = table.setdefault(
                (name, result["recipe"]), {"zero_shot": 100 * pair["zero_shot_accuracy"], "runs": {}}
            )
            row["runs"].setdefault(result["shots"], []).append(100 * pair["accuracy"])
    rows = []
    for (name, recipe), row in table.items():
        scores = {count: mean(values) for count, values in sorted(row["runs"].items())}
        rows.append({"dataset": name, "recipe": recipe, "zero_shot": row["zero_shot"], "accuracy": scores})
    sources = [row for row in rows if " -> " not in row["dataset"]]
    for recipe in dict.fromkeys(row["recipe"] for row in sources):
        same = [row for row in sources if row["recipe"] == recipe]
        if len(same) > 1:
            counts = sorted(set.intersection(*(set(row["accuracy"]) for row in same)))
            scores = {count: mean(row["accuracy"][count] for row in same) for count in counts}
            zero_shot = mean(row["zero_shot"] for row in same)
            rows.append({"dataset": "mean", "recipe": recipe, "zero_shot": zero_shot, "accuracy": scores})
    return rows


def comparable_results(base_model: str, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Published rows for the same backbone and datasets, to print beside ours; none for other backbones."""
    backbones = {
        "clip-vit-base-patch16": "ViT-B/16",
        "clip-vit-base-patch32": "ViT-B/32",
        "clip-vit-large-patch14": "ViT-L/14",
    }
    backbone = backbones.get(base_model.rstrip("/").split("/")[-1])
    names = {result["dataset"] for result in results}
    eleven = {name for name, spec in suite_datasets().items() if "template_set" in spec}
    return [
        row
        for row in published_results()
        if row["backbone"] == backbone
        and (row["dataset"] in names or (row["dataset"] == "mean of 11" and names >= eleven))
    ]


def write_reports(
    results: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike[str], base_model: str
) -> list[Path]:
    """Write `results.csv` (a row per run), `results.md` (means) and, with matplotlib, `accuracy.svg`.

    Returns:
        The files written.
    """
    folder = Path(output_dir)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "target", "recipe", "shots", "seed", "zero_shot_accuracy", "accuracy"])
    for result in results:
        key = [result["recipe"], result["shots"], result["seed"]]
        writer.writerow([result["dataset"], "", *key, result["zero_shot_accuracy"], result["accuracy"]])
        for name, pair in result["targets"].items():
            writer.writerow([result["dataset"], name, *key, pair["zero_shot_accuracy"], pair["accuracy"]])
    write_bytes(folder / "results.csv", text.getvalue().encode("utf-8"))
    write_bytes(folder / "results.md", (as_markdown(results, base_model) + "\n").encode("utf-8"))
    files = [folder / "results.csv", folder / "results.md"]
    figure = _figure(summarise(results))
    if figure is not None:
        write_bytes(folder / "accuracy.svg", figure)
        files.append(folder / "accuracy.svg")
    return files


def as_markdown(results: Sequence[Mapping[str, Any]], base_model: str) -> str:
    """The means as a Markdown table, published figures below where they compare, and notes on the copies."""
    counts = sorted({result["shots"] for result in results})
    lines = ["Accuracy in percent, mean over seeds.", ""]
    lines.append("| dataset | recipe | zero-shot | " + " | ".join(f"{n} shot{'s' * (n > 1)}" for n in counts) + " |")
    lines.append("|---|---|" + "---:|" * (len(counts) + 1))
    for row in summarise(results):
        cells = [f"{row['accuracy'][n]:.1f}" if n in row["accuracy"] else "" for n in counts]
        lines.append(f"| {row['dataset']} | {row['recipe']} | {row['zero_shot']:.1f} | " + " | ".join(cells) + " |")
    for row in comparable_results(base_model, results):
        cells = [f"{row['accuracy'][str(n)]:.1f}" if str(n) in row["accuracy"] else "" for n in counts]
        zero = f"{row['accuracy']['0']:.1f}" if "0" in row["accuracy"] else ""
        lines.append(
            f"| {row['dataset']} | published {row['method']} ({row['certainty']}) | {zero} | "
            + " | ".join(cells)
            + " |"
        )
    notes = sorted({f"{result['dataset']}: {note}" for result in results for note in result["notes"]})
    return "\n".join(lines + ([""] + [f"- {note}" for note in notes] if notes else []))


def _figure(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Accuracy against shots, one panel per dataset; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = hashlib.sha256(b"taskres").hexdigest()  # the same file for the same numbers
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    colours = {recipe: f"C{number}" for number, recipe in enumerate(sorted({row["recipe"] for row in rows}))}
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * height), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(height, columns, number)
        axes.set_title(name.replace(" -> ", "\n-> "), fontsize=9)
        same = [row for row in rows if row["dataset"] == name]
        for row in same:
            shots, scores = list(row["accuracy"]), list(row["accuracy"].values())
            axes.plot(
                shots, scores, marker="o", markersize=3, label=row["recipe"], color=colours[row["recipe"]]
            )  # fmt: skip
        axes.axhline(same[0]["zero_shot"], color="grey", linestyle="--", linewidth=1, label="zero-shot")
        axes.set_xscale("log", base=2)
        shots = list(same[0]["accuracy"])
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.set_xlabel("shots per class", fontsize=8)
        axes.set_ylabel("accuracy (%)", fontsize=8)
        axes.tick_params(labelsize=8)
        if number == 1:
            axes.legend(fontsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
