"""Comparing methods: the same draws for all, cells that go on, honest measuring, significance, reports."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from datasets import DatasetDict

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError, ImageError, MissingExtraError
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.methods.method import METHODS, Fitted, Linear, Method, register_method
from taskres_hf.paper import compare, comparison, figures
from taskres_hf.paper.compare import MethodCell, choose_methods, compare_methods, known_methods
from taskres_hf.paper.comparison import (
    as_markdown,
    holm,
    paired_differences,
    sign_flip_test,
    summarise_methods,
    write_report,
)
from taskres_hf.paper.memory import PeakMemory
from taskres_hf.paper.runner import run_benchmark
from taskres_hf.paper.tasks import held_out_rows, open_tasks
from taskres_hf.storage import read_sealed

FEW: dict[str, Any] = {"shots": [1, 2], "seeds": [1, 2]}


class Seen(Method):
    """Zero-shot; remembers what it was given."""

    name, title, source = "test-seen", "What it saw", "none"
    calls: ClassVar[list[tuple[ImageFeatures, int]]] = []

    def _fit(self, features: ImageFeatures, classifier: Any, seed: int, model: Any) -> Fitted:
        self.calls.append((features, seed))
        linear = Linear(classifier.logit_scale * F.normalize(classifier.base, dim=-1))
        with torch.no_grad():
            classifier.base.zero_()  # what a careless method may do
        return Fitted.of(linear, 7)


class Mean(Method):
    """The nearest mean of the shots' embeddings."""

    name, title, source = "test-mean", "Nearest mean", "none"

    def _fit(self, features: ImageFeatures, classifier: Any, seed: int, model: Any) -> Fitted:
        embeds = F.normalize(features.image_embeds[0], dim=-1)
        means = torch.stack([embeds[features.labels == k].mean(dim=0) for k in range(len(features.class_names))])
        return Fitted(Linear(100 * F.normalize(means, dim=-1)).logits, means.numel(), not_linear="it says so")


class Broken(Method):
    """Fails where the seed is 2, and lacks a package."""

    name, title, source = "test-broken", "Fails", "none"

    def _fit(self, features: ImageFeatures, classifier: Any, seed: int, model: Any) -> Fitted:
        if seed == 2:
            raise MissingExtraError("This needs the package peft: pip install peft.")
        return Fitted.of(Linear(classifier.base * float("nan")), 0)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    known_methods()
    before = dict(METHODS)
    for method in (Seen, Mean, Broken):
        register_method(method.name, method)
    Seen.calls.clear()
    yield
    METHODS.clear()
    METHODS.update(before)


def test_numbers_are_those_of_fitting_by_hand(base: str, spec: Any, splits: Any) -> None:
    results = compare_methods(base, "animals-plants", methods=["test-mean", "zero-shot"], **FEW)
    assert [(row["method"], row["shots"], row["seed"]) for row in results] == [
        (method, shots, seed) for shots in (1, 2) for seed in (1, 2) for method in ("test-mean", "zero-shot")
    ]
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    train, test = trainer.embed(splits["train"]), trainer.embed(splits["test"])
    for row in results:
        drawn = train.select(few_shot_indices(train.labels.tolist(), row["shots"], row["seed"], on_short="ignore"))
        images, shots = F.normalize(test.image_embeds[0], dim=-1), F.normalize(drawn.image_embeds[0], dim=-1)
        means = torch.stack([shots[drawn.labels == k].mean(dim=0) for k in range(len(spec["classes"]))])
        weight = means if row["method"] == "test-mean" else model.classifier.base
        right = ((images @ F.normalize(weight, dim=-1).T).argmax(dim=1) == test.labels).double().mean()
        assert row["accuracy"] == float(right)
        assert row["zero_shot_accuracy"] == next(r["accuracy"] for r in results if r["method"] == "zero-shot")
        assert row["num_images"] == len(test)


def test_all_methods_see_the_same_draw_embedded_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[int] = []
    real = TaskResTrainer.embed

    def embed(self: TaskResTrainer, dataset: Any, views: int = 0) -> ImageFeatures:
        embedded.append(len(dataset))
        return real(self, dataset, views)

    monkeypatch.setattr(TaskResTrainer, "embed", embed)
    register_method("test-seen-again", lambda: Seen())
    first = compare_methods(base, "food", methods=["test-seen", "test-seen-again"], **FEW)
    pairs = list(zip(Seen.calls[::2], Seen.calls[1::2], strict=True))
    assert all(one[0].digest == other[0].digest and one[1] == other[1] for one, other in pairs)
    assert len({one[0].digest for one, _ in pairs}) == 4
    assert len(embedded) == 2  # what the draws need, and the test pictures
    assert embedded[0] < 4 * 3 * 7
    # The first emptied its classifier; the second started from a whole one all the same.
    assert {row["accuracy"] for row in first} == {row["zero_shot_accuracy"] for row in first}


def test_finished_cells_are_not_fitted_again(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare_methods(base, "food", tmp_path, methods=["test-seen", "test-mean"], **FEW)
    calls, seen = len(Seen.calls), []
    again = compare_methods(
        base, "food", tmp_path, methods=["test-seen", "test-mean"], arguments={"embed_batch_size": 7},
        on_cell=lambda cell, result, done: seen.append(done), **FEW,
    )  # fmt: skip
    assert again == first
    assert seen == [True] * 8
    assert len(Seen.calls) == calls
    with pytest.raises(ConfigurationError, match=r"settings was .* another output folder"):
        compare_methods(base, "food", tmp_path, methods=["test-seen"], templates="a {}", **FEW)
    monkeypatch.setattr(LabelledImages, "digest", lambda self, row: f"other {self.indices[row]}")
    with pytest.raises(ConfigurationError, match="pictures or labels of food were others"):
        compare_methods(base, "food", tmp_path, methods=["test-seen"], **FEW)


def test_an_interrupted_comparison_goes_on(base: str, tmp_path: Path) -> None:
    def stop(cell: MethodCell, result: Any, done: bool) -> None:
        if (cell.shots, cell.seed, cell.method) == (1, 2, "test-seen"):
            raise KeyboardInterrupt

    options = {"methods": ["test-seen", "test-mean"], **FEW}
    with pytest.raises(KeyboardInterrupt):
        compare_methods(base, "food", tmp_path / "a", on_cell=stop, **options)
    assert len(list((tmp_path / "a" / "cells").iterdir())) == 3
    assert len((tmp_path / "a" / "results.csv").read_text().splitlines()) == 1 + 3
    timed = ("fit_seconds", "peak_memory")
    resumed = compare_methods(base, "food", tmp_path / "a", **options)
    whole = compare_methods(base, "food", tmp_path / "b", **options)
    for one, other in zip(resumed, whole, strict=True):
        assert {key: one[key] for key in one if key not in timed} == {k: other[k] for k in other if k not in timed}
    assert len((tmp_path / "a" / "results.csv").read_text().splitlines()) == 1 + 8


def test_results_csv_has_a_row_a_cell(base: str, tmp_path: Path) -> None:
    results = compare_methods(base, ["food", "faces"], tmp_path, methods=["taskres", "taskres-paper"], **FEW)
    text = (tmp_path / "results.csv").read_text()
    assert text.splitlines()[0] == "method,dataset,shots,seed,accuracy,ece,trained_parameters,fit_seconds"
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["method"] for row in rows} == {"taskres", "taskres-paper"}
    assert len(rows) == len(results) == 16
    for row, result in zip(rows, results, strict=True):
        stored = read_sealed(tmp_path / "cells" / MethodCell(**{k: result[k] for k in _KEYS}).file_name)
        assert stored == result
        assert (float(row["accuracy"]), float(row["ece"])) == (result["accuracy"], result["ece"])
        assert (
            int(row["trained_parameters"])
            == result["trained_parameters"]
            == (193 if row["method"] == "taskres" else 192) * (7 if row["dataset"] == "food" else 9)
        )
        assert float(row["fit_seconds"]) == result["fit_seconds"] > 0


_KEYS = ("method", "dataset", "shots", "seed")


def test_a_method_that_fails_is_named_and_the_others_go_on(base: str, tmp_path: Path) -> None:
    results = compare_methods(base, "food", tmp_path, methods=["test-broken", "test-mean", "taskres"], **FEW)
    reasons = {row["seed"]: row["error"] for row in results if "error" in row}
    assert reasons[2] == "This needs the package peft: pip install peft."
    assert "NaN" in reasons[1]
    assert len(comparison.finished(results)) == 8
    assert {row["method"] for row in csv.DictReader((tmp_path / "results.csv").open())} == {"test-mean", "taskres"}
    assert not list((tmp_path / "cells").glob("*test-broken*"))  # it is tried again next time
    broken = summarise_methods(results)[-1]
    assert (broken["method"], broken["accuracy"], broken["mean"]) == ("test-broken", {}, None)
    text = as_markdown(results, "tiny")
    assert "test-broken has no result in 2 fits: This needs the package peft" in text


def test_no_split_means_a_part_held_out_each_seed(base: str, splits: DatasetDict) -> None:
    (task,) = open_tasks({"mine": splits["train"]})
    labels = task.train.labels
    held = {seed: task.parts(seed)[1] or [] for seed in (1, 2)}
    assert held[1] != held[2]
    for rows in held.values():
        for label in set(labels):
            size = len({task.train.digest(row) for row in range(len(labels)) if labels[row] == label})
            share = len({task.train.digest(row) for row in rows if labels[row] == label}) / size
            assert abs(share - 0.5) <= 0.51 / size
    results = compare_methods(base, {"mine": splits["train"]}, methods=["test-seen"], **FEW)
    for (features, seed), row in zip(Seen.calls, results, strict=True):
        measured = {task.train.digest(position) for position in held[seed]}
        assert not measured & set(features.digests)
        assert row["num_images"] == len(held[seed])
        assert row["seen_in_training"] == 0
    assert any("each seed measures on 50 % of each class" in note for note in results[0]["notes"])
    assert results[0]["accuracy"] == results[2]["accuracy"]  # one seed measures on the same whatever the shots
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        open_tasks("food", holdout=1.5)
    (chosen,) = open_tasks("food", holdout=0.25)
    assert chosen.test is None


def test_equal_pictures_are_on_one_side(splits: DatasetDict) -> None:
    from datasets import concatenate_datasets

    pictures = LabelledImages(concatenate_datasets([splits["train"], splits["train"]]))
    held = held_out_rows(pictures, 0.5, 1)
    digests = [pictures.digest(row) for row in range(len(pictures))]
    assert not {digests[row] for row in held} & {digests[row] for row in range(len(pictures)) if row not in held}
    with pytest.raises(DataError, match="two different pictures"):
        held_out_rows(pictures.select([0, len(splits["train"])]), 0.5, 1)


def test_sources_and_their_names(tmp_path: Path, splits: DatasetDict, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = open_tasks("shipped")
    assert [task.name for task in shipped][:2] == ["animals-plants", "food"] or len(shipped) == 7
    (tmp_path / "food").mkdir()
    splits["train"].to_parquet(tmp_path / "food" / "train.parquet")
    splits["test"].to_parquet(tmp_path / "food" / "test.parquet")
    (own,) = open_tasks(tmp_path / "food")
    assert (own.name, len(own.train), own.test and len(own.test)) == ("food", 179, 159)
    with pytest.raises(ConfigurationError, match="Two datasets are called 'food'"):
        open_tasks(["food", tmp_path / "food"])
    assert [task.name for task in open_tasks({"a": "food", "b": tmp_path / "food"})] == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    assert len(open_tasks("food")[0].train) == 179  # what is on this machine goes before a name


def test_a_method_gets_the_pictures_it_needs_and_embeds_anew(base: str, splits: DatasetDict) -> None:
    given: list[Any] = []

    class Tower(Seen):
        name = "test-tower"
        needs = frozenset({"pictures"})

        def _fit(self, features: Any, classifier: Any, seed: int, model: Any, images: Any = None) -> Fitted:
            fitted = super()._fit(features, classifier, seed, model)
            given.append((features, images))

            def embed(pictures: LabelledImages) -> torch.Tensor:
                given.append(pictures)
                return torch.eye(192)[torch.tensor(pictures.labels)]

            fitted.logits, fitted.embed = lambda embeds: embeds[:, :8], embed
            return fitted

    register_method("test-tower", Tower)
    (result,) = compare_methods(base, {"mine": splits["train"]}, methods=["test-tower"], shots=[2], seeds=[1])
    features, images = given[0]
    assert [images.digest(row) for row in range(len(images))] == list(features.digests)
    assert len(given[1]) == result["num_images"]
    assert result["accuracy"] == 1.0


def test_a_picture_that_cannot_be_read_may_be_left_out(base: str, tmp_path: Path, splits: DatasetDict) -> None:
    for label, name in enumerate(("mammal", "bird")):
        (tmp_path / name).mkdir()
        rows = [row for row in splits["train"] if row["label"] == label][:6]
        for number, row in enumerate(rows):
            row["image"].convert("RGB").save(tmp_path / name / f"{number}.png")
        (tmp_path / name / "0.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"methods": ["test-seen"], "shots": [9], "seeds": [1, 2, 3]}
    with pytest.raises(ImageError, match="2 of 12 pictures cannot be read"):
        compare_methods(base, tmp_path, **options)
    with pytest.warns(UserWarning, match="left out"):
        results = compare_methods(base, tmp_path, arguments={"on_error": "skip"}, **options)
    for (features, _), row in zip(Seen.calls, results, strict=True):
        assert (len(features), row["train_images"]) == (row["train_images"], 10 - row["num_images"])


def test_taskres_is_what_the_benchmark_trains(base: str) -> None:
    (ours,) = compare_methods(base, "food", methods=["taskres"], shots=[4], seeds=[2])
    (theirs,) = run_benchmark(base, ["food"], shots=[4], seeds=[2], recipes=["auto"])
    assert ours["accuracy"] == theirs["accuracy"]
    assert ours["zero_shot_accuracy"] == theirs["zero_shot_accuracy"]
    assert ours["pictures"]["measured"] == theirs["pictures"]["food"]
    assert ours["pictures"]["drawn"] == theirs["pictures"]["drawn"]


def test_views_are_drawn_from_the_seed(base: str) -> None:
    compare_methods(base, "food", methods=["test-seen"], shots=[1], seeds=[1, 2], views=2)
    assert [len(features.image_embeds) for features, _ in Seen.calls] == [2, 2]


def test_choosing_methods() -> None:
    assert choose_methods("all") == known_methods()
    assert set(choose_methods()) == set(compare.DEFAULT_METHODS) & set(METHODS)
    assert choose_methods(["gda", "default"])[0] == "gda"
    assert not any(METHODS[name]().needs for name in choose_methods())
    with pytest.raises(ConfigurationError, match="no method 'gdb'"):
        choose_methods(["gdb"])


# ---------------------------------------------------------------------------------------------------- reports


def _rows(scores: dict[str, list[list[float]]], counts: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Results of methods with a list of accuracies over seeds for each dataset, 0.1 higher at 2 shots."""
    return [
        {
            "method": method, "dataset": f"d{number}", "shots": shots, "seed": seed,
            "accuracy": score + 0.1 * (shots == 2), "zero_shot_accuracy": 0.5, "ece": 0.1,
            "trained_parameters": 10 * shots, "fit_seconds": float(seed), "peak_memory": 10**6 * seed, "linear": True,
            "not_linear": "", "selected_on": "", "engine": "torch-fp32", "notes": [], "seen_in_training": 0,
        }
        for method, datasets in scores.items()
        for number, seeds in enumerate(datasets)
        for seed, score in enumerate(seeds)
        for shots in counts
    ]  # fmt: skip


def test_means_spread_harm_and_cost() -> None:
    results = _rows({"a": [[0.5, 0.6, 0.4], [0.3, 0.5, 0.1]], "b": [[0.7, 0.7, 0.7], [0.5, 0.5, 0.5]]})
    best, row = summarise_methods(results)
    assert (best["method"], row["method"]) == ("b", "a")
    by_seed = [mean(pair) for pair in ((50, 30), (60, 50), (40, 10))]
    assert row["accuracy"][1] == pytest.approx(mean(by_seed))
    assert row["spread"][1] == pytest.approx(stdev(by_seed))
    assert row["mean"] == pytest.approx(mean(by_seed) + 5)
    assert row["worst_harm"]["points"] == pytest.approx(100 * (0.3 - 0.5))
    assert (row["worst_harm"]["dataset"], row["worst_harm"]["shots"]) == ("d1", 1)
    assert best["worst_harm"]["points"] == pytest.approx(0)
    assert (row["trained_parameters"], row["fit_seconds"], row["peak_memory"]) == (20, 1.0, 2 * 10**6)
    # One result short: no mean of fewer datasets beside means of all of them.
    (_, short) = summarise_methods([r for r in results if (r["method"], r["dataset"], r["shots"]) != ("b", "d1", 2)])
    assert (short["method"], list(short["accuracy"]), short["mean"]) == ("b", [1], None)


def test_significance_is_that_of_all_sign_flips() -> None:
    gaps = [0.4, 1.3, -0.2, 0.9, 0.7, 0.1, 1.1]
    flipped = [mean(s * g for s, g in zip(signs, gaps, strict=True)) for signs in itertools.product((1, -1), repeat=7)]
    expected = sum(abs(value) >= mean(gaps) - 1e-12 for value in flipped) / len(flipped)
    assert sign_flip_test(gaps) == pytest.approx(expected)
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([3.0]) == 1.0
    assert sign_flip_test([1.0] * 3) == pytest.approx(2 / 8)
    assert sign_flip_test([1.0 + index / 100 for index in range(40)]) <= 2e-4
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    ours, theirs = [[0.5, 0.6], [0.3, 0.4]], [[0.6, 0.6], [0.5, 0.5]]
    (row,) = paired_differences(_rows({"taskres": ours, "other": theirs}))
    assert row["difference"] == pytest.approx(10)
    assert (row["pairs"], row["better"], row["worse"]) == (4, 3, 0)
    assert row["p"] == pytest.approx(sign_flip_test([10, 0, 20, 10]))
    assert paired_differences(_rows({"other": theirs})) == []


def test_reports_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    names = [f"method-{number}" for number in range(20)] + ["taskres", "zero-shot"]
    scores = {name: [[0.5 + number / 100, 0.5], [0.3, 0.3 + number / 90]] for number, name in enumerate(names)}
    files = write_report(_rows(scores), tmp_path, "tiny")
    assert [file.name for file in files] == [
        "results.csv", "report.md", "accuracy.png", "accuracy.svg", "time.png", "time.svg",
    ]  # fmt: skip
    for name in ("accuracy", "time"):
        svg = (tmp_path / f"{name}.svg").read_text()
        assert all(f">{method}<" in svg for method in names)  # each is named in the figure
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    before = [file.read_bytes() for file in files]
    write_report(_rows(scores), tmp_path, "tiny")
    assert [file.read_bytes() for file in files] == before
    text = (tmp_path / "report.md").read_text()
    assert "![accuracy.png](accuracy.png)" in text
    assert "d1: accuracy in percent" in text


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    files = write_report(_rows({"a": [[0.5]], "taskres": [[0.6]]}), tmp_path, "tiny")
    assert [file.name for file in files] == ["results.csv", "report.md"]


def test_names_are_moved_apart_as_little_as_it_takes() -> None:
    assert figures.apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert figures.apart([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    crowded = figures.apart([0.98] * 5 + [0.99], 0.05)
    assert max(crowded) <= 1
    assert min(b - a for a, b in itertools.pairwise(crowded)) >= 0.05 - 1e-9


def test_peak_memory_is_what_the_work_held() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell")
    peaks = []
    for size in (40, 5, 40):
        with PeakMemory() as memory:
            block = torch.ones(size, 1 << 18)  # 1 MiB a row
            del block
        peaks.append(memory.bytes or 0)
    assert min(peaks[0], peaks[2]) > 30 << 20
    assert peaks[1] < 30 << 20


def test_the_table_fits_eighty_columns_unfolded(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    results = _rows({"coop-class-specific": [[0.5, 0.6]], "taskres": [[0.41, 0.6]]}, (1, 2, 4, 8, 16))
    Console(width=80).print(comparison.accuracy_table(summarise_methods(results), results).rich())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("coop-class-specific")]
    assert line.count("±") == 5
