"""A loaded classifier, and so `pipeline`, whose image tower runs in a faster form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding import use_engine
from taskres_hf.errors import ConfigurationError


@pytest.fixture
def classify(trained: Path) -> Iterator[Any]:
    made = pipeline("image-classification", model=str(trained))
    yield made
    use_engine(made.model, None)


def scores(answers: Any) -> dict[str, float]:
    return {one["label"]: one["score"] for one in answers}


def test_a_pipeline_gives_the_same_answers_from_another_form(classify: Any, splits: Any) -> None:
    picture = splits["test"][0]["image"].convert("RGB")
    before, modules = classify(picture), [type(one) for one in classify.model.modules()]
    seen: list[Any] = []
    assert use_engine(classify.model, "torch", "fp32") == "torch-fp32"
    run = classify.model.run_image_tower
    classify.model.run_image_tower = lambda inputs: seen.append(1) or run(inputs)
    after = classify(picture)
    assert seen
    assert scores(after) == pytest.approx(scores(before), abs=1e-4)
    assert [type(one) for one in classify.model.modules()] == modules
    assert use_engine(classify.model, None) == "stock"
    assert classify(picture) == before


def test_it_runs_only_where_nothing_else_is_asked_of_the_tower(classify: Any) -> None:
    model, calls = classify.model, []
    use_engine(model, "torch", "fp32")
    run = model.run_image_tower
    model.run_image_tower = lambda inputs: calls.append(inputs) or run(inputs)
    pixels = torch.rand(2, 3, *2 * [model.clip.config.vision_config.image_size])
    plain = model(pixels).logits
    assert len(calls) == 1
    states = model(pixels, output_hidden_states=True)
    assert len(states.hidden_states) > 1
    torch.testing.assert_close(states.logits, plain, atol=1e-3, rtol=1e-4)
    with torch.enable_grad():
        model.train()
        model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    model.eval()
    assert len(calls) == 1


def test_a_tower_that_was_changed_is_converted_anew(classify: Any) -> None:
    model, pixels = classify.model, torch.rand(1, 3, *2 * [classify.model.clip.config.vision_config.image_size])
    use_engine(model, "torch", "fp32")
    with torch.no_grad():
        weight = next(model.clip.vision_model.parameters())
        weight.add_(torch.randn_like(weight), alpha=0.5)
    changed = model(pixels).logits
    use_engine(model, None)
    torch.testing.assert_close(changed, model(pixels).logits, atol=1e-3, rtol=1e-4)


def test_what_does_not_exist_is_refused_and_the_model_runs_as_before(classify: Any) -> None:
    with pytest.raises(ConfigurationError, match="warp"):
        use_engine(classify.model, "warp")
    assert classify.model.run_image_tower is None
    assert classify(Image.new("RGB", (40, 40)))


def test_another_classifier_over_the_base_is_served_in_the_same_form(classify: Any, trained: Path) -> None:
    use_engine(classify.model, "torch", "fp32")
    other = TaskResCLIPForImageClassification.from_pretrained(trained, base_model=classify.model.clip, strength=0.0)
    picture = Image.new("RGB", (50, 40), (200, 30, 30))
    expected = pipeline(
        "image-classification", model=other, image_processor=classify.image_processor
    )(picture)  # fmt: skip
    classify.model.use_classifier(other)
    assert scores(classify(picture)) == pytest.approx(scores(expected), abs=1e-4)
