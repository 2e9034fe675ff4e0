"""The benchmarks on machines that cannot run all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import base_to_new, embedding, material, plan, scale, stress, timing
from benchmarks.tasks import Task
from benchmarks.timing import Report
from taskres_hf.embedding import ImageFeatures
from taskres_hf.embedding.engines import rewriting
from taskres_hf.residual import TaskResClassifier


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    material.obstacle.cache_clear()
    yield
    material.obstacle.cache_clear()


def test_a_row_that_cannot_run_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No products of bytes, no bf16, and no openvino: every mode but exact fp32."""
    monkeypatch.setattr(rewriting, "onednn_int8", lambda: None)
    monkeypatch.setattr(material, "cpu_has_bf16", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    reasons = {name: material.obstacle(*mode) for name, mode in embedding.MODES.items()}
    assert [name for name, reason in reasons.items() if reason is None] == ["torch, exact fp32"]
    assert "no int8 products" in str(reasons["torch, int8"])
    assert "bf16" in str(reasons["torch, bf16"])
    assert "taskres_hf[openvino]" in str(reasons["openvino, fp32"])
    monkeypatch.setattr(embedding, "demo_tasks", dict)  # no task: what is left is which rows there are
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results.json")
    possible = {name: mode for name, mode in embedding.MODES.items() if reasons[name] is not None}
    monkeypatch.setattr(embedding, "MODES", possible)
    report = Report()
    embedding.precision(report)
    report.save()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2 * len(possible)
    table = Report.stored().markdown()
    assert table.count("not measured: ") == 2 * len(possible)
    assert "has no int8 products" in table
    assert "not measured" in capsys.readouterr().out


def test_synthetic_embeddings_have_the_lengths_and_angles_they_claim() -> None:
    case, facts = stress.synthetic(100, 8, seed=1), stress.SYNTHETIC
    text, images = F.normalize(case.head.base, dim=1), case.images
    own = torch.zeros(len(images), 100, dtype=torch.bool).scatter_(1, case.labels[:, None], True)
    assert float(images.mean(0).norm()) == pytest.approx(facts["mean"], abs=0.02)
    assert float((images @ text.T)[own].mean()) == pytest.approx(facts["own"], abs=0.02)
    assert float((images @ text.T)[~own].mean()) == pytest.approx(facts["other"], abs=0.02)
    alike, same = images @ images.T, case.labels[:, None] == case.labels
    assert float(alike[same & ~torch.eye(len(images), dtype=torch.bool)].mean()) == pytest.approx(
        facts["same"], abs=0.02
    )
    assert float(alike[~same].mean()) == pytest.approx(facts["apart"], abs=0.02)
    squares = stress._spectrum(512, facts["rank"]).pow(2).sum()
    assert float(1.0 / squares) == pytest.approx(facts["rank"], rel=0.01)


@pytest.mark.parametrize("recipe", ["auto", "auto-v1"])
def test_classes_added_to_trained_ones(recipe: str) -> None:
    """Six classes whose text says little and whose pictures say much: what pictures are given decides."""
    generator = torch.Generator().manual_seed(0)
    centers, names = torch.randn(6, 32, generator=generator), list("abcdef")
    text = 0.2 * centers + torch.randn(6, 32, generator=generator)

    def drawn(each: int) -> ImageFeatures:
        labels = torch.arange(6).repeat(each)
        return ImageFeatures(
            centers[labels][None] + torch.randn(1, 6 * each, 32, generator=generator), labels, names, ""
        )

    task = Task(TaskResClassifier(text, logit_scale=20.0), drawn(16), drawn(40))
    (split,) = base_to_new.splits({"made up": task}, 8, [1])
    assert len(split.base) == len(split.new) == 3
    found = {name: base_to_new.scores(split, make(split, recipe)) for name, make in base_to_new.VARIANTS.items()}
    apart, together = 2, 5
    assert found["add_classes"][1] == pytest.approx(found["zero-shot"][1])  # the new ones by text, as before
    assert found["add_classes"][0] > found["zero-shot"][0]
    pictures = found["add_classes, pictures of the new classes"]
    assert pictures[apart] > found["add_classes"][apart]
    assert found["trained on pictures of all"][together] > found["zero-shot"][together]


def test_a_case_of_the_plans_is_read_as_it_was_kept_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "OUT", tmp_path)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(12)
    parts = []
    for name in ("train", "test"):
        images = torch.eye(3, 8)[labels] + 0.3 * torch.randn(36, 8, generator=draw)
        parts.append(ImageFeatures(images[None], labels, ["a", "b", "c"], name))
    task = Task(TaskResClassifier(torch.randn(3, 8, generator=draw), 0.5, 20.0, 0.0), *parts)
    first, second = (list(plan.cases("emoji", "three", task, 1, (2,))) for _ in range(2))  # the second time from disk
    assert [case.setting for case in first] == ["other test", "held-out", "same source"]
    for one, other in zip(first, second, strict=True):
        assert one[:6] == other[:6]
        assert all((a == b).all() for a, b in zip(one.tested.right, other.tested.right, strict=True))
        (row, *_) = plan.foretold(other)
        assert row["n"] == 4
        assert row["reached"] == pytest.approx(float(one.reached[4].mean()))
    assert "held-out | all" in plan.accuracy_table(second, "title").markdown()
    assert "held-out" in plan.target_table(second, "title").markdown()


def test_the_plan_of_a_large_data_set_is_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pictures", "1000000", "--core-rate", "100", "--gpu-rate", "1000", "--cores", "10", "--dim", "500"]
    monkeypatch.setattr("sys.argv", ["scale", "plan", *options])
    threads = torch.get_num_threads()
    scale.main()
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert "| hours of a core at 100 pictures a second | 3 |" in text
    assert "| blocks of 10,000 | 100 |" in text
    assert "| a killed worker costs at most | 1.7 core minutes, 1.0000 % of the work |" in text
