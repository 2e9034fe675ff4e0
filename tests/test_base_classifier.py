"""What identifies a base, and what does not."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual
from test_encoders import NAMES, copied
from transformers import CLIPModel

from taskres_hf import ClassifierPool
from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.base_classifier import check_fingerprint, fingerprint, image_sides_differ, image_sketch, same_base
from taskres_hf.errors import BaseMismatchError


def changed(base: str, folder: Path, edit: Any) -> str:
    """The shipped checkpoint with other weights."""
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        edit(clip)
    clip.save_pretrained(copied(base, folder))
    return str(folder)


def test_one_base_in_every_dtype_and_by_every_way(base: str, tmp_path: Path) -> None:
    first = Model.from_base(base, NAMES)
    random_residual(first).save_pretrained(tmp_path / "a")
    stored = first.config.base_fingerprint
    for other in (
        Model.from_base(base, NAMES, dtype=torch.bfloat16),
        Model.from_base(base, NAMES, dtype="auto"),
        Model.from_base(base, NAMES, device_map="cpu", dtype=torch.bfloat16),
        Model.from_base(CLIPModel.from_pretrained(base, dtype=torch.bfloat16), NAMES),
        Model.from_base(CLIPModel.from_pretrained(base, dtype=torch.float16), NAMES),
    ):
        assert same_base(other.config.base_fingerprint, stored)
        assert torch.equal(other.classifier.base, first.classifier.base)  # t is made in fp32, whatever runs
        assert other.classifier.logit_scale == first.classifier.logit_scale
    assert not same_base(Model.from_base(base, ["cat", "dog", "owl"]).config.base_fingerprint, stored)
    for options in ({}, {"dtype": "bfloat16"}, {"text_tower": True}, {"text_tower": True, "dtype": "float16"}):
        loaded = Model.from_pretrained(tmp_path / "a", **options)
        assert torch.equal(loaded.classifier.weight(), first.classifier.weight())
        assert loaded.classifier.logit_scale == first.classifier.logit_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cached", [True, False])
def test_a_base_loaded_in_half_precision_saves_and_loads(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cached: bool
) -> None:
    clip = CLIPModel.from_pretrained(base, dtype=dtype)
    model = random_residual(Model.from_base(clip, NAMES))
    model.save_pretrained(tmp_path / "a")
    if not cached:
        monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "empty-cache"))
    for options in ({}, {"base_model": clip}, {"dtype": torch.float32}, {"device_map": "cpu"}):
        loaded = Model.from_pretrained(tmp_path / "a", **options)
        assert torch.equal(loaded.classifier.weight(), model.classifier.weight())


def test_a_base_changed_in_memory_is_taken_as_it_is(base: str, tmp_path: Path) -> None:
    clip = CLIPModel.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        clip.text_projection.weight.mul_(1.1)
    model = random_residual(Model.from_base(clip, NAMES))
    assert not torch.allclose(model.classifier.base, Model.from_base(base, NAMES).classifier.base, rtol=0.05)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="text tower's weights differ"):
        Model.from_pretrained(tmp_path / "a")
    assert Model.from_pretrained(tmp_path / "a", base_model=clip).class_names == NAMES


@pytest.mark.parametrize(
    ("setting", "value"), [("hidden_act", "gelu"), ("layer_norm_eps", 0.1), ("num_attention_heads", 1)]
)
def test_a_base_whose_image_tower_is_told_otherwise_is_another(
    base: str, tmp_path: Path, setting: str, value: Any
) -> None:
    """As where a config.json lost its activation: no weight shows it, and neither does the text side."""
    edited = shutil.copytree(base, tmp_path / "base")
    model = random_residual(Model.from_base(str(edited), NAMES))
    model.save_pretrained(tmp_path / "a")
    config = json.loads((edited / "config.json").read_text())
    config["vision_config"][setting] = value
    for text_tower in (False, True):
        Model.from_pretrained(tmp_path / "a", text_tower=text_tower)
    (edited / "config.json").write_text(json.dumps(config))
    for text_tower in (False, True):
        with pytest.raises(BaseMismatchError, match="image tower"):
            Model.from_pretrained(tmp_path / "a", text_tower=text_tower)
    with pytest.raises(BaseMismatchError, match="image tower"):
        Model.from_pretrained(tmp_path / "a", base_model=CLIPModel.from_pretrained(edited))
    with pytest.raises(BaseMismatchError, match="image tower"):
        ClassifierPool(str(edited), {"a": tmp_path / "a"})
    assert ClassifierPool(base, {"a": tmp_path / "a"}).names == ["a"]
    Model.from_pretrained(tmp_path / "a", accept_base_mismatch=True)


EDITS = {
    "one layer of the image tower": (
        lambda clip: clip.vision_model.encoder.layers[2].mlp.fc1.weight.mul_(1.05), "image tower",
    ),
    "the image tower trained further": (
        lambda clip: [p.add_(2e-3 * p.abs().mean() * torch.randn_like(p)) for p in clip.vision_model.parameters()],
        "image tower",
    ),
    "the image projection": (lambda clip: clip.visual_projection.weight.copy_(torch.randn(192, 192)), "image tower"),
    "the text side by one per cent": (lambda clip: clip.text_projection.weight.mul_(1.01), "text tower's weights"),
    "the logit scale": (lambda clip: clip.logit_scale.add_(0.2), "logit scale"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("text_tower", [False, True])
def test_what_changed_in_a_base_is_named(base: str, tmp_path: Path, edit: str, text_tower: bool) -> None:
    folder = copied(base, tmp_path / "base")
    random_residual(Model.from_base(str(folder), NAMES)).save_pretrained(tmp_path / "a")
    change, words = EDITS[edit]
    torch.manual_seed(0)
    other = changed(base, tmp_path / "other", change)
    shutil.copy(Path(other) / "model.safetensors", folder)  # the base at that path is replaced
    for _ in range(2):  # the second time t is known
        with pytest.raises(BaseMismatchError, match=words):
            Model.from_pretrained(tmp_path / "a", text_tower=text_tower)
    dtype = torch.float32 if "further" in edit or "per cent" in edit else torch.bfloat16
    with pytest.raises(BaseMismatchError, match=words):
        Model.from_pretrained(tmp_path / "a", base_model=CLIPModel.from_pretrained(other, dtype=dtype))
    assert Model.from_pretrained(tmp_path / "a", accept_base_mismatch=True).class_names == NAMES


def test_another_tokenizer_is_named(base: str, tmp_path: Path) -> None:
    folder = copied(base, tmp_path / "base")
    random_residual(Model.from_base(str(folder), NAMES)).save_pretrained(tmp_path / "a")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseMismatchError, match="tokenizer makes other tokens"):
        Model.from_pretrained(tmp_path / "a")


def test_sketches_of_image_towers(base: str) -> None:
    weights = CLIPModel.from_pretrained(base, dtype=torch.float32).state_dict()
    exact = image_sketch(weights)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = {name: weight.to(dtype) for name, weight in weights.items()}
        assert not image_sides_differ(exact, image_sketch(rounded, str(dtype).removeprefix("torch.")))
    one = copy.copy(weights)
    name = "vision_model.encoder.layers.5.self_attn.v_proj.weight"
    one[name] = torch.randn_like(weights[name]) * weights[name].std()
    assert image_sides_differ(exact, image_sketch(one))
    assert image_sides_differ(image_sketch(one, "bfloat16"), exact)
    assert image_sketch({name: torch.zeros(3, dtype=torch.uint8)}) is None  # quantized: it cannot be told
    assert not image_sides_differ(exact, None)


@pytest.mark.parametrize(
    ("dtype", "text", "image"), [("float32", 2e-3, 1e-4), ("float16", 5e-3, 2e-3), ("bfloat16", 2e-2, 1e-2)]
)
def test_how_much_may_differ(dtype: str, text: float, image: float) -> None:
    table, prompts = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), [["a"], ["b"], ["c"]]

    def made(longer: float, moved: float) -> dict[str, Any]:
        tower = {"sketch": [1.0 + moved], "weights": 1, "dtype": dtype}
        return fingerprint(table * (1 + longer), prompts, "raw", tower, dtype=dtype)

    stored = made(0, 0)
    check_fingerprint(made(0.8 * text, 0.8 * image), stored, "base")
    with pytest.raises(BaseMismatchError, match="text embeddings"):
        check_fingerprint(made(1.25 * text, 0), stored, "base")
    with pytest.raises(BaseMismatchError, match="image tower"):
        check_fingerprint(made(0, 1.25 * image), stored, "base")
