"""Adding, removing, renaming and reordering classes: what answers, what is saved, what is claimed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden_v3, random_residual, tagger

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.checking.verifying import DIFFERS, verify
from taskres_hf.classes.rows import rows_of
from taskres_hf.description import describe
from taskres_hf.errors import BaseMismatchError, ClassNamesError, ConfigurationError


def _answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(image_embeds=_embeds(model)).logits
    return logits


def _embeds(model: Any) -> torch.Tensor:
    return torch.randn(6, model.config.projection_dim, generator=torch.Generator().manual_seed(3))


def _whole(model: Any, folder: Path) -> Any:
    """Saved, verified and loaded again with the same answers."""
    model.save_pretrained(folder)
    rows = verify(folder, base_model=model.clip)
    assert not [row for row in rows if row["result"] == DIFFERS], rows
    again = Model.from_pretrained(folder, base_model=model.clip)
    assert again.class_names == model.class_names
    torch.testing.assert_close(_answers(again), _answers(model), atol=1e-5, rtol=1e-5)
    return again


def _published(model: Model) -> Model:
    return random_residual(model)


def _at_half(model: Model) -> Model:
    random_residual(model).strength = 0.5
    return model


def _enhanced(model: Model) -> Model:
    random_residual(model).classifier.shift = 0.1 * torch.randn_like(model.classifier.base)
    model.config.enhanced_base = {"epochs": 50}
    return model


def _biased(model: Model) -> Model:
    """A bias, a factor, rows of lengths of their own, a strength: all that format 3 has."""
    unit = torch.nn.functional.normalize(model.classifier.base.double(), dim=1)
    noise = torch.randn(unit.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = torch.linspace(-1, 1, len(unit))
    model.classifier.set_weight(
        0.4 * unit + 0.02 * noise, class_bias=bias, normalize_weight=False, logit_scale_factor=0.8
    )
    model.strength = 0.75
    return model


def _equally_long(model: Model) -> Model:
    """Directions alone, with a factor, as `write_to_model` saves what it can."""
    noise = torch.randn(model.classifier.base.shape, generator=torch.Generator().manual_seed(5))
    unit = torch.nn.functional.normalize(model.classifier.base, dim=1)
    model.classifier.set_weight(unit + 0.05 * noise, logit_scale_factor=0.5)
    return model


KINDS: dict[str, Callable[[Model], Model]] = {
    "published": _published, "strength": _at_half, "enhanced": _enhanced, "bias": _biased, "factor": _equally_long,
}  # fmt: skip


@pytest.fixture(params=list(KINDS))
def changed(request: pytest.FixtureRequest, model: Model) -> Model:
    made = KINDS[request.param](model)
    made.config.training, made.config.metrics = {"method": "made up"}, {"accuracy": 0.9}
    return made


def test_adding_keeps_the_old_answers(changed: Model, tmp_path: Path) -> None:
    before, old, strength = _answers(changed), changed.class_names, changed.strength
    assert changed.add_classes(["tractor", "ferry"]) is changed
    assert changed.class_names == [*old, "tractor", "ferry"]
    assert changed.config.id2label[len(old)] == "tractor"
    assert changed.config.label2id["ferry"] == len(old) + 1
    torch.testing.assert_close(_answers(changed)[:, : len(old)], before, atol=2e-4, rtol=1e-4)
    assert changed.strength == strength
    again = _whole(changed, tmp_path / "a")
    assert again.config.metrics is None
    assert again.config.training["changes"][0]["classes"] == ["tractor", "ferry"]
    with torch.no_grad():
        again.strength = 0.0
        torch.testing.assert_close(_answers(again), again.zero_shot_logits(image_embeds=_embeds(again)))


def test_removing_and_reordering_move_answers(changed: Model, tmp_path: Path) -> None:
    before, old = _answers(changed), changed.class_names
    changed.remove_classes([old[2], old[0]])
    left = [1, *range(3, len(old))]
    torch.testing.assert_close(_answers(changed), before[:, left], atol=1e-5, rtol=1e-5)
    changed.reorder_classes(changed.class_names[::-1])
    torch.testing.assert_close(_answers(changed), before[:, left[::-1]], atol=1e-5, rtol=1e-5)
    again = _whole(changed, tmp_path / "a")
    assert again.config.id2label == dict(enumerate([old[place] for place in left[::-1]]))
    assert [row["change"] for row in again.config.training["changes"]] == ["removed", "reordered"]


def test_renaming_changes_nothing_but_the_label(changed: Model, tmp_path: Path) -> None:
    before, old = _answers(changed), changed.class_names
    changed.rename_classes({old[0]: old[1], old[1]: old[0], old[2]: "newt_1"})
    assert changed.class_names[:3] == [old[1], old[0], "newt_1"]
    assert torch.equal(_answers(changed), before)
    again = _whole(changed, tmp_path / "a")
    assert old[2] in again.class_prompts()[2][0]
    again.rename_classes({"newt_1": old[2], old[0]: old[1], old[1]: old[0]})
    assert again.class_names == old
    assert again.config.prompt_names is None


def test_reembedding_exchanges_the_text_alone(changed: Model, tmp_path: Path) -> None:
    old, before, base = changed.class_names, rows_of(changed.classifier), changed.classifier.base.clone()
    strength = changed.strength
    changed.rename_classes({old[1]: "tractor"}, reembed=True)
    assert "tractor" in changed.class_prompts()[1][0]
    assert changed.strength == strength
    assert not torch.allclose(changed.classifier.base[1], base[1])
    others = [0, *range(2, len(old))]
    after = rows_of(changed.classifier)
    torch.testing.assert_close(after.weight[others], before.weight[others], atol=1e-6, rtol=1e-5)
    if not changed.classifier.normalize_weight:
        unit = [torch.nn.functional.normalize(one[1].double(), dim=0) for one in (base, changed.classifier.base)]
        torch.testing.assert_close(
            after.weight[1] - before.weight[1], before.text * (unit[1] - unit[0]), atol=1e-5, rtol=1e-4
        )
    _whole(changed, tmp_path / "a")


def test_a_text_row_beside_published_ones_is_zero_shot(model: Model) -> None:
    random_residual(model).add_classes(["tractor"])
    assert not model.classifier.residual[-1].any()
    assert model.classifier.class_bias is None
    zero_shot = model.zero_shot_logits(image_embeds=_embeds(model))
    torch.testing.assert_close(_answers(model)[:, -1], zero_shot[:, -1])


def test_a_text_row_has_the_scale_of_the_trained_ones_and_their_gain(model: Model) -> None:
    _biased(model).strength = 1.0
    model.config.training = {"recipe": "auto", "temperature": 0.3, "gain": 0.7}
    model.add_classes(["tractor"])
    zero_shot = model.zero_shot_logits(image_embeds=_embeds(model))[:, -1]
    torch.testing.assert_close(_answers(model)[:, -1], 0.3 * zero_shot + 0.7, atol=1e-4, rtol=1e-4)
    model.add_classes(["ferry"], class_bias=-2.0)
    zero_shot = model.zero_shot_logits(image_embeds=_embeds(model))[:, -1]
    torch.testing.assert_close(_answers(model)[:, -1], 0.3 * zero_shot - 2.0, atol=1e-4, rtol=1e-4)


def test_without_a_record_scale_and_gain_come_from_the_rows(model: Model) -> None:
    rows = rows_of(_biased(model).classifier)
    assert rows.text == pytest.approx(0.8 * 0.4, abs=0.05)
    assert rows.gain > 0
    model.config.training = {"temperature": "nonsense", "gain": [1]}
    assert rows_of(model.classifier) [2:] == rows[2:]  # fmt: skip


def test_rows_without_text_are_refused_and_nothing_changes(model: Model) -> None:
    unit = torch.nn.functional.normalize(model.classifier.base.double(), dim=1)
    model.classifier.set_weight(-unit, normalize_weight=False)
    before, names = _answers(model), model.class_names
    with pytest.raises(ConfigurationError, match="pictures of all"):
        model.add_classes(["tractor"])
    assert model.class_names == names
    assert torch.equal(_answers(model), before)


def test_the_image_side_gets_plain_rows(base: str, spec: Any, tmp_path: Path) -> None:
    model = random_residual(Model.from_base(base, spec["classes"], spec["template"], residual_side="image"))
    before = _answers(model)
    model.add_classes(["tractor"])
    torch.testing.assert_close(_answers(model)[:, :-1], before)
    model.remove_classes([spec["classes"][0]])
    torch.testing.assert_close(_answers(model)[:, :-1], before[:, 1:])
    _whole(model, tmp_path / "a")


def test_other_templates_descriptions_and_words(base: str, spec: Any, tmp_path: Path) -> None:
    names = spec["classes"][:3]
    model = Model.from_base(base, names, ["a photo of a {}.", "a {} icon."], prompt_names={names[0]: "furry animal"})
    prompts = model.class_prompts()
    model.add_classes(["red_cross"])
    assert model.class_prompts() == [*prompts, ["a photo of a red cross.", "a red cross icon."]]
    assert model.config.templates == ["a photo of a {}.", "a {} icon."]
    model.add_classes(["tractor"], "clip-7")
    assert model.class_prompts()[:3] == prompts
    assert len(model.class_prompts()[-1]) == 7
    model.add_classes(["ferry"], class_descriptions={"ferry": "a ship that carries cars"})
    assert model.class_prompts()[-1] == ["a ship that carries cars"]
    again = _whole(model, tmp_path / "a")
    with pytest.raises(ConfigurationError, match="class_descriptions= or templates="):
        again.add_classes(["plane"])
    with pytest.raises(ConfigurationError, match="without a place for the name"):
        again.rename_classes({"ferry": "boat"}, reembed=True)
    again.rename_classes({"ferry": "boat"}).remove_classes(["tractor"]).reorder_classes(again.class_names[::-1])
    _whole(again, tmp_path / "b")


def test_described_classes_keep_their_sentences(base: str, tmp_path: Path) -> None:
    described = {"cat": ["it purrs"], "big dog": "it barks", "bird": ["it sings", "it flies"]}
    model = Model.from_base(base, ["cat", "big_dog", "bird"], "a {}", class_descriptions=described)
    prompts = model.class_prompts()
    model.rename_classes({"big_dog": "hound"}).reorder_classes(["bird", "hound", "cat"])
    assert model.class_prompts() == prompts[::-1]
    model.rename_classes({"hound": "wolf"}, reembed=True)
    assert model.class_prompts()[1] == ["a wolf", "it barks"]
    _whole(model, tmp_path / "a")


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_artifacts_of_every_format(version: str, base: str, tmp_path: Path) -> None:
    model = Model.from_pretrained(Path(__file__).parents[1] / "golden" / version, base_model=base)
    model.config.base_model_name_or_path = base
    before, old = _answers(model), model.class_names
    model.rename_classes({old[0]: "renamed"}).remove_classes([old[1]])
    if version == "v3":  # whose rows were made up, without any text in them
        with pytest.raises(ConfigurationError, match="nothing of their classes' text"):
            model.add_classes(["tractor"])
    else:
        model.add_classes(["tractor"])
    torch.testing.assert_close(_answers(model)[:, :7], before[:, [0, *range(2, len(old))]], atol=1e-4, rtol=1e-4)
    _whole(model, tmp_path / "a")


def test_names_are_checked_and_nothing_changes(model: Model) -> None:
    names, before = model.class_names, _answers(random_residual(model))
    accented = "café"
    model.rename_classes({names[0]: accented})
    names = model.class_names
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.add_classes([unicodedata.normalize("NFD", accented)]), "must differ"),
        (lambda: model.add_classes(["tractor", "tractor "]), "must differ"),
        (lambda: model.add_classes("tractor"), "list of names"),
        (lambda: model.add_classes([]), "at least 1"),
        (lambda: model.add_classes([" "]), "empty"),
        (lambda: model.remove_classes(names), "at least 2"),
        (lambda: model.remove_classes(names[1:]), "at least 2"),
        (lambda: model.remove_classes([names[1] + "s"]), f"did you mean {names[1]!r}"),
        (lambda: model.remove_classes([names[1], names[1]]), "twice"),
        (lambda: model.remove_classes(names[1]), "list of names"),
        (lambda: model.remove_classes([]), "No class"),
        (lambda: model.reorder_classes(names[1:]), "lacks 'café'"),
        (lambda: model.reorder_classes([*names, "tractor"]), "no class 'tractor'"),
        (lambda: model.rename_classes({}), "mapping"),
        (lambda: model.rename_classes({"nothing": "x"}), "no class"),
        (lambda: model.rename_classes({names[1]: names[2]}), "must differ"),
        (lambda: model.rename_classes({names[1]: ""}), "empty"),
    ]
    for change, message in wrong:
        with pytest.raises(ClassNamesError, match=message):
            change()
    with pytest.raises(ConfigurationError, match="class_bias"):
        model.add_classes(["tractor"], class_bias=float("nan"))
    assert model.class_names == names
    assert torch.equal(_answers(model), before)
    model.remove_classes([unicodedata.normalize("NFD", accented)])  # however it was typed
    assert accented not in model.class_names


def test_another_base_under_the_classifier_is_noticed(trained: Path) -> None:
    model = Model.from_pretrained(trained, text_tower=True)
    model.classifier.base.add_(0.2 * torch.randn_like(model.classifier.base))
    with pytest.raises(BaseMismatchError, match="old classes"):
        model.add_classes(["tractor"])


def test_a_loaded_classifier_serves_its_new_classes(trained: Path, splits: Any, tmp_path: Path) -> None:
    from transformers import pipeline

    model = Model.from_pretrained(trained, text_tower=True)
    evil = "<script>|=cmd()\x1b[31m"
    model.add_classes(["tractor"]).rename_classes({"tractor": evil})
    _whole(model, tmp_path / "a")
    answers = pipeline("image-classification", model=str(tmp_path / "a"))(splits["test"][0]["image"], top_k=99)
    assert {answer["label"] for answer in answers} == set(model.class_names)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "added tractor from text, after training" in card
    assert "no accuracy is given" in card
    assert "accuracy |" not in card
    assert "model-index" not in card
    facts = describe(tmp_path / "a")
    assert facts["accuracy"] is None
    assert len(facts["changes"]) == 2
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (
        stored["data"]["train_pictures"] == json.loads((trained / "config.json").read_text())["data"]["train_pictures"]
    )


def test_zero_shot_with_other_classes_is_zero_shot(model: Model, base: str, spec: Any) -> None:
    model.add_classes(["tractor"]).remove_classes([spec["classes"][0]])
    fresh = Model.from_base(base, [*spec["classes"][1:], "tractor"], spec["template"])
    torch.testing.assert_close(_answers(model), _answers(fresh), atol=1e-4, rtol=1e-4)
    assert model.config.training is None
    assert model.classifier.is_zero_shot


def test_golden_settings_survive(model: Model, tmp_path: Path) -> None:
    golden_v3(model, tmp_path / "v3")
    before = model.classifier.class_bias
    assert before is not None
    model.reorder_classes(model.class_names[::-1])
    assert torch.equal(model.classifier.class_bias, before.flip(0))  # type: ignore[arg-type]
    assert (model.strength, model.classifier.logit_scale_factor) == (0.625, 0.75)


def test_between_zero_shot_and_trained_old_answers_stay_or_it_is_refused(model: Model) -> None:
    """Rows that count by direction, or have a factor, go another way from zero-shot to trained than rewritten ones."""
    _equally_long(model).strength = 0.5
    before, names = _answers(model), model.class_names
    with pytest.raises(ConfigurationError, match=r"Set strength = 1\.0 before"):
        model.add_classes(["tractor"])
    assert model.class_names == names
    assert torch.equal(_answers(model), before)
    model.strength = 0.0
    torch.testing.assert_close(_answers(model.add_classes(["tractor"]))[:, : len(names)], _zero_shot(model, len(names)))


def _zero_shot(model: Model, classes: int) -> torch.Tensor:
    logits: torch.Tensor = model.zero_shot_logits(image_embeds=_embeds(model))[:, :classes]
    return logits


def test_of_several_labels_per_picture_the_other_scores_stay_and_classes_from_text_are_refused(
    base: str, tmp_path: Path
) -> None:
    model = tagger(Model.from_base(base, ["cat", "dog", "bird"]))
    before = _answers(model)
    for refused in (lambda: model.add_classes(["fish"]), lambda: model.rename_classes({"cat": "kitten"}, reembed=True)):
        with pytest.raises(ConfigurationError, match="gives several, or none"):
            refused()
    assert torch.equal(_answers(model), before)
    model.rename_classes({"cat": "kitten"}).reorder_classes(["bird", "kitten", "dog"]).remove_classes(["dog"])
    torch.testing.assert_close(_answers(model), before[:, [2, 0]], atol=1e-5, rtol=0)
    again = _whole(model, tmp_path / "two")
    assert again.classifier.several_labels
    assert again.config.training["threshold"] == 0.4
