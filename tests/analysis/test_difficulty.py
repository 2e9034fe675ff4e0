"""Measures of difficulty, the prediction made of them, and the command: what a user relies on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.analysis import difficulty as measures
from taskres_hf.analysis import transfer, transfer_difficulty
from taskres_hf.embedding import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError


def _clusters(apart: float, each: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures [N, D], labels [N] and a base classifier [K, D] of four classes, so far apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 16)
    labels = torch.arange(4).repeat_interleave(each)
    images = apart * centres[labels] + 0.5 * torch.randn(4 * each, 16, generator=generator)
    return images, labels, centres + 0.05 * torch.randn(4, 16, generator=generator)


def test_every_measure_tells_easy_from_hard() -> None:
    easy, hard = (
        measures.task_measures(images, base, 20.0, labels, torch.stack([base, base + 0.3 * base.roll(1, 0)]))
        for images, labels, base in (_clusters(3.0), _clusters(0.2))
    )
    assert set(easy) == {*measures.UNLABELLED, *measures.LABELLED, *measures.LEFT_OUT}
    smaller = {"transport_distance"}
    same = {"text_separation"}  # does not look at pictures
    for name in set(easy) - same:
        assert (easy[name] > hard[name]) != (name in smaller), name
    assert easy["cross_validated"] == easy["class_means"] == easy["zero_shot_accuracy"] == 1.0


def test_left_out_pictures_are_not_looked_at() -> None:
    """Of noise nothing can be told, however many dimensions there are to learn it by heart in."""
    images, labels = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)), torch.arange(4).repeat(10)
    assert float(measures.class_mean_hits(images, labels).mean()) < 0.5
    assert float(measures.nearest_neighbour_hits(images, labels).mean()) < 0.5
    logits, truth = measures.cross_validated_logits(images, labels, torch.randn(4, 64), 20.0)
    assert sorted(truth.tolist()) == sorted(labels.tolist())
    assert float((logits.argmax(1) == truth).double().mean()) < 0.5


def test_transport_agrees_with_the_assignment_of_scipy() -> None:
    from scipy.optimize import linear_sum_assignment

    images, _, base = _clusters(3.0, each=1)
    f, u = (measures.unit(measures.unit(rows) - measures.unit(rows).mean(0)) for rows in (images, base))
    cost = (1.0 - f @ u.T).numpy()
    rows, columns = linear_sum_assignment(cost)
    assert measures.transport_distance(images, base, 0.01, 500) == pytest.approx(cost[rows, columns].mean(), abs=0.01)


def test_measures_of_a_class_find_the_confused_ones() -> None:
    images, labels, base = _clusters(3.0)
    images[labels == 1] = images[labels == 0] + 0.01  # two classes that look alike
    told = measures.class_measures(images, base, 20.0, labels)
    assert all(values.shape == (4,) for values in told.values())
    for name in ("left_out_recall", "left_out_probability", "class_means", "mean_separation"):
        assert float(told[name][:2].mean()) < float(told[name][2:].mean()) - 0.1, name


def test_one_picture_a_class_holds_nothing_out() -> None:
    images, labels, base = _clusters(3.0, each=1)
    told = measures.task_measures(images, base, 20.0, labels)
    assert set(told) == {*measures.UNLABELLED, *measures.LABELLED} - {"prompt_agreement"}
    assert all(map(math.isfinite, told.values()))


# ---------------------------------------------------------------------- the prediction


@pytest.fixture(scope="module")
def features(base: str, spec: dict[str, Any], splits: Any) -> tuple[TaskResCLIPForImageClassification, ImageFeatures]:
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    return model, TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["train"])


def test_a_prediction_holds_what_training_reached(features: Any, splits: Any) -> None:
    model, data = features
    told = transfer_difficulty(model, data, shots=(1, 4, 16))
    arguments = TaskResTrainingArguments(shots=16, on_short="ignore", disable_tqdm=True)
    trainer = TaskResTrainer(model, arguments, data, splits["test"])
    trainer.train()
    low, high = told.expected[-1].accuracy_interval
    assert low < trainer.evaluate()["accuracy"] < high
    model.classifier.reset()
    assert [one.shots for one in told.expected] == [1, 4, 16]
    assert told.expected[0].accuracy < told.expected[-1].accuracy
    assert told.difficulty_interval[0] < told.difficulty < told.difficulty_interval[1]
    assert told.made_from["mode"] == transfer.SEVERAL
    assert told.made_from["pictures_per_class"] <= 16
    hard = [one.difficulty for one in told.per_class]
    assert hard == sorted(hard, reverse=True)
    assert {one.name for one in told.per_class} == set(model.class_names)
    assert json.loads(json.dumps(told.as_dict()))["shots"] == 4


def test_more_labels_make_narrower_intervals(features: Any) -> None:
    model, data = features
    one = data.select([data.labels.tolist().index(label) for label in range(8)])
    widths = []
    for given, labelled in ((data, False), (one, None), (data, None)):
        low, high = transfer_difficulty(model, given, labelled=labelled, shots=16).expected[0].accuracy_interval
        widths.append(high - low)
    assert widths[2] < min(widths[:2])
    assert transfer_difficulty(model, one).made_from["mode"] == transfer.ONE


def test_a_wider_level_is_a_wider_interval_and_says_what_was_measured(features: Any) -> None:
    told = [transfer_difficulty(*features, level=level) for level in (0.5, 0.8, 0.9)]
    widths = [one.difficulty_interval[1] - one.difficulty_interval[0] for one in told]
    assert widths == sorted(widths)
    for one in told:
        assert set(one.coverage) == {"accuracy", "gain", "class_accuracy"}
        assert all(abs(held["task"] - one.level) < 0.05 for held in one.coverage.values())


def test_embeddings_alone_and_a_head_are_enough(features: Any) -> None:
    model, data = features
    told = transfer_difficulty(model.classifier, data.image_embeds[0])
    assert told.made_from["mode"] == transfer.UNLABELLED
    assert told.expected == transfer_difficulty(model, data, labelled=False).expected
    with pytest.raises(ConfigurationError, match="A head alone embeds no pictures"):
        transfer_difficulty(model.classifier, ["a.jpg"])


def test_copies_of_a_picture_do_not_answer_for_it(features: Any) -> None:
    model, data = features
    once = data.select(data.each_once())
    with pytest.warns(UserWarning, match=f"{len(once)} of {2 * len(once)} pictures are there more than once"):
        twice = transfer_difficulty(model, once.select([*range(len(once)), *range(len(once))]))
    assert twice == transfer_difficulty(model, once)
    with pytest.warns(UserWarning, match="more than once"), pytest.raises(DataError, match="2 or more"):
        transfer_difficulty(model, once.select([0, 0, 0]))


@pytest.mark.filterwarnings("ignore:Nothing like this")
@pytest.mark.parametrize("labelled", [True, False])
def test_embeddings_that_are_all_the_same_are_numbers_too(features: Any, labelled: bool) -> None:
    model, data = features
    same = ImageFeatures(data.image_embeds[:, :1].expand(-1, 8, -1), torch.arange(8) % 2, model.class_names, "")
    told = transfer_difficulty(model, same, labelled=labelled)
    assert all(math.isfinite(value) for value in told.measures.values())
    assert 0.0 <= told.expected[0].accuracy_interval[0] <= told.expected[0].accuracy_interval[1] <= 1.0


@pytest.mark.filterwarnings("ignore:Nothing like this")
def test_pictures_of_a_class_that_are_nearly_copies_are_several_too(features: Any) -> None:
    """Frames of one video a class, of which recipe `auto` holds none out."""
    model, data = features
    classes = len(model.class_names)
    scenes = data.image_embeds[0, :classes]
    frames = torch.cat([scenes, scenes + 1e-4 * scenes.std() * torch.randn_like(scenes)])[None]
    told = transfer_difficulty(model, ImageFeatures(frames, torch.arange(2 * classes) % classes, model.class_names, ""))
    assert told.measures["class_means"] == 1.0
    assert all(math.isfinite(value) for value in told.measures.values())


def test_a_level_that_was_not_measured_is_refused_before_pictures_are_read(features: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"0\.5, 0\.8, 0\.9"):
        transfer_difficulty(features[0], "no-such-folder", level=0.7)


def test_outside_of_what_was_seen_is_said_and_wider(features: Any) -> None:
    model, data = features
    pair = TaskResCLIPForImageClassification.from_base(model.clip, model.class_names[:2], tokenizer=model.tokenizer)
    with pytest.warns(UserWarning, match="log_classes"):
        told = transfer_difficulty(pair.classifier, data.image_embeds[0][data.labels < 2])
    assert "log_classes" in told.outside
    line = transfer.constants()["lines"][transfer.UNLABELLED]["accuracy"]
    inside = {"log_given": 0.0} | {name: low for name, (low, _) in line.seen.items()}
    far = inside | {"log_classes": inside["log_classes"] - 10 * line.spread["log_classes"]}
    assert line.half(far, 4, "0.8") == pytest.approx(11 * line.half(inside, 4, "0.8"))
    assert line.at(far, 4) == line.at(inside, 4)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"shots": 32}, ConfigurationError, "1 to 16"),
        ({"shots": ()}, ConfigurationError, "empty"),
        ({"level": 0.7}, ConfigurationError, "0.5, 0.8, 0.9"),
        ({"images": torch.zeros(3, 5)}, DataError, r"\[N, 192\]"),
        ({"images": torch.full((3, 192), math.nan)}, DataError, "NaN"),
        ({"images": torch.zeros(3, 192), "labelled": True}, DataError, "no labels"),
    ],
)
def test_bad_input_is_refused(features: Any, given: dict[str, Any], error: type[Exception], words: str) -> None:
    model, data = features
    with pytest.raises(error, match=words):
        transfer_difficulty(model, **{"images": data, **given})


def test_the_constants_name_what_made_them() -> None:
    known = transfer.constants()
    assert known["made_by"] == "python -m benchmarks.difficulty --fit"
    assert len(known["of"]["tasks"]) == 13
    assert known["of"]["seeds"] == [1, 2, 3, 4, 5]
    assert set(known["lines"]) == {transfer.UNLABELLED, transfer.ONE, transfer.SEVERAL}


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sorted`, a folder per class, and `loose`, the same pictures together."""
    top = tmp_path_factory.mktemp("difficulty")
    for number, row in enumerate(splits["train"].select(range(0, 179, 3))):
        for folder in (top / "sorted" / f"kind {row['label']}", top / "loose"):
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].convert("RGB").save(folder / f"{number}.png")
    return top


def test_the_command_reads_labelled_folders(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    code, text, _ = run(capsys, "difficulty", folders / "sorted", "--base-model", "shipped", "--quiet")
    assert code == 0
    assert "several pictures a class" in text
    assert "Difficulty at 4 pictures a class" in text
    assert "kind 7" in text


def test_the_command_reads_loose_pictures_and_shows_hostile_names(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    names = "cat,dog,<script>x</script>,=cmd(),\x1b[31mred"
    options = ("difficulty", folders / "loose", "--base-model", "shipped", "--class-names", names, "--shots", "1,4")
    code, text, _ = run(capsys, *options, "--json")
    told = json.loads(text)
    assert code == 0
    assert told["made_from"]["mode"] == transfer.UNLABELLED
    assert [row["shots"] for row in told["expected"]] == [1, 4]
    assert "\x1b" not in text
    code, text, _ = run(capsys, *options)
    assert code == 0
    assert "\x1b[31m" not in text


def test_one_class_folder_is_called_that(capsys: pytest.CaptureFixture[str], folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "sorted" / "kind 0", tmp_path / "one" / "kind 0")
    code, _, error = run(capsys, "difficulty", tmp_path / "one", "--base-model", "shipped")
    assert code == 1
    said = " ".join(error.split())
    assert "holds one class folder only, 'kind 0'" in said
    assert "--class-names" in said
    assert "no labels" not in said


def test_loose_pictures_without_names_are_an_error(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    code, _, error = run(capsys, "difficulty", folders / "loose", "--base-model", "shipped")
    assert code == 1
    assert "--class-names" in error
