"""Every fast way against the slow one, on real pictures, with odd sizes and modes."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from test_encoders import tiny_config, tiny_images
from torch import Tensor, nn
from transformers import AutoModel, CLIPImageProcessor, CLIPVisionConfig, SiglipImageProcessor, ViTImageProcessor
from transformers.models.clip.modeling_clip import CLIPMLP

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments, engines, linear
from taskres_hf.data import read_image
from taskres_hf.encoders import FAMILIES, encode_images, load_image_tower
from taskres_hf.engines import make_engine
from taskres_hf.errors import ConfigurationError, DataError, MissingExtraError
from taskres_hf.features import Embedder, StoredFeatures
from taskres_hf.linear import OneDnnLinear, onednn
from taskres_hf.preprocessing import Preprocessor
from taskres_hf.towers import READS_FIRST_TOKEN, REWRITABLE, Layer, PackedLinear, PackedPatches, packed_mlp

Model = TaskResCLIPForImageClassification
COMBINATIONS = [
    ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32"),
]  # fmt: skip


def _needs(engine: str) -> None:
    if engine != "torch":
        pytest.importorskip(engine, reason=f"the optional engine {engine} is not installed")


@pytest.mark.parametrize(("engine", "precision"), COMBINATIONS)
def test_engines_give_the_embeddings_of_the_model(model: Model, splits: Any, engine: str, precision: str) -> None:
    _needs(engine)
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
    model: Model,
    base: str,
    pixel_values: Tensor,
    engine: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _needs(engine)
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))  # nothing converted yet
    tower = load_image_tower(base)
    assert tower is not None
    found = make_engine(tower, engine, precision)({"pixel_values": pixel_values})
    expected = model.get_image_features(pixel_values)
    assert F.cosine_similarity(found, expected).min() > 0.999
    assert make_engine(model.clip, engine, precision)({"pixel_values": pixel_values}).equal(found)  # kept or not


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_engines_give_the_embeddings_of_every_family(family: str) -> None:
    torch.manual_seed(0)
    base, inputs = AutoModel.from_config(tiny_config(family)).eval(), tiny_images(family)
    with torch.no_grad():
        expected = encode_images(base, inputs)
        for engine, precision in (("torch", "fp32"), ("torch", "bf16"), *COMBINATIONS[1:]):
            if engine != "torch" and (family not in REWRITABLE or not importlib.util.find_spec(engine)):
                continue
            found = make_engine(base, engine, precision)(inputs)
            tolerance = 1e-4 if precision == "fp32" else 0.05 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=f"{engine} {precision}")


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "altclip", "chinese_clip", "siglip", "blip"])
def test_the_last_layer_works_only_for_the_token_that_is_read(family: str) -> None:
    base = AutoModel.from_config(tiny_config(family)).eval()
    seen: list[int] = []
    last = base.vision_model.encoder.layers[-1]
    short = family in READS_FIRST_TOKEN and Layer.fits(last)
    assert short or family != "clip"
    last.layer_norm2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        encode_images(base, tiny_images(family))
        make_engine(base, "torch", "fp32")(tiny_images(family))
        assert seen == [17, 1] if short else seen[0] == seen[1] >= 16
        watched: list[int] = []  # who looks at the whole layer gets the whole layer
        last.register_forward_hook(lambda module, inputs, output: watched.append(1))
        make_engine(base, "torch", "fp32")(tiny_images(family))
        assert watched == [1]
        assert seen[2] == seen[0]


@pytest.mark.parametrize(("engine", "precision"), COMBINATIONS)
def test_a_trained_classifier_is_as_good(model: Model, splits: Any, engine: str, precision: str) -> None:
    _needs(engine)
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
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: False)
    assert make_engine(model.clip).name == "torch-fp32"
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: True)
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
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: True)
    for options, name in (({}, "torch-fp32"), ({"precision": "bf16"}, "torch-bf16")):
        arguments = TaskResTrainingArguments(recipe="paper", disable_tqdm=True, **options)
        assert TaskResTrainer(model, arguments).embedder.engine.name == name


def test_converted_towers_are_kept(model: Model, pixel_values: Tensor) -> None:
    _needs("openvino")
    import openvino

    make_engine(model.clip, "openvino", "fp32")({"pixel_values": pixel_values})
    calls: list[int] = []
    real = openvino.convert_model
    try:
        openvino.convert_model = lambda *a, **k: calls.append(1) or real(*a, **k)
        make_engine(model.clip, "openvino", "bf16")({"pixel_values": pixel_values})
        assert not calls
        with torch.no_grad():
            model.clip.visual_projection.weight.mul_(2)
        make_engine(model.clip, "openvino", "fp32")({"pixel_values": pixel_values})
        assert calls
    finally:
        openvino.convert_model = real


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


# ---------------------------------------------------------------------- linear layers

needs_onednn = pytest.mark.skipif(onednn(torch.float32) is None, reason="this torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (0, 24), (1, 1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplied_by_onednn_gives_what_it_gave(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape)
    expected = layer(inputs)
    packed = PackedLinear(layer.weight, layer.bias, torch.float32, 10, inner=True)
    torch.testing.assert_close(packed(inputs), expected, atol=1e-5, rtol=1e-5)
    layer.__class__ = OneDnnLinear
    torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_size": 8, "stride": 8}, {"kernel_size": (4, 8), "stride": (4, 8)}])
def test_patches_are_a_linear_layer(options: Any) -> None:
    layer = nn.Conv2d(3, 6, **options).requires_grad_(False)
    assert PackedPatches.fits(layer)
    for size in ((32, 32), (37, 20)):  # also what the patches do not cover
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(PackedPatches(layer, 10)(pixels), layer(pixels), atol=1e-5, rtol=1e-5)
    for other in ({"kernel_size": 8, "stride": 4}, {"kernel_size": 8, "stride": 8, "padding": 1}):
        assert not PackedPatches.fits(nn.Conv2d(3, 6, **other))


@needs_onednn
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_an_activation_within_the_product_is_the_activation(activation: str) -> None:
    module = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=48, hidden_act=activation)).requires_grad_(
        False
    )
    inputs = 4 * torch.randn(2, 7, 24)
    expected = module(inputs)
    packed = packed_mlp(module, torch.float32, 14)
    assert packed is not None
    module._modules = packed
    torch.testing.assert_close(module(inputs), expected, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_mlp_of_another_kind_is_left_alone(activation: str) -> None:
    module = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=48, hidden_act=activation))
    assert packed_mlp(module, torch.float32, 14) is None
    assert packed_mlp(nn.Sequential(nn.Linear(2, 2)), torch.float32, 14) is None


@needs_onednn
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_quickened_model_is_still_the_model(base: str, pixel_values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, dtypes and tracing are as before; only who multiplies differs."""
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    plain = Model.from_base(base, ["a", "b"])
    assert not any(type(module) is OneDnnLinear for module in plain.modules())
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)
    model = Model.from_base(base, ["a", "b"])
    quick = [module for module in model.clip.modules() if type(module) is OneDnnLinear]
    assert len(quick) > 20
    assert model.clip.state_dict().keys() == plain.clip.state_dict().keys()
    expected = plain(pixel_values=pixel_values).logits
    torch.testing.assert_close(model(pixel_values=pixel_values).logits, expected, atol=1e-3, rtol=1e-4)

    calls: list[int] = []
    real = onednn(torch.float32)
    assert real is not None
    monkeypatch.setattr(linear, "onednn", lambda dtype: (real[0], lambda *a: calls.append(1) or real[1](*a)))
    with torch.no_grad():
        model(pixel_values=pixel_values)
    assert len(calls) >= 20  # it is used
    calls.clear()
    pixels = pixel_values.clone().requires_grad_()
    model.clip.get_image_features(pixel_values=pixels).pooler_output.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=pixel_values[:1])
    with torch.no_grad():
        traced = torch.jit.trace(quick[0], torch.randn(2, quick[0].in_features), check_trace=False)
    assert "mkldnn" not in str(traced.graph)
    copy.deepcopy(model).to(torch.bfloat16)(pixel_values=pixel_values)
    compiled = torch.compile(quick[0], backend="eager", fullgraph=True)
    compiled(torch.randn(2, quick[0].in_features))
    assert not calls  # all of that took torch's own way


# ---------------------------------------------------------------------- preprocessing


def _pictures(splits: Any) -> list[PIL.Image.Image]:
    """Real pictures made awkward: long, tiny, one pixel, grey, and larger."""
    first = splits["test"][0]["image"].convert("RGB")
    second = splits["test"][5]["image"].convert("RGB")
    sizes = [(64, 64), (401, 299), (299, 401), (1000, 70), (70, 1000), (3, 5), (1, 7), (1, 1), (640, 640)]
    found = [(first if number % 2 else second).resize(size, 3) for number, size in enumerate(sizes)]
    noise = np.random.default_rng(0).integers(0, 256, (560, 237, 3), dtype=np.uint8)
    return [*found, first.convert("L").convert("RGB"), PIL.Image.fromarray(noise)]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(),
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        CLIPImageProcessor(size={"height": 48, "width": 80}, do_center_crop=False),
        SiglipImageProcessor(),
        ViTImageProcessor(),
    ],
    ids=["clip", "clip-64", "clip-no-crop", "siglip", "vit"],
)
def test_two_grey_levels_at_most(processor: Any, splits: Any) -> None:
    prepare = Preprocessor(processor)
    assert prepare.fast
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    for picture in _pictures(splits):
        # Of one pixel, older stock processors would take the height for the channels.
        expected = processor(images=[picture], input_data_format="channels_last", return_tensors="pt")["pixel_values"][
            0
        ]
        found = prepare([picture])["pixel_values"][0]
        assert found.shape == expected.shape
        assert ((found - expected) * std * 255).abs().max() <= 2.01, picture.size


def test_draft_decoding_is_coarser_and_only_on_request(model: Model, splits: Any, tmp_path: Path) -> None:
    picture = splits["test"][3]["image"].convert("RGB").resize((1600, 1200), 3)
    picture.save(tmp_path / "large.jpg", quality=90)
    assert read_image(tmp_path / "large.jpg").size == (1600, 1200)
    assert read_image(tmp_path / "large.jpg", draft=(224, 224)).size == (400, 300)
    exact = Embedder(model.clip, model.image_processor)
    coarse = Embedder(model.clip, model.image_processor, draft_decoding=True)
    assert exact.draft is None
    assert exact.key != coarse.key
    pair = [embedder([read_image(tmp_path / "large.jpg", embedder.draft)]) for embedder in (exact, coarse)]
    assert F.cosine_similarity(*pair).min() > 0.99


def test_a_processor_of_another_kind_is_used_as_it_is(splits: Any) -> None:
    processor = CLIPImageProcessor(resample=0)  # nearest neighbour
    picture = splits["test"][0]["image"].convert("RGB").resize((300, 200))
    prepare = Preprocessor(processor)
    assert not prepare.fast
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepare([picture])["pixel_values"], expected)
    assert not Preprocessor(CLIPImageProcessor(), exact=True).fast


# ---------------------------------------------------------------------- embeddings on disk


def _stored(model: Model, splits: Any, folder: Path, dtype: Any = np.float32) -> StoredFeatures:
    data = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["train"])
    np.save(folder / "embeds.npy", data.image_embeds[0].numpy().astype(dtype))
    return StoredFeatures(folder / "embeds.npy", data.labels, data.class_names)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_row_once_an_epoch_with_its_label(model: Model, splits: Any, tmp_path: Path, dtype: Any) -> None:
    data = _stored(model, splits, tmp_path, dtype)
    data._BLOCK = 16  # type: ignore[misc]
    table = torch.from_numpy(np.load(tmp_path / "embeds.npy").astype(np.float32))
    seen = []
    for labels, embeds in data.batches(10, seed=1, epoch=2, buffer_mb=1):
        rows = torch.cdist(embeds, table).argmin(dim=1)
        assert torch.equal(data.labels[rows], labels)
        seen += rows.tolist()
    assert len(seen) == 170  # 179 rows, the ragged end dropped
    assert len(set(seen)) >= 165  # a few pictures are alike
    first, again, other = ([ids.tolist() for ids, _ in data.batches(10, 1, epoch, 1)] for epoch in (2, 2, 3))
    assert first == again != other


def test_training_from_disk_equals_training_from_memory(model: Model, splits: Any, tmp_path: Path) -> None:
    """In one batch an epoch the order does not matter, so the results must agree."""
    data = _stored(model, splits, tmp_path)
    results = []
    for source in (splits["train"], data):
        model.classifier.reset()
        arguments = TaskResTrainingArguments(num_train_epochs=50, disable_tqdm=True)
        trainer = TaskResTrainer(model, arguments, source, splits["test"])
        trainer.train()
        results.append(trainer.evaluate()["accuracy"])
    assert results[0] == pytest.approx(results[1], abs=1.5 / 159)


def test_wrong_files_and_settings(model: Model, splits: Any, tmp_path: Path) -> None:
    data = _stored(model, splits, tmp_path)
    with pytest.raises(DataError, match="2 labels were given"):
        StoredFeatures(tmp_path / "embeds.npy", [0, 1], data.class_names)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"no \.npy file"):
        StoredFeatures(tmp_path / "objects.npy", [0], ["a", "b"])
    with pytest.raises(ConfigurationError, match="do not apply"):
        TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), data).train()
    data.class_names = list(reversed(data.class_names))
    with pytest.raises(DataError, match="order differ"):
        TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), data).train()


# ---------------------------------------------------------------------- swapping


def test_classifiers_are_swapped_on_a_live_model(model: Model, base: str, pixel_values: torch.Tensor) -> None:
    other = Model.from_base(base, ["cat", "dog", "fish"])
    expected = other(pixel_values=pixel_values).logits
    model.use_classifier(other)
    assert torch.equal(model(pixel_values=pixel_values).logits, expected)
    assert model.class_names == ["cat", "dog", "fish"]
    other.config.base_model_name_or_path = "another/base"
    with pytest.raises(ConfigurationError, match="different bases"):
        Model.from_base(base, ["a", "b"]).use_classifier(other)
