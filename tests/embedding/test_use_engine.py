"""A loaded classifier, and so `pipeline`, whose image tower runs in a faster form."""

from __future__ import annotations

import copy
import pickle
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
    classify.model.run_image_tower = lambda *given: seen.append(1) or run(*given)
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
    model.run_image_tower = lambda *given: calls.append(given) or run(*given)
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


def _pixels(model: Any) -> torch.Tensor:
    size = model.clip.config.vision_config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _same_as_its_modules(model: Any, before: torch.Tensor) -> None:
    """What runs gives what the model's own modules give, which is no longer what it was."""
    found = model(_pixels(model)).logits
    use_engine(model, None)
    expected = model(_pixels(model)).logits
    assert not torch.allclose(expected, before, atol=0.02)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def _fused_step(model: Any) -> None:
    weights = [weight.requires_grad_() for weight in model.clip.vision_model.parameters()]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(weights, 0.05, fused=True).step()


def _patched(model: Any) -> None:
    real = model.clip.get_image_features

    def negated(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        found.pooler_output = -found.pooler_output
        return found

    model.clip.get_image_features = negated


def _layer(model: Any) -> Any:
    return model.clip.vision_model.encoder.layers[0]


CHANGES: dict[str, Any] = {
    "in place": lambda model: torch.no_grad()(_layer(model).mlp.fc1.weight.mul_)(3),
    "past autograd": lambda model: _layer(model).mlp.fc1.weight.data.mul_(3),
    "by numpy": lambda model: _layer(model).mlp.fc1.weight.detach().numpy().__imul__(3),
    "fused optimizer": _fused_step,
    "a norm's epsilon": lambda model: setattr(_layer(model).layer_norm1, "eps", 9.0),
    "attention's scale": lambda model: setattr(_layer(model).self_attn, "scale", 2.0),
    "another base": lambda model: setattr(model, "clip", _scaled(copy.deepcopy(model.clip))),
    "replaced method": _patched,
}


def _scaled(base: Any) -> Any:
    for weight in base.vision_model.parameters():
        weight.data.mul_(1.3)
    return base


@pytest.mark.filterwarnings("ignore:A hook or a replaced forward:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_that_was_changed_is_converted_anew(classify: Any, change: str) -> None:
    model = classify.model
    use_engine(model, "torch", "fp32")
    before = model(_pixels(model)).logits
    CHANGES[change](model)
    _same_as_its_modules(model, before)


def test_an_adapter_is_seen_when_it_is_switched_merged_and_scaled(classify: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = classify.model
    use_engine(model, "torch", "fp32")
    plain = model(_pixels(model)).logits
    settings = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=r".*vision_model.*(q_proj|fc1)", init_lora_weights=False
    )
    adapted = peft.get_peft_model(model.clip, settings)
    _same_as_its_modules(model, plain)
    use_engine(model, "torch", "fp32")
    with_adapter = model(_pixels(model)).logits
    with adapted.disable_adapter():
        torch.testing.assert_close(model(_pixels(model)).logits, plain, atol=1e-3, rtol=1e-4)
    adapted.merge_adapter()
    torch.testing.assert_close(model(_pixels(model)).logits, with_adapter, atol=1e-3, rtol=1e-4)
    adapted.unmerge_adapter()
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.1)
    _same_as_its_modules(model, with_adapter)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_tower(classify: Any, copied: Any) -> None:
    use_engine(classify.model, "torch", "fp32")
    before = classify.model(_pixels(classify.model)).logits
    other = copied(classify.model)
    assert other.run_image_tower is not None
    _scaled(other.clip)
    _same_as_its_modules(other, before)
    assert torch.equal(classify.model(_pixels(classify.model)).logits, before)


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
