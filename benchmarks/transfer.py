"""`python -m benchmarks.transfer`: residual magnitude against transfer difficulty, and where training harms.

Every task of the photographs and of the shipped emoji, recipes `paper`, `auto` and `auto-v1`, on plain pictures (the
paper augments afresh every epoch; that is left off, it would embed every picture hundreds of times):

    python -m benchmarks.transfer                     # difficulty, magnitude, and their rank correlations
    python -m benchmarks.transfer --figures FOLDER    # and the figures
    python -m benchmarks.transfer --frequency         # classes against how often pretraining saw them
    python -m benchmarks.transfer --negative          # gain over zero-shot by alpha and shots, and the price of safety

`taskres analyze` makes the first for one's own pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from taskres_hf.analysis.analyzing import (
    class_correlations,
    class_rows,
    correlations,
    measure_transfer,
    task_rows,
    trained_head,
)
from taskres_hf.analysis.magnitude import rank_correlation, rank_correlation_within
from taskres_hf.analysis.showing import (
    class_correlation_table,
    correlation_table,
    draw_scatter,
    draw_transfer,
    task_table,
)
from taskres_hf.demo import demo_dataset
from taskres_hf.embedding import ImageFeatures
from taskres_hf.residual import TaskResClassifier
from taskres_hf.storage import write_bytes
from taskres_hf.tables import Table
from taskres_hf.training import TaskResTrainingArguments
from taskres_hf.training.recipes import epoch_batches, learning_rate, recipe_for
from taskres_hf.training.steps import penalty_factor

from . import options as opt
from .photos import missing
from .tasks import Task, draws, tasks

RECIPES = ("paper", "auto", "auto-v1")
ALPHAS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
PUBLISHED = 0.5
EASY = 3  # classes of the tasks that need little new knowledge
FREQUENCY_TASKS = ("animals-plants", "food", "objects", "faces", "people")  # the digits were never seen
_RESAMPLES = 2000
_ONLY = {opt.PHOTOGRAPHS: "photos", opt.EMOJI: "emoji"}

Found = dict[str, dict[str, Task]]  # kind to its tasks
Correct = NDArray[np.int8]


# ---------------------------------------------------------------------- training


@torch.no_grad()
def by_epochs(task: Task, name: str, shots: int, seeds: Sequence[int], alphas: Sequence[float]) -> Tensor:
    """Recipe `paper` or `auto-v1` of every seed and alpha at once, as `training.steps.fit` trains one: x [S, A, K, D].

    All draws of a task have as many pictures, so all runs take their batches together.
    """
    parts = [task.train.select(drawn) for drawn in draws(task, shots, seeds)]
    images = F.normalize(torch.stack([part.image_embeds[0] for part in parts]), dim=-1)
    labels = torch.stack([part.labels for part in parts])
    heads = [TaskResClassifier(task.head.base, alpha, task.head.logit_scale) for alpha in alphas]
    arguments = TaskResTrainingArguments(recipe=name, shots=shots)  # type: ignore[arg-type]
    recipes = [recipe_for(arguments, head, labels[0], False) for head in heads]
    base, scale = task.head.base, torch.tensor(list(alphas))[None, :, None, None]
    factors = [penalty_factor(*pair) for pair in zip(recipes, heads, strict=True)]
    penalty = 2.0 * torch.tensor(factors)[None, :, None, None]
    x, one = torch.zeros(len(seeds), len(alphas), *base.shape), recipes[0]
    assert all(recipe == one for recipe in recipes), "`auto-v1` has a learning rate for each alpha: pass one"
    optimizer = torch.optim.Adam([x], lr=one.learning_rate, weight_decay=one.weight_decay)
    place = torch.arange(len(seeds))[:, None]
    for epoch in range(one.num_train_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(one, epoch)
        orders = [epoch_batches(images.shape[1], 1, one.train_batch_size, seed, epoch) for seed in seeds]
        for batch in zip(*orders, strict=True):
            rows = torch.stack([chosen for chosen, _ in batch])
            some, truth = images[place, rows], labels[place, rows]
            weight = base + scale * x
            length = weight.norm(dim=-1, keepdim=True)
            unit = weight.div_(length)
            logits = task.head.logit_scale * torch.bmm(some, unit.flatten(1, 2).transpose(1, 2))
            error = logits.unflatten(2, (len(alphas), len(base))).softmax(-1)
            hit = truth[:, :, None, None].expand(-1, -1, len(alphas), 1)
            error.scatter_add_(3, hit, torch.full_like(hit, -1, dtype=error.dtype))
            slope = torch.bmm(error.flatten(2).transpose(1, 2), some).unflatten(1, (len(alphas), len(base)))
            slope.mul_(task.head.logit_scale / rows.shape[1])
            slope.sub_(unit * (slope * unit).sum(-1, keepdim=True)).mul_(scale / length)
            x.grad = slope.add_(penalty * x)
            optimizer.step()
    return x


def trained_heads(task: Task, recipe: str, shots: int, seeds: Sequence[int]) -> list[TaskResClassifier]:
    """A trained classifier for each seed."""
    if recipe == "auto":
        parts = zip(seeds, draws(task, shots, seeds), strict=True)
        return [
            trained_head(task.head, task.train.select(rows), recipe, shots=shots, seed=seed) for seed, rows in parts
        ]
    made = []
    for residual in by_epochs(task, recipe, shots, seeds, [task.head.alpha])[:, 0]:
        head = TaskResClassifier(task.head.base, task.head.alpha, task.head.logit_scale, task.head.logit_bias)
        head.residual.data.copy_(residual)
        made.append(head)
    return made


# ---------------------------------------------------------------------- magnitude against difficulty


def results(found: Found, recipes: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One dict a run, as of `analyse_transfer`."""
    rows = []
    for name, task in _all(found).items():
        for count in shots:
            for recipe in recipes:
                for seed, head in zip(seeds, trained_heads(task, recipe, count, seeds), strict=True):
                    run = {"dataset": name, "shots": count, "seed": seed, "recipe": recipe}
                    rows.append({**run, **measure_transfer(head, task.test)})
    return rows


def print_transfer(found: Found, shots: Sequence[int], seeds: Sequence[int], figures: Path | None) -> None:
    """Tables at the most shots, correlations at all of them, over all tasks and within each kind."""
    runs = results(found, RECIPES, shots, seeds)
    rows, classes, kinds = task_rows(runs), class_rows(runs), _kinds(found)
    for recipe in RECIPES:
        _print(task_table(rows, recipe, max(shots)))
    over = f"Rank correlation over {len(kinds)} tasks"
    for by, title in ((None, over), (kinds, "The same within each kind of tasks, the mean over kinds")):
        told = correlations(rows, by)
        for recipe in RECIPES:
            own = [row for row in told if row["recipe"] == recipe]
            _print(correlation_table(own, shots if by is None else [max(shots)], f"{title}, recipe {recipe}"))
    _print(class_correlation_table(class_correlations(classes), [min(shots), max(shots)]))
    if figures is not None:
        chosen = [row for row in rows if row["recipe"] != "auto-v1"]
        _write(draw_transfer(chosen, "transfer", kinds), figures)


def _all(found: Found) -> dict[str, Task]:
    return {name: task for some in found.values() for name, task in some.items()}


def _kinds(found: Found) -> dict[str, str]:
    return {name: kind for kind, some in found.items() for name in some}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)


def _print(table: Table) -> None:
    print(table.markdown(), "\n", flush=True)


# ---------------------------------------------------------------------- concept frequency


def frequencies(task: str) -> dict[str, int]:
    """Class to how many of its things, of those shipped, the checkpoint was pretrained on, in up to four pictures each.

    The shipped pictures say of each emoji whether pretraining saw it, in other styles. Emoji of a class that are in no
    shipped picture are not known.
    """
    splits = demo_dataset(task)
    names = splits["train"].features["label"].names
    seen: dict[str, set[str]] = {name: set() for name in names}
    for split in splits.values():
        for row in split.select_columns(["label", "hexcode", "seen_in_pretraining"]):
            if row["seen_in_pretraining"]:
                seen[names[row["label"]]].add(row["hexcode"])
    return {name: len(things) for name, things in seen.items()}


def print_frequency(
    found: Mapping[str, Task], shots: Sequence[int], seeds: Sequence[int], figures: Path | None
) -> None:
    """Accuracy and magnitude of each class against how many of its things pretraining saw, within tasks."""
    chosen: Found = {opt.EMOJI: {name: found[name] for name in FREQUENCY_TASKS}}
    often = {name: frequencies(name) for name in FREQUENCY_TASKS}
    rows = class_rows(results(chosen, ("paper", "auto"), shots, seeds))
    for row in rows:
        row["frequency"] = often[row["dataset"]][row["class"]]
    title = "Rank correlation over classes, within each task, of things seen in pretraining with magnitude and gain"
    _print(class_correlation_table(class_correlations(rows, "frequency"), shots, title))
    lines = []
    for count in shots:
        for recipe in ("paper", "auto"):
            own = [row for row in rows if (row["recipe"], row["shots"]) == (recipe, count)]
            for what, label in (("zero_shot_accuracy", "zero-shot"), ("accuracy", recipe)):
                if what == "accuracy" or (recipe == "paper" and count == shots[0]):
                    x, y = [row["frequency"] for row in own], [row[what] for row in own]
                    told = rank_correlation_within(x, y, [row["dataset"] for row in own])
                    lines.append(["" if what != "accuracy" else count, label, str(told)])
    title = "The same with the accuracy of the class"
    _print(Table(["shots", "accuracy of", "rank correlation"], lines, title))
    _print(_seen_table(chosen[opt.EMOJI], shots, seeds))
    if figures is not None:
        _frequency_figure([row for row in rows if row["shots"] == max(shots)], figures)


def _seen_table(found: Mapping[str, Task], shots: Sequence[int], seeds: Sequence[int]) -> Table:
    """Accuracy on test pictures of things that pretraining saw in other styles, and of things it did not."""
    parts: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for name, task in found.items():
        seen = np.array(demo_dataset(name)["test"]["seen_in_pretraining"], dtype=bool)
        labels = task.test.labels.numpy()
        for count in shots:
            for recipe in ("zero-shot", "paper", "auto"):
                right = correct(task, recipe, count, seeds).mean(axis=0)
                for label in np.unique(labels):
                    both = [right[(labels == label) & (seen == known)] for known in (True, False)]
                    if min(map(len, both)):
                        parts.setdefault((count, recipe), []).append((both[0].mean(), both[1].mean()))
    generator, rows = np.random.default_rng(1), []
    for (count, recipe), pairs in parts.items():
        if recipe != "zero-shot" or count == shots[0]:
            values = 100 * np.array(pairs)
            gaps = values[:, 0] - values[:, 1]
            drawn = gaps[generator.integers(len(gaps), size=(_RESAMPLES, len(gaps)))].mean(axis=1)
            shown = ["" if recipe == "zero-shot" else count, recipe, *values.mean(axis=0).tolist()]
            rows.append([*shown, _with_interval(gaps.mean(), drawn), len(gaps)])
    columns = ["shots", "accuracy of", "things seen", "not seen", "difference", "classes"]
    title = "Accuracy in percent on things that pretraining saw, drawn in other styles, and on things it did not see"
    return Table(columns, rows, title, "Mean over classes that have both; 95 % interval by resampling classes.")


def _frequency_figure(rows: Sequence[Mapping[str, Any]], figures: Path) -> None:
    panels, groups = [], {f"{row['dataset']}: {row['class']}": row["dataset"] for row in rows}
    own = [row for row in rows if row["recipe"] == "paper"]
    others = [row for row in rows if row["recipe"] == "auto"]
    for title, up, chosen, key, factor in (
        ("zero-shot", "accuracy of the class (%)", own, "zero_shot_accuracy", 100.0),
        ("recipe paper", "turn among classes (degrees)", own, "turn_apart", 1.0),
        ("recipe auto", "turn among classes (degrees)", others, "turn_apart", 1.0),
    ):
        points = [(f"{row['dataset']}: {row['class']}", float(row["frequency"]), factor * row[key]) for row in chosen]
        panels.append((title, "things of the class seen in pretraining", up, points))
    _write(draw_scatter(panels, "frequency", groups, named=False), figures)


# ---------------------------------------------------------------------- negative transfer


@torch.no_grad()
def correct(task: Task, recipe: str, shots: int, seeds: Sequence[int]) -> Correct:
    """Which test pictures are right [seeds, N]; of `zero-shot` a single row."""
    embeds, labels = task.test.image_embeds[0], task.test.labels
    if recipe == "zero-shot":
        answers = [task.head.zero_shot_logits(embeds)]
    else:
        answers = [head(embeds) for head in trained_heads(task, recipe, shots, seeds)]
    return np.stack([(logits.argmax(1) == labels).numpy() for logits in answers]).astype(np.int8)


def resampled(gains: Correct | NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """The mean of differences [seeds, N] over resampled draws and test pictures, many times, in points."""
    draws_, pictures = gains.shape
    first = generator.multinomial(draws_, [1 / draws_] * draws_, size=_RESAMPLES) / draws_
    second = generator.multinomial(pictures, [1 / pictures] * pictures, size=_RESAMPLES) / pictures
    found: NDArray[np.float64] = 100 * ((first @ gains) * second).sum(axis=1)
    return found


def easy_task(task: Task, classes: int = EASY) -> Task:
    """The few classes of a task that zero-shot tells apart best, judged on its training split."""
    logits = task.head.zero_shot_logits(task.train.image_embeds[0]).detach()
    labels, best, chosen = task.train.labels, -1.0, tuple(range(classes))
    for some in itertools.combinations(range(len(task.head.base)), classes):
        right = [
            (logits[labels == k][:, list(some)].argmax(1) == place).double().mean() for place, k in enumerate(some)
        ]
        if (value := float(sum(right))) > best:
            best, chosen = value, some
    rows = list(chosen)
    head = TaskResClassifier(task.head.base[rows], task.head.alpha, task.head.logit_scale, task.head.logit_bias)
    return Task(head, _only(task.train, rows), _only(task.test, rows))


def _only(data: ImageFeatures, classes: Sequence[int]) -> ImageFeatures:
    place = {old: new for new, old in enumerate(classes)}
    kept = data.select([row for row, label in enumerate(data.labels.tolist()) if label in place])
    labels = torch.tensor([place[label] for label in kept.labels.tolist()])
    return replace(kept, labels=labels, class_names=[data.class_names[old] for old in classes])


class Grid:
    """Gains over zero-shot of every task, setting and number of shots, on the same draws and pictures.

    Attributes:
        gains: (task, setting, shots) to differences [seeds, N] to zero-shot: -1, 0 or 1 for each picture.
        before: task to its zero-shot accuracy in percent.
    """

    def __init__(self, found: Mapping[str, Task], shots: Sequence[int], seeds: Sequence[int]) -> None:
        self.shots, self.names = list(shots), list(found)
        self.settings = [*(f"paper, alpha {alpha:g}" for alpha in ALPHAS), "auto"]
        self.gains: dict[tuple[str, str, int], Correct] = {}
        self.before: dict[str, float] = {}
        for name, task in found.items():
            zero_shot = correct(task, "zero-shot", 0, seeds)
            self.before[name] = 100 * float(zero_shot.mean())
            images, labels = F.normalize(task.test.image_embeds[0], dim=1), task.test.labels
            for count in shots:
                self.gains[name, "auto", count] = correct(task, "auto", count, seeds) - zero_shot
                trained = by_epochs(task, "paper", count, seeds, ALPHAS)
                for place, (alpha, setting) in enumerate(zip(ALPHAS, self.settings, strict=False)):
                    rows = F.normalize(task.head.base + alpha * trained[:, place], dim=-1)
                    right = torch.stack([(images @ one.T).argmax(1) == labels for one in rows])
                    self.gains[name, setting, count] = right.numpy().astype(np.int8) - zero_shot

    def mean(self, name: str, setting: str, shots: int) -> float:
        return 100 * float(self.gains[name, setting, shots].mean())

    def interval(self, name: str, setting: str, shots: int) -> tuple[float, float]:
        low, high = np.percentile(resampled(self.gains[name, setting, shots], np.random.default_rng(1)), [2.5, 97.5])
        return float(low), float(high)

    def best(self, name: str, shots: int) -> str:
        """The alpha of recipe paper that hindsight chooses: the best on the test pictures."""
        return max(self.settings[:-1], key=lambda setting: self.mean(name, setting, shots))

    def by_task(self, setting: str) -> Table:
        """Gain of every task and number of shots; tasks that zero-shot knows best first."""
        names = sorted(self.names, key=lambda name: -self.before[name])
        rows = [
            [name, self.before[name], *(self._cell(name, setting, count) for count in self.shots)] for name in names
        ]
        known = [
            rank_correlation([self.before[name] for name in names], [self.mean(name, setting, count) for name in names])
            for count in self.shots
        ]
        rows.append(["rank correlation of gain with zero-shot", None, *map(str, known)])
        title = f"Gain over zero-shot in points, {setting}"
        caption = "95 % intervals by resampling draws and test pictures; * below 0 throughout."
        return Table(["task", "zero-shot", *_shots(self.shots)], rows, title, caption)

    def _cell(self, name: str, setting: str, shots: int) -> str:
        low, high = self.interval(name, setting, shots)
        return f"{self.mean(name, setting, shots):+.1f} [{low:+.1f}, {high:+.1f}]" + ("*" if high < 0 else "")

    def by_setting(self) -> Table:
        """Mean gain over tasks of every setting, how many tasks lose, and the worst."""
        rows: list[list[Any]] = []
        for setting in self.settings:
            for count in self.shots:
                values = {name: self.mean(name, setting, count) for name in self.names}
                worst = min(values, key=lambda name: values[name])
                harmed = sum(self.interval(name, setting, count)[1] < 0 for name in self.names)
                lower = sum(value < 0 for value in values.values())
                shown = [setting, count, _over_tasks(list(values.values())), lower, harmed]
                rows.append([*shown, f"{values[worst]:+.1f} ({worst})"])
        columns = ["recipe", "shots", "mean gain", "tasks below zero-shot", "surely", "worst task"]
        title = f"Gain over zero-shot in points, {len(self.names)} tasks"
        caption = "Mean with a 95 % interval by resampling tasks; surely: the task's own interval is below 0."
        return Table(columns, rows, title, caption)

    def price(self) -> Table:
        """What recipe auto loses against recipe paper with the alpha that hindsight chooses, and with the published."""
        rows: list[list[Any]] = []
        for count in self.shots:
            gaps, sure = {}, []
            for name in self.names:
                best = self.gains[name, self.best(name, count), count].astype(float)
                gap = best - self.gains[name, "auto", count]
                gaps[name] = 100 * float(gap.mean())
                if np.percentile(resampled(gap, np.random.default_rng(1)), 2.5) > 0:
                    sure.append(name)
            published = f"paper, alpha {PUBLISHED:g}"
            plain = [self.mean(name, published, count) - self.mean(name, "auto", count) for name in self.names]
            most = max(gaps, key=lambda name: gaps[name])
            dearest = f"{gaps[most]:+.1f} ({most}, {self.best(most, count).removeprefix('paper, ')})"
            shown = [count, _over_tasks(plain), _over_tasks(list(gaps.values()))]
            rows.append([*shown, sum(gap > 0 for gap in gaps.values()), len(sure), dearest])
        columns = [
            "shots", f"paper, alpha {PUBLISHED:g}", "paper, best alpha in hindsight", "tasks where it is better",
            "surely", "most",
        ]  # fmt: skip
        title = "Accuracy of recipe paper minus that of recipe auto in points: above 0 is the price of safety"
        caption = (
            f"The best of {len(ALPHAS)} alphas on the very test pictures: hindsight that nobody has, so an upper bound."
        )
        return Table(columns, rows, title, caption)


def _over_tasks(values: Sequence[float]) -> str:
    drawn = np.random.default_rng(1).integers(len(values), size=(_RESAMPLES, len(values)))
    return _with_interval(float(np.mean(values)), np.array(values)[drawn].mean(axis=1))


def _with_interval(value: float, drawn: NDArray[np.float64]) -> str:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _shots(counts: Sequence[int]) -> list[str]:
    return [f"{count} shot{'s' * (count > 1)}" for count in counts]


def print_negative(found: Found, shots: Sequence[int], seeds: Sequence[int]) -> None:
    """Gains of all tasks, then of their easiest classes."""
    whole = _all(found)
    for heading, some in (
        ("All tasks", whole),
        (f"The {EASY} classes of each that zero-shot tells apart best on the training split", {
            name: easy_task(task) for name, task in whole.items()
        }),
    ):  # fmt: skip
        print(f"### {heading}\n")
        grid = Grid(some, shots, seeds)
        for setting in (f"paper, alpha {PUBLISHED:g}", f"paper, alpha {max(ALPHAS):g}", "auto"):
            _print(grid.by_task(setting))
        _print(grid.by_setting())
        _print(grid.price())


def main() -> None:
    parser = opt.parser(__doc__)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write figures there, as PNG and SVG")
    parser.add_argument("--frequency", action="store_true", help="classes against how often pretraining saw them")
    parser.add_argument("--negative", action="store_true", help="gain over zero-shot by alpha and shots")
    options = opt.read(parser)
    if options.frequency:
        print_frequency(tasks(opt.EMOJI), options.shots, options.seeds, options.figures)
        return
    reason = missing()
    chosen = [kind for kind in (opt.PHOTOGRAPHS, opt.EMOJI) if options.only in (None, _ONLY[kind])]
    if reason and opt.PHOTOGRAPHS in chosen:
        print(f"Without the photographs: {reason}\n")
        chosen.remove(opt.PHOTOGRAPHS)
    found: Found = {kind: tasks(kind) for kind in chosen}
    print("; ".join(f"{kind}: {', '.join(some)}" for kind, some in found.items()) + "\n")
    if options.negative:
        print_negative(found, options.shots, options.seeds)
    else:
        print_transfer(found, options.shots, options.seeds, options.figures)


if __name__ == "__main__":
    main()
