"""`python -m benchmarks.style`: classifiers trained on one style of drawing, used on others.

On `all-categories`, whose test split is in the styles of its training split, and whose test emoji there are in three
other styles; on five tasks drawn in three styles, of which one is trained on and the others are measured; and, to see
false alarms, what is suggested for the test split of every task, photographs included (see `benchmarks.photos`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_styles, demo_tasks
from taskres_hf.embedding import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.methods import all as _all  # noqa: F401 (they become known)
from taskres_hf.methods.method import METHODS
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.strength import suggest_strength

from . import options as opt
from .tasks import draws, tasks

NAMES = ("taskres", "taskres-auto-v1", "linear-probe", "gda", "clap")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TASKS = ("animals-plants", "food", "objects", "faces", "people")  # each in three styles
SUGGESTED = "suggested"
IN_STYLE = "in style"

Scores = dict[tuple[Any, ...], list[float]]


def _trainer(task: str) -> TaskResTrainer:
    spec = demo_tasks()[task]
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    return TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))


def scores(
    head: TaskResClassifier, shots: ImageFeatures, held: dict[str, ImageFeatures], method: str, seed: int
) -> Iterator[tuple[str, float | str, float]]:
    """Style, strength and accuracy in percent; the logits are mixed in proportion, as `strength` does under `auto`."""
    fitted = METHODS[method]().fit(shots, head, seed=seed)
    for style, data in held.items():
        embeds = data.image_embeds[0]
        trained, zero_shot = fitted.logits(embeds), head.zero_shot_logits(embeds)
        chosen = suggest_strength(shots.image_embeds[0], embeds)
        ways: list[tuple[float | str, float]] = [*((value, value) for value in STRENGTHS), (SUGGESTED, chosen)]
        for name, strength in ways:
            answers = (zero_shot + strength * (trained - zero_shot)).argmax(1)
            yield style, name, 100.0 * float((answers == data.labels).double().mean())


def all_categories(shots: Sequence[int], seeds: Sequence[int]) -> Scores:
    """Method, shots, style and strength to accuracies."""
    trainer, splits = _trainer("all-categories"), demo_dataset("all-categories")
    train, others = trainer.embed(splits["train"]), demo_dataset("dg")
    held = {IN_STYLE: trainer.embed(splits["test"]), **{name: trainer.embed(others[name]) for name in demo_styles()}}
    found: Scores = defaultdict(list)
    for method in NAMES:
        for count in shots:
            for seed in seeds:
                drawn = train.select(few_shot_indices(train.labels.tolist(), count, seed, on_short="ignore"))
                for style, strength, value in scores(trainer.model.classifier, drawn, held, method, seed):
                    found[method, count, style, strength].append(value)
    return found


def one_style(shots: Sequence[int], seeds: Sequence[int]) -> Scores:
    """Shots, `in style` or `other styles`, and strength to accuracies of recipe `auto`, over tasks and styles."""
    found: Scores = defaultdict(list)
    for task in TASKS:
        trainer, splits = _trainer(task), demo_dataset(task)
        train, test = trainer.embed(splits["train"]), trainer.embed(splits["test"])
        drawn_in, tested_in = list(splits["train"]["style"]), list(splits["test"]["style"])
        for style in sorted(set(drawn_in)):
            part = train.select([row for row, one in enumerate(drawn_in) if one == style])
            held = {
                name: test.select([row for row, one in enumerate(tested_in) if (one == style) == same])
                for name, same in ((IN_STYLE, True), ("other styles", False))
            }
            for count in shots:
                for seed in seeds:
                    drawn = part.select(few_shot_indices(part.labels.tolist(), count, seed, on_short="ignore"))
                    for where, strength, value in scores(trainer.model.classifier, drawn, held, "taskres", seed):
                        found[count, where, strength].append(value)
    return found


def own_test_split(kind: str, shots: Sequence[int], seeds: Sequence[int]) -> Table:
    """Recipe `auto` on the test splits of a kind of tasks, which come from where the shots do: means over tasks."""
    found: Scores = defaultdict(list)
    for task in tasks(kind).values():
        for count in shots:
            for seed, drawn in zip(seeds, draws(task, count, seeds), strict=True):
                held = {IN_STYLE: task.test}
                for _, strength, value in scores(task.head, task.train.select(drawn), held, "taskres", seed):
                    found[count, strength].append(value)
    rows = [[count, *(f"{mean(found[count, strength]):.1f}" for strength in (0.0, 1.0, SUGGESTED))] for count in shots]
    title = f"Test splits of all tasks, recipe auto: accuracy in percent by strength, {len(seeds)} seeds, {kind}"
    return Table(["shots", "0", "1", SUGGESTED], rows, title)


def main() -> None:
    options = opt.read(opt.parser(__doc__))
    print_shifts(options)
    for kind in opt.kinds(options):
        print(own_test_split(kind, options.shots, options.seeds).markdown(), "\n", flush=True)


def print_shifts(options: Any) -> None:
    """The tables of both shifts."""
    strengths: list[float | str] = [*STRENGTHS, SUGGESTED]
    found, styles = all_categories(options.shots, options.seeds), demo_styles()
    over = f"mean over {len(options.seeds)} seeds"

    def means(count: int, strength: float | str) -> list[float]:
        return [mean(found["taskres", count, style, strength]) for style in (IN_STYLE, *styles)]

    rows: list[list[Any]] = [
        [count, str(strength), *(f"{value:.1f}" for value in [*values, mean(values[1:])])]
        for count in options.shots for strength in strengths for values in [means(count, strength)]
    ]  # fmt: skip
    title = f"all-categories, recipe auto: accuracy in percent, {over}"
    print(Table(["shots", "strength", IN_STYLE, *styles, "mean of the three"], rows, title).markdown(), "\n")
    rows = [
        [method, count, *(
            f"{mean(found[method, count, IN_STYLE, strength]):.1f} / "
            f"{mean(mean(found[method, count, style, strength]) for style in styles):.1f}"
            for strength in strengths
        )]
        for method in NAMES for count in options.shots
    ]  # fmt: skip
    title = f"all-categories: accuracy in percent in style / mean of the three other styles, by strength, {over}"
    print(Table(["method", "shots", *map(str, strengths)], rows, title).markdown(), "\n", flush=True)
    single = one_style(options.shots, options.seeds)
    rows = [
        [count, *(
            f"{mean(single[count, IN_STYLE, strength]):.1f} / {mean(single[count, 'other styles', strength]):.1f}"
            for strength in strengths
        )]
        for count in options.shots
    ]  # fmt: skip
    title = f"Trained on one of three styles, recipe auto: accuracy in percent in style / in the two others, {over}"
    print(Table(["shots", *map(str, strengths)], rows, f"{title} and five tasks").markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
