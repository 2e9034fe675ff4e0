"""None of these: what is kept of the classes' own pictures, what is rejected, and when a threshold no longer holds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from support import forge

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, ConfigurationError, DataError, FewShotError
from taskres_hf.rejection import check_enough, checked_rate, choose, class_means, nearest_mean
from taskres_hf.training.measuring import choose_rejection, fold_of_each_picture

TASK = "digits"  # 600 training and 997 test pictures


def _trainer(task: str = TASK, **settings: Any) -> TaskResTrainer:
    spec, splits = demo_tasks()[task], demo_dataset(task)
    model = Model.from_base(demo_model(), spec["classes"], spec["template"])
    arguments = TaskResTrainingArguments(on_short="ignore", disable_tqdm=True, **settings)
    return TaskResTrainer(model, arguments, splits["train"], splits["test"])


@pytest.fixture(scope="module")
def trainer() -> TaskResTrainer:
    """Trained on 16 digits a class, with a threshold."""
    made = _trainer(shots=16, reject=0.05)
    made.train()
    return made


@pytest.fixture
def model(trainer: TaskResTrainer) -> Model:
    """That model, to change: its head is a copy."""
    made = copy.copy(trainer.model)
    made._modules = dict(trainer.model._modules)
    made.classifier = copy.deepcopy(trainer.model.classifier)
    made.config = made.classifier.config
    made.config.facts = made.classifier.facts
    return made


@pytest.fixture(scope="module")
def digits(trainer: TaskResTrainer) -> torch.Tensor:
    return trainer.embed(trainer.eval_dataset).image_embeds[0]


@pytest.fixture(scope="module")
def noise(trainer: TaskResTrainer) -> torch.Tensor:
    """20 pictures of noise and 20 of one colour each."""
    draw = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
    pictures += [PIL.Image.new("RGB", (64, 64), tuple(draw.integers(0, 256, 3).tolist())) for _ in range(20)]
    return trainer.embedder(pictures)


def _share(values: torch.Tensor) -> float:
    return float(values.double().mean())


# ---------------------------------------------------------------------- what it is worth


def test_about_the_share_asked_for_is_rejected_of_pictures_of_the_classes(
    trainer: TaskResTrainer, digits: torch.Tensor
) -> None:
    """997 pictures that it was not chosen on; with 160 to choose on the share is off by 2.4 % at 10 % (one sigma)."""
    for rate in (0.05, 0.1, 0.2):
        found = trainer.choose_rejection(rate)
        share = _share(found.rejects(digits))
        assert abs(share - rate) < 2.5 * (rate * (1 - rate) / found.pictures) ** 0.5
    trainer.choose_rejection(0.05)


def test_noise_is_rejected_and_so_are_most_drawings_of_other_things(
    trainer: TaskResTrainer, model: Model, noise: torch.Tensor
) -> None:
    assert _share(model.rejects(image_embeds=noise)) > 0.95
    drawings = [picture.convert("RGB") for picture in demo_dataset("people")["test"]["image"][:60]]
    assert _share(model.rejects(image_embeds=trainer.embedder(drawings))) > 0.8


def test_without_a_threshold_nothing_changes(trainer: TaskResTrainer, model: Model, digits: torch.Tensor) -> None:
    without = _trainer(shots=16)
    without.train()
    assert torch.equal(without.model(image_embeds=digits).logits, model(image_embeds=digits).logits)
    assert "rejected" not in without.evaluate()
    with pytest.raises(ConfigurationError, match=r"choose_rejection.*--reject"):
        without.model.rejects(image_embeds=digits)


def test_measuring_says_what_it_rejects_and_how_good_the_rest_is(
    trainer: TaskResTrainer, model: Model, digits: torch.Tensor
) -> None:
    metrics, labels = trainer.evaluate(), trainer.embed(trainer.eval_dataset).labels
    rejected = model.rejects(image_embeds=digits)
    right = model(image_embeds=digits).logits.argmax(1) == labels
    assert metrics["rejected"] == pytest.approx(_share(rejected))
    assert metrics["accuracy_of_kept"] == pytest.approx(_share(right[~rejected]))
    assert metrics["accuracy"] == pytest.approx(_share(right))


def test_pictures_and_embeddings_are_rejected_alike(trainer: TaskResTrainer, model: Model) -> None:
    pictures = [picture.convert("RGB") for picture in trainer.eval_dataset["image"][:6]]  # type: ignore[index]
    pixels = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    embeds = model.get_image_features(pixels)
    assert torch.equal(model.rejects(pixels), model.rejects(image_embeds=3.0 * embeds))
    with pytest.raises(ConfigurationError, match="either"):
        model.rejects()


# ---------------------------------------------------------------------- how it is chosen


def test_the_threshold_is_the_score_that_the_rate_allows() -> None:
    """Of 39 held-out pictures at 5 % the second smallest: one is below it, as 2 of 40 would be."""
    scores = torch.linspace(0, 1, 39).double()[torch.randperm(39)]
    found = choose(scores, torch.eye(2, 192).half(), 0.05)
    assert found.threshold == pytest.approx(1 / 38)
    assert found.pictures == 39


def test_a_score_is_the_cosine_to_the_nearest_class_mean() -> None:
    embeds, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -1.0]]), torch.tensor([0, 0, 1])
    means = class_means(embeds, labels)
    half = 0.5**0.5
    torch.testing.assert_close(means, torch.tensor([[half, half], [0.0, -1.0]]).half())
    assert nearest_mean(torch.tensor([[3.0, 3.0], [1.0, -1.0]]), means).tolist() == pytest.approx([1.0, half], abs=1e-3)


@pytest.mark.parametrize(("pictures", "rate", "place"), [(19, 0.05, 1), (9, 0.1, 1), (99, 0.07, 7), (199, 0.05, 10)])
def test_so_many_pictures_allow_a_rate(pictures: int, rate: float, place: int) -> None:
    assert check_enough(pictures, rate) == place
    if place == 1:
        with pytest.raises(FewShotError, match=rf"needs {pictures} training pictures.*there are {pictures - 1}"):
            check_enough(pictures - 1, rate)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, True, "0.05", None, float("nan")])
def test_a_rate_is_a_share(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match="share"):
        checked_rate(rate)
    if rate is not None:
        with pytest.raises(ConfigurationError, match="reject"):
            TaskResTrainingArguments(reject=rate)


def test_too_few_pictures_are_refused_before_anything_is_trained() -> None:
    few = _trainer("animals-plants", shots=2, reject=0.05)
    with pytest.raises(FewShotError, match=r"needs 19 training pictures.*there are 16.*0\.059"):
        few.train()
    assert not few.model.classifier.residual.any()
    with pytest.raises(DataError, match="No class has two"):
        _trainer("animals-plants", shots=1, reject=0.05).train()


def test_it_is_chosen_on_the_pictures_that_were_trained_on() -> None:
    with pytest.raises(ConfigurationError, match=r"call train\(\) first"):
        _trainer("animals-plants", shots=4).choose_rejection()


def test_training_scores_are_not_what_it_is_chosen_on(trainer: TaskResTrainer) -> None:
    """On the training pictures themselves fewer are below it than were below it held out, 7 of 160."""
    stored, embeds = trainer.choose_rejection(0.05), trainer._foldable()[1].image_embeds[0]
    assert len(embeds) == stored.pictures == 160
    assert int(stored.rejects(embeds).sum()) < 7


def test_equal_pictures_are_never_on_both_sides() -> None:
    """Each picture five times is as if it were once: a copy of it among the means would hide how near others are."""
    once = _trainer("animals-plants", shots=4)
    once.train()
    plain = once._foldable()[1]
    copies = plain.select([row for row in range(len(plain)) for _ in range(5)])
    folds = fold_of_each_picture(copies.labels.tolist(), copies.digests, 4, 1)
    assert all(len(set(folds[start : start + 5])) == 1 for start in range(0, len(folds), 5))
    assert choose_rejection(copies, 0.1, 4, 1).threshold < choose_rejection(
        replace(copies, digests=()), 0.1, 4, 1
    ).threshold - 0.05  # fmt: skip


# ---------------------------------------------------------------------- as long as it holds


def test_it_is_saved_and_loaded(model: Model, tmp_path: Path, digits: torch.Tensor, noise: torch.Tensor) -> None:
    pictures = torch.cat([digits, noise])
    for dtype in (torch.float32, torch.float16):
        model.save_pretrained(tmp_path / "a", residual_dtype=dtype)
        loaded = Model.from_pretrained(tmp_path / "a", base_model=model.clip)
        assert torch.equal(loaded.rejects(image_embeds=pictures), model.rejects(image_embeds=pictures))
    assert describe(tmp_path / "a")["rejection"] == {"rate": 0.05, "pictures": 160}
    assert len(json.dumps(model.config.rejection)) < 10 * 192 * 2 * 4 / 3 + 200


def test_it_holds_at_every_strength(model: Model, digits: torch.Tensor) -> None:
    before = model.rejects(image_embeds=digits)
    model.strength = 0.25
    assert torch.equal(model.rejects(image_embeds=digits), before)


def test_training_anew_and_reset_drop_it() -> None:
    again = _trainer("animals-plants", shots=4, reject=0.1)
    again.train()
    assert again.model.config.rejection is not None
    again.args.reject = None
    again.train()
    assert again.model.config.rejection is None
    again.choose_rejection(0.1)
    again.model.classifier.reset()
    assert again.model.config.rejection is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 2}, {"threshold": "x"}, {"threshold": None}, {"means": "AAAA"}, {"means": "?"}, {"means": ""},
        {"means": "AHwAfA=="}, {"pictures": -1}, {"pictures": 1.5},
    ],
)  # fmt: skip
def test_a_damaged_threshold_is_an_error(trainer: TaskResTrainer, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer.save_model(tmp_path / "a")
    folder = forge(tmp_path / "a", rejection={**trainer.model.config.rejection, **changes})
    with pytest.raises(ArtifactError, match="rejection"):
        Model.from_pretrained(folder, base_model=trainer.model.clip)


def test_an_artifact_without_one_loads_as_before(trained: Path) -> None:
    assert "rejection" not in json.loads((trained / "config.json").read_text())
    assert Model.from_pretrained(trained).config.rejection is None


def test_a_change_of_classes_ends_a_threshold_and_a_change_of_names_does_not(model: Model, noise: torch.Tensor) -> None:
    before = model.rejects(image_embeds=noise)
    names = model.class_names
    model.rename_classes({names[0]: "nought"}).reorder_classes([*model.class_names[1:], model.class_names[0]])
    assert torch.equal(model.rejects(image_embeds=noise), before)
    model.remove_classes(["nought"])
    assert model.config.rejection is None
