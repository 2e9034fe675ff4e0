"""The benchmark of transfer: runs side by side are those of the trainer, intervals are intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import transfer
from benchmarks.tasks import Task, draws
from taskres_hf.analysis.analyzing import trained_head
from taskres_hf.demo import demo_tasks
from taskres_hf.embedding import ImageFeatures
from taskres_hf.residual import TaskResClassifier


@pytest.fixture(scope="module")
def task() -> Task:
    """Five classes of which the text tells two apart from the rest."""
    generator = torch.Generator().manual_seed(0)
    centers, names = torch.randn(5, 16, generator=generator), list("abcde")
    text = torch.cat([3 * centers[:2], centers[2:].roll(1, 0)]) + 0.1 * torch.randn(5, 16, generator=generator)

    def drawn(each: int) -> ImageFeatures:
        labels = torch.arange(5).repeat(each)
        embeds = centers[labels] + 0.7 * torch.randn(5 * each, 16, generator=generator)
        return ImageFeatures(embeds[None], labels, names, "")

    return Task(TaskResClassifier(text, 0.5, 20.0), drawn(6), drawn(20))


@pytest.mark.parametrize(("recipe", "alphas"), [("paper", (0.1, 0.5, 8.0)), ("auto-v1", (0.5,))])
def test_many_runs_at_once_are_those_of_the_trainer(task: Task, recipe: str, alphas: tuple[float, ...]) -> None:
    found = transfer.by_epochs(task, recipe, 2, (1, 2), alphas)
    for seed, rows, mine in zip((1, 2), draws(task, 2, (1, 2)), found, strict=True):
        for alpha, x in zip(alphas, mine, strict=True):
            head = trained_head(task.head, task.train.select(rows), recipe, shots=2, seed=seed, alpha=alpha)
            assert float((head.residual - x).detach().abs().max()) < 1e-4 * float(x.abs().max())


def test_the_easiest_classes_are_those_that_the_text_tells_apart(task: Task) -> None:
    easy = transfer.easy_task(task, 2)
    assert list(easy.test.class_names) == ["a", "b"]
    assert set(easy.train.labels.tolist()) == {0, 1}
    assert len(easy.test) == 40


def test_gains_are_on_the_same_pictures(task: Task) -> None:
    grid = transfer.Grid({"made up": task}, [1, 4], [1, 2])
    assert set(grid.gains["made up", "auto", 1].ravel().tolist()) <= {-1, 0, 1}
    low, high = grid.interval("made up", "auto", 4)
    assert low <= grid.mean("made up", "auto", 4) <= high
    best = grid.best("made up", 4)
    assert all(grid.mean("made up", best, 4) >= grid.mean("made up", other, 4) for other in grid.settings[:-1])
    for table in (grid.by_task("auto"), grid.by_setting(), grid.price()):
        assert table.markdown()


def test_an_interval_knows_of_draws_and_of_pictures() -> None:
    generator = np.random.default_rng(0)
    same = np.tile(generator.integers(-1, 2, size=(1, 400)), (5, 1))  # all draws agree: pictures alone are left
    apart = np.repeat(np.array([[-1], [1], [-1], [1], [0]]), 400, axis=1)  # draws alone
    for gains, spread in ((same, 100 * 0.816 / 20), (apart, 100 * 0.894 / np.sqrt(5))):
        found = transfer.resampled(gains, np.random.default_rng(1))
        assert found.std() == pytest.approx(spread, rel=0.1)


def test_how_often_a_class_was_seen_is_counted_in_things() -> None:
    for name in transfer.FREQUENCY_TASKS:
        often = transfer.frequencies(name)
        assert set(often) == set(demo_tasks()[name]["classes"])
        assert min(often.values()) > 0
    assert transfer.frequencies("animals-plants")["bird"] == 20
    assert set(transfer.frequencies("digits").values()) == {0}
