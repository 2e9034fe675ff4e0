"""Every fast way against the slow one, on real pictures, with odd sizes and modes."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from support import TINY_FAMILIES, tiny_config, tiny_images
from torch import Tensor
from transformers import AutoModel

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.base_model import load_image_tower
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import choose as engines
from taskres_hf.embedding.engines.choose import make_engine
from taskres_hf.embedding.engines.onednn import onednn_int8
from taskres_hf.embedding.engines.rewriting import int8_obstacle
from taskres_hf.encoders import FAMILIES, BaseSource, encode_images, picture_size
from taskres_hf.errors import BaseModelError, ConfigurationError, ImageError, MissingExtraError

Model = TaskResCLIPForImageClassification
COMBINATIONS = [
    ("torch", "bf16"), ("torch", "int8"), ("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32"),
]  # fmt: skip


def _needs(engine: str, precision: str = "") -> None:
    if engine != "torch":
        pytest.importorskip(engine, reason=f"the optional engine {engine} is not installed")
    if precision == "int8" and onednn_int8() is None:
        pytest.skip("this processor or this torch has no int8 products")


@pytest.fixture(scope="module")
def image_tower(base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base of which only the image tower was loaded; what this file converts of it is converted from there, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKRES_CACHE", str(tmp_path_factory.mktemp("converted")))
        tower = load_image_tower(BaseSource(base))
        assert tower is not None
        size = tower.base.config.vision_config.image_size
        for engine in ("openvino", "onnxruntime"):
            if importlib.util.find_spec(engine):
                make_engine(tower.base, engine, "fp32")({"pixel_values": torch.zeros(1, 3, size, size)})
        yield tower.base


@pytest.fixture
def tiny_clip() -> Any:
    """A CLIP that is converted at once."""
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config("clip")).eval()


@torch.no_grad()
@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
def test_engines_take_pixels_of_any_dtype(tiny_clip: Any, engine: str) -> None:
    _needs(engine)
    made = make_engine(tiny_clip, engine, "fp32")
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.uint8):
        pixels = (torch.rand(2, 3, 32, 32) * 9).to(dtype)
        expected = tiny_clip.get_image_features(pixels.float()).pooler_output
        torch.testing.assert_close(made({"pixel_values": pixels}), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
def test_threads_that_ask_at_once_get_their_own_embeddings(tiny_clip: Any, engine: str) -> None:
    _needs(engine)
    made, batches = make_engine(tiny_clip, engine, "fp32"), [torch.randn(size, 3, 32, 32) for size in (1, 2, 3, 5) * 25]
    made.get_ready()

    @torch.no_grad()
    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return made({"pixel_values": pixels})

    with ThreadPoolExecutor(8) as pool:
        for pixels, found in zip(batches, pool.map(embed, batches), strict=True):
            expected = tiny_clip.get_image_features(pixels).pooler_output
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("image_tower")
@pytest.mark.parametrize(("engine", "precision"), COMBINATIONS)
def test_engines_give_the_embeddings_of_the_model(model: Model, splits: Any, engine: str, precision: str) -> None:
    _needs(engine, precision)
    pictures = [row["image"].convert("RGB") for row in splits["test"].select(range(40))]
    expected = Embedder(model.clip, model.image_processor, exact_preprocessing=True)(pictures)
    for count in (40, 7, 1):  # any batch size
        found = Embedder(model.clip, model.image_processor, engine, precision)(pictures[:count])
        if precision == "fp32":
            torch.testing.assert_close(found, expected[:count], atol=2e-3, rtol=1e-3)
        mean = expected.mean(dim=0)
        assert F.cosine_similarity(found - mean, expected[:count] - mean).min() >= 0.98
    before = {name: value.dtype for name, value in model.clip.state_dict().items()}
    assert set(before.values()) == {torch.float32}  # the model itself is left as it was


@pytest.mark.parametrize(("engine", "precision"), COMBINATIONS)
def test_engines_need_no_text_tower(
    image_tower: Any, model: Model, pixel_values: Tensor, engine: str, precision: str
) -> None:
    _needs(engine, precision)
    found = make_engine(image_tower, engine, precision)({"pixel_values": pixel_values})
    expected = model.get_image_features(pixel_values)
    assert F.cosine_similarity(found, expected).min() > 0.999
    assert make_engine(model.clip, engine, precision)({"pixel_values": pixel_values}).equal(found)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_engines_give_the_embeddings_of_every_family(family: str) -> None:
    torch.manual_seed(0)
    base, inputs = AutoModel.from_config(tiny_config(family)).eval(), tiny_images(family)
    with torch.no_grad():
        expected = encode_images(base, inputs)
        for engine, precision in (("torch", "fp32"), *COMBINATIONS):
            if engine != "torch" and (not FAMILIES[family].clip_layers or not importlib.util.find_spec(engine)):
                continue
            if precision == "int8" and int8_obstacle(base):
                continue
            found = make_engine(base, engine, precision)(inputs)
            tolerance = 1e-4 if precision == "fp32" else 0.05 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=f"{engine} {precision}")


@pytest.mark.usefixtures("image_tower")
@pytest.mark.parametrize(("engine", "precision"), COMBINATIONS)
def test_a_trained_classifier_is_as_good(model: Model, splits: Any, engine: str, precision: str) -> None:
    _needs(engine, precision)
    found = {}
    for choice in (("torch", "fp32"), (engine, precision)):
        model.classifier.reset()
        arguments = TaskResTrainingArguments(
            shots=8, on_short="ignore", disable_tqdm=True, engine=choice[0], precision=choice[1]
        )
        trainer = TaskResTrainer(model, arguments, splits["train"], splits["test"])
        trainer.train()
        found[choice] = trainer.evaluate()["accuracy"]
        assert model.config.training["engine"] == "-".join(choice)
    # 159 pictures: one is 0.6 points.
    assert abs(found["torch", "fp32"] - found[engine, precision]) <= 2.5 / 159


def test_the_automatic_choice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_engine(model.clip).name == "torch-fp32"  # a tower this small gains nothing
    monkeypatch.setattr(engines, "_LARGE", 1)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else real(name, *a))
    monkeypatch.setattr(engines, "is_faster", lambda dtype: False)
    assert make_engine(model.clip).name == "torch-fp32"
    monkeypatch.setattr(engines, "is_faster", lambda dtype: True)
    assert make_engine(model.clip).name == "torch-bf16"
    assert make_engine(model.clip, precision="fp32").name == "torch-fp32"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: real(name, *a))
    if real("openvino"):
        monkeypatch.setattr(engines, "onednn", lambda dtype: None)  # a torch that multiplies fp32 slowly
        assert make_engine(model.clip, precision="fp32").name == "openvino-fp32"
        assert make_engine(model.clip).name == "torch-bf16"
    half = make_engine(model.clip.to(torch.bfloat16))
    assert half.name == "torch-bfloat16"  # the dtype the user chose


def test_recipe_paper_is_exact_unless_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LARGE", 1)
    monkeypatch.setattr(engines, "is_faster", lambda dtype: True)
    for options, name in (({}, "torch-fp32"), ({"precision": "bf16"}, "torch-bf16")):
        arguments = TaskResTrainingArguments(recipe="paper", disable_tqdm=True, **options)
        assert TaskResTrainer(model, arguments).embedder.engine.name == name


def test_converted_towers_are_kept(tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs("openvino")
    import openvino

    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))
    saved: list[Path] = []
    real = openvino.save_model
    monkeypatch.setattr(openvino, "save_model", lambda model, file, **k: saved.append(file) or real(model, file, **k))
    for precision in ("fp32", "bf16"):
        make_engine(tiny_clip, "openvino", precision)(tiny_images("clip"))
        assert len(saved) == 1
    with torch.no_grad():
        tiny_clip.visual_projection.weight.mul_(2)
    make_engine(tiny_clip, "openvino", "fp32")(tiny_images("clip"))
    assert len(saved) == 2


def test_converting_reports_nothing_to_anyone(tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs("openvino")
    telemetry = pytest.importorskip("openvino_telemetry.main")
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))
    sent: list[Any] = []
    monkeypatch.setattr(telemetry.Telemetry, "send_event", lambda *event, **more: sent.append(event))
    monkeypatch.setattr(telemetry.TelemetrySender, "send", lambda *message: sent.append(message))
    make_engine(tiny_clip, "openvino", "fp32")(tiny_images("clip"))
    assert not sent


def test_what_does_not_exist(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="must be one of"):
        make_engine(model.clip, "tensorrt")
    with pytest.raises(ConfigurationError, match="fp32"):
        make_engine(model.clip, "onnxruntime", "bf16")
    with pytest.raises(ConfigurationError, match="engine='torch'"):
        make_engine(model.clip.to(torch.bfloat16), "openvino", "fp32")
    model.clip.float()
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"taskres_hf\[openvino\]"):
        make_engine(model.clip, "openvino", "fp32")


def test_a_damaged_converted_tower_is_made_again(
    tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _needs("openvino")
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))
    pictures = tiny_images("clip")
    expected = make_engine(tiny_clip, "openvino", "fp32")(pictures)
    file = next(tmp_path.rglob("*.bin"))
    content = file.read_bytes()
    middle = len(content) // 2
    for change in ("a byte", "no checksums", "half of it"):
        if change == "no checksums":
            (file.parent / "sha256.json").unlink()
        else:
            rest = content[middle + 1 :] if change == "a byte" else b""
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + rest)
        with pytest.warns(UserWarning, match="damaged"):
            found = make_engine(tiny_clip, "openvino", "fp32")(pictures)
        assert torch.equal(found, expected), change
        assert file.read_bytes() == content, change
        assert len(list(file.parent.parent.iterdir())) == 1, change  # nothing left over


def test_a_converted_tower_that_cannot_be_kept_runs(
    tiny_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _needs("openvino")
    pictures = tiny_images("clip")
    expected = make_engine(tiny_clip, "openvino", "fp32")(pictures)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        found = make_engine(tiny_clip, "openvino", "fp32")(pictures)
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------- image processors that leave sizes as they are


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
@pytest.mark.parametrize("scales", [True, False])
def test_a_processor_may_leave_sizes_to_the_pictures(
    scales: bool, engine: str, image_tower: Any, model: Model, splits: Any
) -> None:
    """Pictures that fit are embedded, though no probe picture fits; of what does not fit, all is said."""
    _needs(engine)
    high, wide = picture_size(image_tower)
    square = [splits["test"][row]["image"].convert("RGB").resize((wide, high)) for row in range(4)]
    settings = {"do_center_crop": False} | ({"size": {"shortest_edge": high}} if scales else {"do_resize": False})
    processor = type(model.image_processor).from_dict(model.image_processor.to_dict() | settings)
    embedder = Embedder(image_tower, processor, engine)
    found = embedder(square)
    assert embedder.engine.engine == engine
    torch.testing.assert_close(found, Embedder(image_tower, model.image_processor)(square), atol=1e-3, rtol=1e-3)
    longer = square[0].resize((wide + 16, high))
    told = f"takes pictures of {high} x {wide} pixels, not 3 x {high} x {wide + 16} .* or pictures of it"
    with pytest.raises(BaseModelError, match=told):
        embedder([longer, longer])
    with pytest.raises(ImageError, match=r"sizes of their own, here from .* and .* or give pictures of one size"):
        embedder([longer, square[1]])
    torch.testing.assert_close(embedder(square), found)  # goes on


def test_what_fails_at_the_right_size_is_told_as_it_is(model: Model, splits: Any) -> None:
    embedder = Embedder(model.clip, model.image_processor)
    embedder.get_ready()
    broken = patch.object(type(embedder.engine), "__call__", side_effect=RuntimeError("out of something"))
    with broken, pytest.raises(RuntimeError, match=r"^out of something$"):
        embedder([splits["test"][0]["image"].convert("RGB")])
    refuses = patch.object(embedder.preprocess, "_collated", side_effect=ValueError("no such picture"))
    with (
        refuses,
        pytest.raises(ImageError, match=r"Processor\w* cannot prepare pictures of .* numbers: no such picture"),
    ):
        embedder([splits["test"][0]["image"].convert("RGB")])
