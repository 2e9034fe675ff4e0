"""Strategies on pools whose structure is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.labelling import pool_rows, simulate, times
from benchmarks.tasks import Task
from taskres_hf.analysis.labelling import STRATEGIES, Pool, choose, distinct, expected_misses, make_pool
from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.residual import TaskResClassifier

SIZES = (20, 12, 8, 6, 4)
COVERING = ["cover", "balanced", "typiclust", "k-means"]


def _groups(sizes: tuple[int, ...] = SIZES, spread: float = 0.9, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings in groups that do not overlap, the group of each, and the centres."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(len(sizes), dim, generator=generator), dim=1)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = F.normalize(torch.randn(len(group), dim, generator=generator), dim=1)
    return F.normalize(centres[group] + spread * noise, dim=1), group, centres


def _pool(labelled: Tensor | None = None, labels: Tensor | None = None, known: float = 8.0) -> tuple[Pool, Tensor]:
    images, group, centres = _groups()
    return make_pool(images, (known * images @ centres.T).softmax(1), labelled, labels), group


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_many_as_asked_for_each_once_and_the_same_for_a_seed(strategy: str) -> None:
    pool, _ = _pool()
    rows = choose(pool, 10, strategy, seed=2)
    assert len(rows) == len(set(rows)) == 10
    assert rows == choose(pool, 10, strategy, seed=2)
    assert all(0 <= row < len(pool) for row in rows)
    assert sorted(choose(pool, 1000, strategy)) == sorted(distinct(pool).tolist())


@pytest.mark.parametrize("strategy", [*COVERING, "probcover"])
def test_every_group_has_one_before_any_has_many(strategy: str) -> None:
    pool, group = _pool()
    assert len(set(group[choose(pool, len(SIZES), strategy)].tolist())) == len(SIZES)


@pytest.mark.parametrize("strategy", ["cover", "typiclust", "balanced", "k-center", "probcover"])
def test_groups_with_a_label_wait(strategy: str) -> None:
    images, group, _ = _groups()
    own = torch.tensor([int((group == one).nonzero()[0]) for one in (0, 1, 3)])
    pool, _ = _pool(images[own], group[own])
    assert int(group[choose(pool, 2, strategy)[0]]) in (2, 4)


def test_doubt_is_asked_first() -> None:
    images, _, _ = _groups((6,))
    chances = torch.tensor(
        [[0.9, 0.05, 0.05], [0.45, 0.44, 0.11], [0.4, 0.3, 0.3], [0.8, 0.1, 0.1], [1.0, 0, 0], [0.7, 0.2, 0.1]]
    )
    pool = make_pool(images, chances)
    assert choose(pool, 1, "margin") == [1]
    assert choose(pool, 1, "least-confidence") == choose(pool, 1, "entropy") == [2]
    assert choose(pool, 1, "badge")[0] == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_looks_the_same_is_suggested_once(strategy: str) -> None:
    images, group, centres = _groups()
    generator = torch.Generator().manual_seed(1)
    copies = F.normalize(images + 0.05 * F.normalize(torch.randn(images.shape, generator=generator), dim=1), dim=1)
    both = torch.cat([copies, images])
    pool = make_pool(both, (8 * both @ centres.T).softmax(1), images[:3], group[:3])
    rows = choose(pool, len(both), strategy)
    assert sorted(row % len(images) for row in rows) == list(range(3, len(images)))


def test_pieces_do_not_change_what_is_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    images, group, centres = _groups()
    both = torch.cat([images, images.flip(0)])
    pool = make_pool(both, (both @ centres.T).softmax(1), images[:3], group[:3])
    whole, covered = distinct(pool).tolist(), choose(pool, 12)
    monkeypatch.setattr("taskres_hf.analysis.labelling._PIECE", 300)
    assert distinct(pool).tolist() == whole == list(range(3, len(images)))
    assert choose(pool, 12) == covered


def test_cover_takes_the_highest_gain_each_time() -> None:
    """Beside the greedy choice with every gain computed anew."""
    pool, _ = _pool()
    images = pool.images - pool.images.mean(0)
    images = F.normalize(images, dim=1)
    away = (2 - 2 * images @ images.T).clamp_min(0).sqrt()
    near, wanted = torch.full((len(images),), 2.0), []
    for _ in range(12):
        gain = (near[:, None] - away).clamp_min(0).sum(0)
        gain[wanted] = -1
        wanted.append(int(gain.argmax()))
        near = torch.minimum(near, away[:, wanted[-1]])
    assert STRATEGIES["cover"](pool, 12, 1) == wanted


def test_balanced_brings_the_labels_of_classes_level() -> None:
    images, group, _ = _groups()
    own = (group == 0).nonzero().flatten()[:3]
    pool, _ = _pool(images[own], group[own])
    counts = torch.bincount(group[choose(pool, 12, "balanced")], minlength=5)
    assert counts[0] <= 1
    assert counts[1:].min() >= 2  # a few are taken for another class


def test_expected_misses_are_those_of_the_probabilities() -> None:
    chances = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    assert expected_misses(chances).tolist() == pytest.approx([0.2 / 1.4, 0.8 / 1.6])


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_number_that_is_none_is_refused(n: object) -> None:
    with pytest.raises(ConfigurationError, match="whole number"):
        choose(_pool()[0], n)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    images, chances = torch.randn(4, 8), torch.full((4, 2), 0.5)
    with pytest.raises(ConfigurationError, match="cover"):
        choose(make_pool(images, chances), 1, "best")
    with pytest.raises(DataError, match=r"\[N, D\]"):
        make_pool(images, chances[:3])
    with pytest.raises(DataError, match=r"labels \[M\]"):
        make_pool(images, chances, images, torch.zeros(3, dtype=torch.long))
    with pytest.raises(DataError, match="class ids"):
        make_pool(images, chances, images, torch.full((4,), 2))
    with pytest.raises(DataError, match="NaN"):
        make_pool(images / 0, chances)


def test_an_empty_pool_has_no_suggestion() -> None:
    for strategy in STRATEGIES:
        assert choose(make_pool(torch.empty(0, 8), torch.empty(0, 2)), 3, strategy) == []


# ---------------------------------------------------------------------- the benchmark


def _task() -> Task:
    images, group, centres = _groups((30, 30, 30, 30))
    names = list("abcd")
    data = ImageFeatures(images[None], group, names, "")
    generator = torch.Generator().manual_seed(5)
    return Task(TaskResClassifier(torch.randn(centres.shape, generator=generator), 0.5, 100.0), data, data)


@pytest.mark.parametrize("name", ["cover", "random", "stratified"])
def test_rounds_add_up_and_labels_teach(name: str) -> None:
    rounds = simulate(_task(), name, (1, 4, 100), seed=1)
    assert rounds[:2, 0].tolist() == [1.0, 4.0]
    assert rounds[1, 1] >= rounds[0, 1] > 0.25
    assert np.isnan(rounds[2]).all()
    assert rounds[0, 2] == 1.0 or name == "random"


def test_a_tail_is_long() -> None:
    labels = torch.arange(4).repeat(40)
    counts = torch.bincount(labels[pool_rows(labels, 1, True)]).sort().values
    assert counts[[0, -1]].tolist() == [4, 40]


def test_times_reads_labels_off_the_curve_of_random() -> None:
    labels = np.array([[[1.0, 2.0, 4.0]]])
    plain = np.array([[[0.2, 0.4, 0.6]]])
    better = np.array([[[0.4, 0.5, 0.9]]])
    assert times(labels, better, labels, plain).tolist() == pytest.approx([2.0, 2**0.5], rel=1e-6)
    assert times(labels, plain, labels, plain).tolist() == pytest.approx([1.0, 1.0], rel=1e-6)
