"""Dual encoders: every family's embeddings and logits, and what is said of a base that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from transformers import AutoConfig, CLIPModel, CLIPTextModel, CLIPVisionModel

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.base_model import load_image_tower
from taskres_hf.embedding.engines import onednn as linear
from taskres_hf.encoders import BaseSource, family_of, image_features, pooled
from taskres_hf.errors import BaseModelError


def test_other_models_are_refused() -> None:
    with pytest.raises(BaseModelError, match="'bert'"):
        family_of(AutoConfig.for_model("bert"))


def test_the_image_tower_alone_is_the_same(
    base: str, pixel_values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    whole = CLIPModel.from_pretrained(base, dtype=torch.float32)
    side = load_image_tower(BaseSource(base))
    assert side is not None
    tower = side.base
    with torch.no_grad():
        expected = pooled(image_features(whole, {"pixel_values": pixel_values}))
        found = pooled(image_features(tower, {"pixel_values": pixel_values}))
    assert torch.equal(found, expected)
    modules = list(tower.modules())
    assert len({id(module._forward_hooks) for module in modules}) == len(modules)  # a hook on one layer is on one layer
    assert len({id(parameter) for parameter in tower.parameters()}) == len(list(tower.parameters()))


NAMES = ["cat", "dog", "red fish"]


def copied(base: str, folder: Path, without: tuple[str, ...] = (), **files: bytes) -> Path:
    """The shipped checkpoint's files, some left out, some replaced (`__` stands for the dot in a name)."""
    folder.mkdir()
    for file in Path(base).iterdir():
        if file.name not in without:
            shutil.copy(file, folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


CASES: dict[str, tuple[tuple[str, ...], dict[str, bytes], str]] = {
    "pickle": (
        ("model.safetensors",),
        {"pytorch_model__bin": b"\x80\x04cposix\nsystem\n."},
        "run code.*save_pretrained",
    ),
    "tensorflow": (("model.safetensors",), {"tf_model__h5": b"x"}, "tf_model.h5"),
    "no weights": (("model.safetensors",), {}, r"no model\.safetensors"),
    "open_clip": (("config.json",), {"open_clip_config__json": b"{}"}, r"open_clip_config\.json .* damaged"),
    "open_clip config": (("config.json",), {"config__json": b'{"model_cfg": {}}'}, "open_clip checkpoint"),
    "diffusers": (("config.json", "model.safetensors"), {"model_index__json": b"{}"}, "diffusers pipeline"),
    "sentence-transformers": (("config.json",), {"modules__json": b"[]"}, "0_CLIPModel"),
    "peft": (("config.json",), {"adapter_config__json": b"{}"}, "PEFT adapter"),
    "timm": (("config.json",), {"config__json": b'{"architecture": "x", "pretrained_cfg": {}}'}, "timm"),
    "text": (("config.json",), {"config__json": b'{"model_type": "bert", "vocab_size": 9}'}, "text-only model"),
    "image": (("config.json",), {"config__json": b'{"model_type": "vit", "image_size": 9}'}, "image model alone"),
    "other": (
        ("config.json",),
        {"config__json": b'{"model_type": "llava", "text_config": {}, "vision_config": {}}'},
        "another family",
    ),
    "broken json": (("config.json",), {"config__json": b"{"}, r"config\.json .* damaged"),
    "json list": (("config.json",), {"config__json": b"[]"}, r"config\.json .* damaged"),
    "no config": (("config.json",), {}, r"no config\.json; the folder holds"),
    "truncated": ((), {"model__safetensors": b"12345678901234567890"}, "cannot be loaded"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_base_is_named(base: str, tmp_path: Path, case: str) -> None:
    without, files, message = CASES[case]
    with pytest.raises(BaseModelError, match=message):
        Model.from_base(str(copied(base, tmp_path / "base", without, **files)), NAMES)


def test_one_tower_alone(base: str, tmp_path: Path) -> None:
    for kind, words in ((CLIPVisionModel, "image model alone"), (CLIPTextModel, "text-only")):
        kind.from_pretrained(base).save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(BaseModelError, match=words):
            Model.from_base(str(tmp_path / kind.__name__), NAMES)
    vision = (tmp_path / "CLIPVisionModel" / "model.safetensors").read_bytes()
    with pytest.raises(BaseModelError, match=r"lacks .* weights.*random"):  # one tower, the whole model's config
        Model.from_base(str(copied(base, tmp_path / "half", model__safetensors=vision)), NAMES)


def test_weights_of_another_size(base: str, tmp_path: Path) -> None:
    config = json.loads((Path(base) / "config.json").read_text())
    config["text_config"]["hidden_size"] = 96
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        Model.from_base(str(copied(base, tmp_path / "base", config__json=json.dumps(config).encode())), NAMES)


def test_places_that_are_none(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for place, words in (
        ("empty", "it is empty"), ("./gone", "does not exist"), (str(tmp_path / "gone"), "does not exist"),
        (f"{base}/model.safetensors", "is a file"),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match=words):
            Model.from_base(place, NAMES)


@pytest.mark.parametrize("case", ["pickle", "open_clip", "diffusers", "no config"])
def test_repositories_likewise(hub: HubServer, base: str, tmp_path: Path, case: str) -> None:
    without, files, message = CASES[case]
    hub.add_folder("tester/other", copied(base, tmp_path / "base", without, **files))
    with pytest.raises(BaseModelError, match=message.split(";")[0]):
        Model.from_base("tester/other", NAMES, cache_dir=str(tmp_path / "cache"))


def test_a_repository_that_is_not_there_stays_the_hubs_error(hub: HubServer) -> None:
    with pytest.raises(OSError, match="tester/gone"):
        Model.from_base("tester/gone", NAMES)


def test_a_file_of_a_source(base: str) -> None:
    source = BaseSource(base)
    assert source.file("config.json") == str(Path(base) / "config.json")
    assert source.file("no-such.json") is None


@pytest.mark.parametrize("kind", ["scale", "scale nan", "text nan", "image inf"])
@pytest.mark.parametrize("loaded", [False, True])
def test_weights_that_are_not_numbers(base: str, tmp_path: Path, kind: str, loaded: bool) -> None:
    clip: Any = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        if kind.startswith("scale"):
            clip.logit_scale.fill_(80.0 if kind == "scale" else float("nan"))
        elif kind == "text nan":
            clip.text_projection.weight[3, 4] = float("nan")
        else:
            clip.vision_model.encoder.layers[1].mlp.fc1.weight[3, 4] = float("inf")
    message = {"scale": "logit_scale", "scale nan": "NaN.*logit_scale", "text nan": "NaN.*text_projection"}
    clip.save_pretrained(copied(base, tmp_path / "base"))
    with pytest.raises((BaseModelError, ValueError), match=message.get(kind, "infinite.*layers.1.mlp")):
        Model.from_base(clip if loaded else str(tmp_path / "base"), NAMES)
