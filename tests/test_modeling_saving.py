"""Saving and loading the model: round trips through every loader, and nothing saved that does not load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    pipeline,
)

from taskres_hf import (
    TaskResCLIPForImageClassification,
    TaskResConfig,
    base_model,
)
from taskres_hf.errors import ArtifactError, BaseModelError, ConfigurationError

Model = TaskResCLIPForImageClassification


def test_round_trip_is_exact_by_every_loader(model: Model, pixel_values: torch.Tensor, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path / "a")
    folder = str(tmp_path / "a")
    expected = model(pixel_values=pixel_values).logits
    assert torch.equal(Model.from_pretrained(folder)(pixel_values=pixel_values).logits, expected)
    auto = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(auto, Model)
    assert not auto.training
    assert torch.equal(auto(pixel_values=pixel_values).logits, expected)
    assert isinstance(AutoConfig.from_pretrained(folder), TaskResConfig)
    with_config = Model.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    assert torch.equal(with_config(pixel_values=pixel_values).logits, expected)
    again, notes = Model.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(again(pixel_values=pixel_values).logits, expected)
    assert not notes["missing_keys"]


def test_pipeline_gives_the_same(model: Model, splits: Any, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path)
    pictures = [splits["test"][index]["image"] for index in range(4)]
    inputs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images=pictures, return_tensors="pt")
    expected = model(**inputs).logits.softmax(dim=1)
    for batch_size in (1, 4):
        found = pipeline("image-classification", model=str(tmp_path))(pictures, top_k=8, batch_size=batch_size)
        for row, probabilities in zip(found, expected, strict=True):
            scores = torch.tensor([{top["label"]: top["score"] for top in row}[name] for name in model.class_names])
            torch.testing.assert_close(scores, probabilities.detach(), atol=1e-5, rtol=1e-4)


def test_loading_options_reach_the_base(model: Model, pixel_values: torch.Tensor, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path)
    expected = model(pixel_values=pixel_values).logits
    half = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.clip.dtype == torch.bfloat16
    assert half.classifier.residual.dtype == half.classifier.base.dtype == torch.float32
    assert torch.equal(half.classifier.residual, model.classifier.residual)
    assert (half(pixel_values=pixel_values.bfloat16()).logits - expected).abs().max() < 1.0
    for loader in (Model, AutoModelForImageClassification):
        eager = loader.from_pretrained(tmp_path, attn_implementation="eager")
        assert eager.clip.vision_model.config._attn_implementation == "eager"
        torch.testing.assert_close(eager(pixel_values=pixel_values).logits, expected, atol=1e-4, rtol=1e-4)
    placed = AutoModelForImageClassification.from_pretrained(tmp_path, device_map="cpu", low_cpu_mem_usage=True)
    torch.testing.assert_close(placed(pixel_values=pixel_values).logits, expected, atol=1e-4, rtol=1e-4)
    assert Model.from_pretrained(tmp_path, alpha=0.25).classifier.alpha == 0.25
    with pytest.raises(TypeError, match="nonsense"):
        Model.from_pretrained(tmp_path, nonsense=1)


def test_text_tower_is_not_loaded_once_the_base_classifier_is_known(model: Model, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path)
    light = Model.from_pretrained(tmp_path)
    whole = Model.from_pretrained(tmp_path, text_tower=True)
    count = {
        name: sum(p.numel() for p in m.clip.text_model.parameters()) for name, m in (("light", light), ("all", whole))
    }
    assert count["light"] == 0 < count["all"]
    with pytest.raises(BaseModelError, match="text_tower=True"):
        light.clip.get_text_features(input_ids=torch.tensor([[1]]))
    assert torch.equal(light.classifier.weight(), whole.classifier.weight())


def test_a_loaded_base_can_be_shared(model: Model, pixel_values: torch.Tensor, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path)
    other = Model.from_pretrained(tmp_path, base_model=model.clip)
    assert other.clip is model.clip
    assert torch.equal(other(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


def test_a_base_without_its_text_tower_can_be_shared(
    model: Model, base: str, splits: Any, pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    random_residual(model).save_pretrained(tmp_path / "a")
    random_residual(Model.from_base(base, ["cat", "dog", "fish"])).save_pretrained(tmp_path / "b")
    first = Model.from_pretrained(tmp_path / "a")
    second = Model.from_pretrained(tmp_path / "b", base_model=first.clip)
    assert second.clip is first.clip
    assert torch.equal(
        second(pixel_values=pixel_values).logits,
        Model.from_pretrained(tmp_path / "b")(pixel_values=pixel_values).logits,
    )
    first.clip.config._name_or_path = "some/other-clip"
    with pytest.raises(BaseModelError, match="text_tower=True"):
        Model.from_pretrained(tmp_path / "b", base_model=first.clip)


def test_from_base_with_a_loaded_clip(base: str, model: Model, spec: dict[str, Any]) -> None:
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32)
    other = Model.from_base(clip, spec["classes"], spec["template"], tokenizer=AutoTokenizer.from_pretrained(base))
    torch.testing.assert_close(other.classifier.base, model.classifier.base)
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_saving_with_fp16_residual(model: Model, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path, residual_dtype=torch.float16)
    loaded = Model.from_pretrained(tmp_path).classifier.residual
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, model.classifier.residual, atol=2e-3, rtol=1e-3)
    with pytest.raises(ConfigurationError, match="float16"):
        model.save_pretrained(tmp_path, residual_dtype=torch.int8)


def test_image_side_and_enhanced_base_round_trip(
    base: str, spec: dict[str, Any], pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    image_side = random_residual(Model.from_base(base, spec["classes"], residual_side="image"))
    image_side.save_pretrained(tmp_path / "i")
    assert torch.equal(
        Model.from_pretrained(tmp_path / "i")(pixel_values=pixel_values).logits,
        image_side(pixel_values=pixel_values).logits,
    )
    enhanced = random_residual(Model.from_base(base, spec["classes"]))
    enhanced.classifier.shift = torch.randn_like(enhanced.classifier.base)
    enhanced.save_pretrained(tmp_path / "e")
    loaded = Model.from_pretrained(tmp_path / "e")
    assert torch.equal(loaded(pixel_values=pixel_values).logits, enhanced(pixel_values=pixel_values).logits)
    assert torch.equal(loaded.zero_shot_logits(pixel_values), enhanced.zero_shot_logits(pixel_values))


# ---------------------------------------------------------------------- arguments of from_pretrained


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    random_residual(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("loader", [Model, AutoModelForImageClassification])
def test_arguments_that_ask_for_nothing_are_taken(saved: Path, loader: Any) -> None:
    names = [
        "ignore_mismatched_sizes", "key_mapping", "tp_plan", "tp_size", "device_mesh", "from_tf", "from_flax",
        "state_dict", "variant", "mirror", "use_kernels", "max_memory", "weights_only", "output_attentions",
    ]  # fmt: skip
    no_value = ["gguf_file", "quantization_config", "device_map", "token", "cache_dir", "revision", "dtype"]
    assert loader.from_pretrained(saved, **dict.fromkeys(names, False)).classifier.residual.any()
    assert loader.from_pretrained(saved, **dict.fromkeys([*names, *no_value])).classifier.residual.any()


@pytest.mark.parametrize(
    "options",
    [{"ignore_mismatched_sizes": True}, {"key_mapping": {"a": "b"}}, {"tp_plan": "auto"}, {"variant": "fp16"}],
)
def test_arguments_that_do_not_apply_are_named(saved: Path, options: dict[str, Any]) -> None:
    for loader in (Model, AutoModelForImageClassification):
        with pytest.raises(TypeError, match=f"unexpected arguments: {next(iter(options))}="):
            loader.from_pretrained(saved, **options)
    with pytest.raises(TypeError, match="unexpected arguments: 3"):
        Model.from_pretrained(saved, 3)


def test_the_official_script_loads_an_artifact(saved: Path, model: Model) -> None:
    """As transformers' run_image_classification.py does, with a dataset of the same classes."""
    labels = model.class_names
    options: dict[str, Any] = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(
        saved, num_labels=len(labels), label2id={label: str(i) for i, label in enumerate(labels)},
        id2label={str(i): label for i, label in enumerate(labels)}, finetuning_task="image-classification", **options,
    )  # fmt: skip
    loaded = AutoModelForImageClassification.from_pretrained(
        saved, from_tf=False, config=config, ignore_mismatched_sizes=False, **options
    )
    assert loaded.class_names == labels
    config.id2label = dict(enumerate(reversed(labels)))
    with pytest.raises(ConfigurationError, match="differs from the artifact's in id2label"):
        AutoModelForImageClassification.from_pretrained(saved, config=config)


def test_only_some_values_of_the_config_can_be_given(saved: Path) -> None:
    for loader in (Model, AutoModelForImageClassification):
        loaded = loader.from_pretrained(saved, alpha=0.25, return_dict=False)
        assert loaded.classifier.alpha == loaded.config.alpha == 0.25
        assert not loaded.config.return_dict
        with pytest.raises(ConfigurationError, match="`alpha`"):
            loader.from_pretrained(saved, alpha="much")
    for name, value in (
        ("logit_scale", 3.0), ("id2label", {0: "x", 1: "y"}), ("num_labels", 7), ("templates", ["a {}."]),
        ("projection_dim", 5), ("residual_side", "image"), ("base_fingerprint", {}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name}=.*from_base"):
            Model.from_pretrained(saved, **{name: value})
        with pytest.raises(
            ConfigurationError, match="differs from the artifact's"
        ):  # the Auto class put it in a config
            AutoModelForImageClassification.from_pretrained(saved, **{name: value})


# ---------------------------------------------------------------------- nothing is saved that does not load


def test_one_string_a_class_is_one_sentence(base: str, pixel_values: torch.Tensor, tmp_path: Path) -> None:
    sentences = {"cat": "A cat that purrs.", "dog": "A dog that barks."}
    model = random_residual(Model.from_base(base, list(sentences), class_descriptions=sentences))
    assert model.class_prompts() == [[sentence] for sentence in sentences.values()]
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"id2label": {0: "a", 1: "b"}},
        {"templates": ["a sketch of a {}."]},
        {"templates": ["no place for the name"]},
        {"prompt_names": {"mammal": "beast"}},
        {"prompt_average": "normalized"},
        {"projection_dim": 7},
        {"base_fingerprint": None},
        {"base_model_name_or_path": None},
        {"metrics": {"confusion": object()}},
    ],
)
def test_what_would_not_load_is_not_saved(model: Model, saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    for name, value in change.items():
        setattr(model.config, name, value)
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ArtifactError):
            model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}  # no half of it, nothing left over


def test_saving_does_not_load_the_base_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loading in ("load_base", "load_image_tower"):
        monkeypatch.setattr(base_model, loading, lambda *args, **options: pytest.fail("loaded"))
    model.save_pretrained(tmp_path)


def test_numbers_of_numpy_and_torch_are_saved(model: Model, tmp_path: Path) -> None:
    import numpy as np

    model.config.metrics = {"accuracy": np.float32(0.5), "confusion": np.arange(2), "loss": torch.tensor(0.25)}
    model.save_pretrained(tmp_path)
    metrics = json.loads((tmp_path / "config.json").read_text())["metrics"]
    assert metrics == {"accuracy": 0.5, "confusion": [0, 1], "loss": 0.25}
