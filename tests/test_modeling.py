"""The model: equal to CLIP at zero residual, frozen base, round trips through every loader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forge, random_residual, tiny_config, tiny_images
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
    TaskResTrainer,
    TaskResTrainingArguments,
    base_model,
)
from taskres_hf.errors import ArtifactError, BaseMismatchError, BaseModelError, ClassNamesError, ConfigurationError

Model = TaskResCLIPForImageClassification


def test_zero_residual_equals_clip(model: Model, base: str, pixel_values: torch.Tensor) -> None:
    tokens = AutoTokenizer.from_pretrained(base)(
        [prompts[0] for prompts in model.class_prompts()], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(base, dtype=torch.float32)(pixel_values=pixel_values, **tokens)
    logits = model(pixel_values=pixel_values).logits
    assert (logits - expected.logits_per_image).abs().max() <= 1e-4
    assert torch.equal(logits, model.zero_shot_logits(pixel_values))


def test_embeddings_and_pixels_give_the_same(model: Model, pixel_values: torch.Tensor) -> None:
    random_residual(model)
    embeds = model.get_image_features(pixel_values)
    assert embeds.shape == (8, model.config.projection_dim)
    torch.testing.assert_close(model(image_embeds=embeds).logits, model(pixel_values=pixel_values).logits)
    torch.testing.assert_close(model(image_embeds=3 * embeds).logits, model(image_embeds=embeds).logits)


def test_ensemble_is_the_raw_mean(base: str, spec: dict[str, Any]) -> None:
    templates = ["a photo of a {}.", "art of the {}."]
    rows = [Model.from_base(base, spec["classes"], template).classifier.base for template in templates]
    ensemble = Model.from_base(base, spec["classes"], templates)
    torch.testing.assert_close(ensemble.classifier.base, (rows[0] + rows[1]) / 2, atol=1e-4, rtol=1e-4)
    normalized = Model.from_base(base, spec["classes"], templates, prompt_average="normalized")
    assert not torch.allclose(normalized.classifier.base, ensemble.classifier.base, atol=1e-3)


def test_only_the_residual_trains_and_the_base_stays(model: Model, pixel_values: torch.Tensor) -> None:
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.residual"]
    before = copy.deepcopy(model.clip.state_dict())
    model.train()
    assert model.training
    assert not any(module.training for module in model.clip.modules())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(pixel_values=pixel_values, labels=torch.arange(8)).loss
    loss.backward()
    optimizer.step()
    assert model(pixel_values=pixel_values, labels=torch.arange(8)).loss < loss
    assert all(torch.equal(before[name], value) for name, value in model.clip.state_dict().items())


def test_output_is_what_transformers_gives(model: Model, pixel_values: torch.Tensor) -> None:
    output = model(pixel_values=pixel_values, labels=torch.zeros(8, dtype=torch.long), output_hidden_states=True)
    assert set(output.keys()) == {"loss", "logits", "hidden_states"}
    assert isinstance(model(pixel_values=pixel_values, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either pixel_values or image_embeds"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "image_embeds": torch.zeros(1, 192)}, "both or neither"),
        ({"image_embeds": torch.zeros(1, 7)}, "192 columns"),
        ({"image_embeds": torch.ones(1, 192), "labels": torch.tensor([8])}, "from 0 to 7; got 8"),
        ({"image_embeds": torch.ones(1, 192), "labels": torch.tensor([-1])}, "got -1"),
    ],
)
def test_bad_inputs(model: Model, inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        model(**inputs)


# ---------------------------------------------------------------------- round trips


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


# ---------------------------------------------------------------------- what must be refused


def test_a_base_that_is_no_dual_encoder(tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(BaseModelError, match=r"'vit'.*Supported"):
        Model.from_base(str(tmp_path), spec["classes"])


def test_an_artifact_as_base(trained: Path, spec: dict[str, Any]) -> None:
    with pytest.raises(BaseModelError, match="from_pretrained"):
        Model.from_base(str(trained), spec["classes"])


def test_bad_classes_before_anything_is_loaded() -> None:
    with pytest.raises(ClassNamesError):
        Model.from_base("there/is-no-such-model", ["one"])


def test_another_base_is_noticed(model: Model, base: str, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path / "a")
    other = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        other.text_projection.weight.mul_(1.05).add_(0.01)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((Path(base) / name).read_bytes())
    with pytest.raises(BaseMismatchError, match="accept_base_mismatch"):
        Model.from_pretrained(tmp_path / "a", base_model=str(tmp_path / "other"))
    forced = Model.from_pretrained(tmp_path / "a", base_model=str(tmp_path / "other"), accept_base_mismatch=True)
    assert torch.equal(forced.classifier.residual, model.classifier.residual)


@pytest.mark.parametrize("change", ["order", "name", "template"])
def test_edited_classes_are_noticed(model: Model, tmp_path: Path, change: str) -> None:
    random_residual(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    labels = config["id2label"]
    if change == "order":
        labels["0"], labels["1"] = labels["1"], labels["0"]
    elif change == "name":
        labels["0"] = "wolf"
    else:
        config["templates"] = ["a sketch of a {}."]
    config["label2id"] = {name: int(index) for index, name in labels.items()}
    forge(tmp_path, **config)
    with pytest.raises(BaseMismatchError, match="class names, their order or the templates"):
        Model.from_pretrained(tmp_path)


def test_a_lost_base_folder_says_so(model: Model, base: str, tmp_path: Path) -> None:
    random_residual(model)
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(BaseModelError, match="base_model="):
        Model.from_pretrained(tmp_path / "a")
    assert Model.from_pretrained(tmp_path / "a", base_model=base).class_names == model.class_names


def test_a_bare_model_is_refused() -> None:
    with pytest.raises(BaseModelError, match="from_base"):
        Model(TaskResConfig())


def test_head_stays_on_zero_shot_when_training_is_skipped(model: Model, splits: Any) -> None:
    metrics = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), eval_dataset=splits["test"]).evaluate()
    assert metrics["accuracy"] == metrics["zero_shot_accuracy"]
    assert metrics["accuracy"] == pytest.approx(0.4151, abs=5e-4)  # as the checkpoint's card says


def test_classifiers_are_swapped_on_a_live_model(model: Model, base: str, pixel_values: torch.Tensor) -> None:
    other = Model.from_base(base, ["cat", "dog", "fish"])
    expected = other(pixel_values=pixel_values).logits
    model.use_classifier(other)
    assert torch.equal(model(pixel_values=pixel_values).logits, expected)
    assert model.class_names == ["cat", "dog", "fish"]
    other.config.base_model_name_or_path = "another/base"
    with pytest.raises(ConfigurationError, match="different bases"):
        Model.from_base(base, ["a", "b"]).use_classifier(other)


def test_each_classifier_brings_its_own_strength(model: Model, base: str) -> None:
    other = random_residual(Model.from_base(base, ["cat", "dog", "fish"]))
    other.strength = 0.5
    images = torch.randn(4, 192)
    expected = other(image_embeds=images).logits
    model.use_classifier(other)
    assert model.strength == 0.5
    assert torch.equal(model(image_embeds=images).logits, expected)
    model.strength = 0.0
    assert torch.equal(model(image_embeds=images).logits, model.zero_shot_logits(image_embeds=images))


def test_a_class_bias_moves_with_the_model(model: Model) -> None:
    model.classifier.set_weight(torch.randn(8, 192), class_bias=torch.ones(8))
    model.to("meta")
    assert model.classifier.class_bias is not None
    assert model.classifier.class_bias.device.type == "meta"


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


# ---------------------------------------------------------------------- one home for each fact


def test_head_and_config_say_the_same(model: Model, tmp_path: Path) -> None:
    random_residual(model)
    model.classifier.shift = torch.ones_like(model.classifier.base)
    model.config.enhanced_base, model.config.metrics = {"epochs": 50}, {"accuracy": 1.0}
    model.classifier.alpha = 0.75
    assert model.config.alpha == 0.75
    model.config.alpha = 1.25
    assert model.classifier.alpha == 1.25
    model.save_pretrained(tmp_path / "enhanced")
    loaded = Model.from_pretrained(tmp_path / "enhanced")
    assert loaded.config.enhanced_base == {"epochs": 50}
    loaded.classifier.reset()
    assert loaded.config.enhanced_base is loaded.config.metrics is None
    loaded.save_pretrained(tmp_path / "reset")
    config = json.loads((tmp_path / "reset" / "config.json").read_text())
    assert not config.get("enhanced_base")
    assert not config.get("metrics")
    assert config["alpha"] == 1.25
    assert "facts" not in config


def test_a_shift_taken_away_is_not_told_of(model: Model, tmp_path: Path) -> None:
    model.config.enhanced_base = {"epochs": 50}
    model.save_pretrained(tmp_path)  # without a shift
    assert not json.loads((tmp_path / "config.json").read_text()).get("enhanced_base")


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


# ---------------------------------------------------------------------- other families, other labels


def test_zero_shot_logits_take_what_forward_takes(base: str) -> None:
    from transformers import AutoModel

    config = tiny_config("siglip2")
    config.text_config.vocab_size = 8192
    torch.manual_seed(0)
    siglip2 = AutoModel.from_config(config)
    other = Model.from_base(siglip2, ["cat", "dog"], tokenizer=AutoTokenizer.from_pretrained(base))
    inputs = tiny_images("siglip2")
    assert torch.equal(other.zero_shot_logits(**inputs), other(**inputs).logits)
    embeds = other.get_image_features(**inputs)
    assert torch.equal(other.zero_shot_logits(image_embeds=embeds), other(**inputs).logits)
    with pytest.raises(ConfigurationError, match="either pixel_values or image_embeds"):
        other.zero_shot_logits()


def test_probabilities_as_labels(model: Model) -> None:
    embeds = torch.randn(8, 192)
    ids = torch.arange(8)
    soft = torch.nn.functional.one_hot(ids, 8).float()
    hard = model(image_embeds=embeds, labels=ids).loss
    torch.testing.assert_close(model(image_embeds=embeds, labels=soft).loss, hard)
    with pytest.raises(ConfigurationError, match="multi-label"):
        model(image_embeds=embeds, labels=soft + soft.flip(0))


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_pictures_that_are_not_numbers_get_no_answer(model: Model, pixel_values: torch.Tensor, pixel: float) -> None:
    spoilt = pixel_values.clone()
    spoilt[3] = pixel
    with pytest.raises(ConfigurationError, match="1 of 8 pictures"):
        model(pixel_values=spoilt)


def test_prompts_cut_to_the_same_tokens_are_named(base: str) -> None:
    long = "long " * 40
    with pytest.warns(UserWarning, match=r"1 pair of classes' prompts.*cat.*dog"):
        Model.from_base(base, [f"{long}cat", f"{long}dog", "bird"])


def test_a_classifier_remembers_the_commit_of_a_base_already_loaded(hub: Any, base: str, tmp_path: Path) -> None:
    commit = hub.add_folder("tester/tiny-clip", base)
    clip = CLIPModel.from_pretrained("tester/tiny-clip", dtype=torch.float32)
    other = random_residual(Model.from_base(clip, ["cat", "dog"]))
    assert other.config.base_model_revision == commit
    other.save_pretrained(tmp_path / "a")
    words = json.loads((Path(base) / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    hub.repos["models/tester/tiny-clip"].commit({"tokenizer.json": json.dumps(words).encode()}, "main", "swap")
    loaded = Model.from_pretrained(tmp_path / "a", base_model=clip)  # the tokenizer of the pinned commit, not of main
    assert torch.equal(loaded.classifier.weight(), other.classifier.weight())
    assert loaded.tokenizer("cat")["input_ids"] == other.tokenizer("cat")["input_ids"]
