"""The benchmarks on machines that cannot run all of them."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import beside_a_device
from text_models import tiny_text_model, tiny_tokenizer

from benchmarks import (
    base_to_new,
    device,
    embedding,
    material,
    plan,
    reading,
    scale,
    solver,
    stress,
    text_only,
    timing,
    vision_only,
)
from benchmarks import options as benchmark_options
from benchmarks import tasks as benchmark_tasks
from benchmarks.tasks import Task
from benchmarks.timing import HELD, Report, markdown
from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.demo import demo_tasks
from taskres_hf.embedding import Embedder, ImageFeatures
from taskres_hf.embedding.engines import rewriting
from taskres_hf.embedding.engines.onednn import onednn_int8
from taskres_hf.machine import abilities
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
    monkeypatch.setattr(material, "is_faster", lambda dtype: False)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    reasons = {name: material.obstacle(*mode) for name, mode in embedding.MODES.items()}
    assert [name for name, reason in reasons.items() if reason is None] == ["torch, exact fp32"]
    assert "no int8 products" in str(reasons["torch, int8"])
    assert "bf16" in str(reasons["torch, bf16"])
    assert "taskres_hf[openvino]" in str(reasons["openvino, fp32"])
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setenv("TASKRES_PHOTOS", nowhere)
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    left_out = {name: mode for name, mode in embedding.MODES.items() if reasons[name] is not None}
    monkeypatch.setattr(embedding, "MODES", left_out)
    report = Report()
    embedding.precision(report)
    report.save()
    kept = json.loads(timing.results_file().read_text())
    rows = 2 * (len(left_out) + 2)  # emoji; photographs, two in torch
    assert len(kept["rows"]) == rows
    assert kept["machine"]["abilities"] == abilities()
    table = markdown(Report.stored())
    assert table.count("| - (") == rows
    assert "has no int8 products" in table
    assert table.count(nowhere) == rows - 2 * len(left_out)
    assert "not measured" in capsys.readouterr().out


@pytest.mark.skipif(onednn_int8() is None, reason="this processor or this torch has no int8 products")
def test_what_int8_moves_is_measured_over_draws_and_names_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    described = list(islice(benchmark_tasks.described(benchmark_options.EMOJI), 2))
    asked = []

    def some(kind: str) -> Iterator[tuple[str, Mapping[str, Any], str, Any]]:
        asked.append(kind)
        for task, spec, base, splits in described[: 1 if kind == benchmark_options.PHOTOGRAPHS else 2]:
            yield task, spec, base, {name: part.select(range(0, len(part), 4)) for name, part in splits.items()}

    monkeypatch.setattr(embedding, "described", some)
    monkeypatch.setattr(embedding, "missing", lambda: None)
    monkeypatch.setattr(embedding, "MODES", {"torch, int8": ("torch", "int8")})
    monkeypatch.setattr(embedding, "SHOTS", 2)
    report = Report()
    embedding.precision(report, seeds=2)
    assert asked == [benchmark_options.EMOJI, benchmark_options.PHOTOGRAPHS]
    for what in ("", ", photographs by the shipped base"):
        moved = report.rows[f"accuracy moved by torch, int8{what} (points)"]
        assert 0 <= moved["min"] <= moved["median"] == moved["max"] < 5
        assert moved["goal"] == 0.3
        assert f"{1 if what else 2} tasks, 2 shots, mean of 2 draws" in moved["note"]
        assert moved["note"].endswith(tuple(one[0] for one in described))
        near = report.rows[f"centred cosine of torch, int8{what}, worst picture"]
        assert 0.98 < near["min"] <= near["max"] < 1


def test_kinds_of_processors_are_kept_apart_and_shown_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    report = Report()
    report.add("a row", [1.0, 2.0, 4.0], goal=3.0)
    report.add("another", [1.0], goal=3.0, higher_is_better=True)
    report.save()
    for name, value in HELD["avx2"].items():
        monkeypatch.setenv(name, value)
    held = Report()
    held.add("a row", [5.0], goal=3.0)
    held.save()
    held.skip("another", "it has | no such instruction")
    held.save()  # what was measured before stays
    first, second = Report.stored()
    assert first.held_to is None
    assert second.held_to == "avx2"
    lines = markdown([first, second]).splitlines()
    assert lines[0].split(" | ")[2:4] == [", ".join(abilities()), "held to AVX2"]
    assert lines[2].startswith("| a row | \\<= 3 | 2 (1 to 4) | 5 (5 to 5), MISSED |")
    assert "1 (1 to 1), MISSED | - (it has \\| no such instruction)" in lines[3]


def test_the_solver_is_measured_beside_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    found, accuracies = solver.measure(3, 4, 16)
    assert set(found) == set(accuracies) == {solver.AUTO, solver.PLAIN, solver.SCALED, solver.CHOSEN}
    assert accuracies[solver.AUTO] > 50.0
    assert torch.bincount(solver.problem(3, 4, 16).labels).tolist() == [4, 4, 4]
    (line,) = solver.rows([3], [2], [16])
    assert line[:3] == ["16", "3", "2"]


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


def _tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, the line of dashes left out."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def test_image_towers_alone_are_set_beside_a_linear_probe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shipped task; the photographs are not at hand, which is said in place of their table."""
    monkeypatch.setattr(benchmark_options, "missing", lambda: "there are no photographs on this machine.")
    food = demo_tasks()["food"]
    monkeypatch.setattr(benchmark_tasks, "demo_tasks", lambda: {"food": food})
    monkeypatch.setattr("sys.argv", ["vision_only", "--shots", "1", "4", "--seeds", "2", "--recipes", "auto"])
    vision_only.main()
    said = capsys.readouterr().out
    assert "## Photographs\n\nNot measured: there are no photographs on this machine." in said
    assert "1 tasks of emoji, 2 draws each" in said
    (table,) = _tables(said)
    assert table[0] == ["method", "1 a class", "4 a class"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert list(rows) == [
        vision_only.PROBE, "nearest class mean", "auto, class means", "auto, dual encoder with text",
    ]  # fmt: skip
    probe = [float(cell) for cell in rows.pop(vision_only.PROBE)]
    assert all(100 / len(food["classes"]) < share < 100 for share in probe)
    for cells in rows.values():
        for cell, beside in zip(cells, probe, strict=True):
            share, gap, low, high = (float(part) for part in re.findall(r"[-+]?[0-9.]+", cell))
            assert share - beside == pytest.approx(gap, abs=0.11)
            assert low <= gap <= high


@pytest.fixture
def quotations(tmp_path: Path) -> Path:
    """A folder as of Debian's fortunes: eight a topic, one of them too short and one there twice."""
    (tmp_path / "fortunes").mkdir()
    for topic in text_only.TOPICS:
        lines = [f"{topic} is what quotation number {number} speaks of" for number in range(6)]
        (tmp_path / "fortunes" / topic).write_text("\n%\n".join([*lines, "short", lines[0]]))
    return tmp_path / "fortunes"


def test_texts_by_several_methods(
    quotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = text_only.fortunes(quotations)
    assert len(task.texts) == len(task.test_texts) == 3 * len(text_only.TOPICS)
    assert not set(task.texts) & set(task.test_texts)
    tiny_text_model("bert").save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    options = ["--base-model", str(tmp_path / "encoder"), "--fortunes", str(quotations), "--shots", "1", "2"]
    few = ["--seeds", "2", "--setfit-seeds", "1", "--setfit-shots", "1", "--pairs", "16"]
    monkeypatch.setattr("sys.argv", ["text_only", *options, *few])
    text_only.main()
    accuracy, seconds = _tables(capsys.readouterr().out)
    assert accuracy[0] == ["accuracy in per cent, 95 % interval over draws", "1 shots", "2 shots"]
    assert seconds[0] == ["seconds to train", "1 shots", "2 shots"]
    methods = ["zero-shot", "auto", "paper", "linear probe", "SetFit-like"]
    assert [row[0] for row in accuracy[1:]] == [row[0] for row in seconds[1:]] == methods
    rows = {row[0]: row[1:] for row in accuracy[1:]}
    assert all("+-" in cell for name in methods[1:4] for cell in rows[name])
    assert rows["SetFit-like"][1] == ""  # which was not asked for at two shots
    assert 0 <= float(rows["SetFit-like"][0]) <= 100


def test_texts_that_are_not_at_hand_are_asked_for(
    quotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["text_only", "--fortunes", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"There are no quotations in .*nowhere.*--fortunes FOLDER"):
        text_only.main()
    find = text_only.importlib.util.find_spec
    monkeypatch.setattr(text_only.importlib.util, "find_spec", lambda name: None if "minilm" in name else find(name))
    monkeypatch.setattr("sys.argv", ["text_only", "--fortunes", str(quotations)])
    with pytest.raises(SystemExit, match=r"There is no encoder: pip install .*--base-model FOLDER"):
        text_only.main()


def test_samples_of_a_profile_are_told_apart_and_drawn(tmp_path: Path) -> None:
    """By the functions that the library has: renaming one would leave its time in `else`."""
    names = {
        "tower": "Embedder.stream_found.<locals>.embed (taskres_hf/embedding/embedder.py:1)",
        "resize and normalise": "Preprocessor.prepare (taskres_hf/embedding/preprocessing.py:1)",
        "decode": "read_image (taskres_hf/pictures.py:1)",
        "read and digest": "read_once (taskres_hf/pictures.py:1)",
        "cache": "KeptRows.add (taskres_hf/embedding/cache.py:1)",
        "digest of the weights": "image_weights_digest (taskres_hf/embedding/engines/rewriting.py:1)",
        "else": "_Pass.open (taskres_hf/embedding/features.py:1)",
    }
    for name, frame in names.items():
        assert reading.step(["_worker (thread.py:1)", frame]) == name
        function, place = frame.split(" (")
        text = (Path(__file__).parents[1] / place.split(":")[0]).read_text()
        assert all(f" {part}(" in text or f"class {part}" in text for part in function.split(".") if part[0] != "<")
    stacks = Counter({("open <script>& (a.py:1)", frame): 5 for frame in names.values()})
    reading.draw(stacks, "a title", tmp_path / "figure.svg")
    assert "script>" not in (tmp_path / "figure.svg").read_text()
    assert ET.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_rows_say_so() -> None:
    report = Report()
    device.device(report)
    assert len(report.rows) == 4
    assert all(row == {"not_measured": "no GPU"} for row in report.rows.values())


def test_what_is_timed_beside_a_gpu_embeds_every_picture(
    model: TaskResCLIPForImageClassification, splits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_a_device(monkeypatch)
    contents = []
    for row in range(3):
        stream = io.BytesIO()
        splits["test"][row]["image"].convert("RGB").save(stream, "JPEG")
        contents.append(stream.getvalue())
    images = LabelledImages.from_cells(device._Copies(contents, range(9)), [0] * 9, ["picture"])
    embedder = Embedder(model.clip, model.image_processor)
    tower, passed = embedder.engine.beside, []
    assert tower is not None
    submit = tower.submit
    monkeypatch.setattr(tower, "submit", lambda inputs, *rest: passed.append(inputs) or submit(inputs, *rest))
    device._embed(embedder, images, "0")
    assert [len(inputs["pixel_values"]) for inputs in passed] == [32]
    assert len(torch.unique(passed[0]["pixel_values"].flatten(1), dim=0)) == 3
    assert len({images.digest(row) for row in range(9)}) == 9
    device._resident(tower, embedder, 4, 9)
    assert len(passed) == 4
