"""A faster form of the tower is used only where it gives the same embeddings, and is faster."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taskres_hf import TaskResCLIPForImageClassification, machine
from taskres_hf.embedding import embedder as embedding
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import choose, onednn, proving
from taskres_hf.embedding.engines.choose import ImageEngine, make_engine
from taskres_hf.embedding.engines.onednn import onednn_int8
from taskres_hf.embedding.engines.proving import Proof, agrees, fastest, probe_pictures

Model = TaskResCLIPForImageClassification


@pytest.fixture
def stock(model: Model, splits: Any) -> tuple[list[Any], Tensor]:
    """Eight pictures and what the model itself makes of them."""
    pictures = [row["image"].convert("RGB") for row in splits["test"].select(range(8))]
    return pictures, model.get_image_features(**model.image_processor(images=pictures, return_tensors="pt"))


def _hook(place: str, model: Model) -> None:
    """Something from outside that changes what the tower computes."""
    tower = model.clip.vision_model
    layer = tower.encoder.layers[1]
    if place == "forward":
        real = layer.mlp.forward
        layer.mlp.forward = lambda hidden: -real(hidden)
    elif place == "pre-hook":
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "hidden_states": -kwargs["hidden_states"]}), with_kwargs=True
        )
    elif place == "last layer":  # mixes tokens, which a layer that works for one of them cannot
        tower.encoder.layers[-1].layer_norm2.register_forward_hook(
            lambda module, inputs, output: output + 3 * output.mean(dim=1, keepdim=True)
        )
    else:
        module = tower.embeddings.patch_embedding if place == "patches" else layer.get_submodule(place)
        module.register_forward_hook(lambda module, inputs, output: 3 * output)


PLACES = [
    "mlp.fc1", "mlp.activation_fn", "self_attn.q_proj", "layer_norm1", "patches", "last layer", "pre-hook", "forward",
]  # fmt: skip
needs_int8 = pytest.mark.skipif(onednn_int8() is None, reason="this processor or this torch has no int8 products")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_hooks_into_the_tower_takes_part(
    model: Model, stock: tuple[list[Any], Tensor], place: str, precision: str
) -> None:
    pictures, before = stock
    _hook(place, model)
    expected = model.get_image_features(**model.image_processor(images=pictures, return_tensors="pt"))
    assert not torch.allclose(expected, before, atol=0.01)
    with pytest.warns(UserWarning, match="takes part in the image tower"):
        embedder = Embedder(model.clip, model.image_processor, "torch", precision)
    assert embedder.engine.name == "torch-fp32"  # what runs is what is recorded
    torch.testing.assert_close(embedder(pictures), expected, atol=1e-3, rtol=1e-3)


def _change(kind: str, model: Model) -> None:
    """Another image tower, in place."""
    layer: Any = model.clip.vision_model.encoder.layers[0]
    if kind == "weights":
        with torch.no_grad():
            layer.mlp.fc1.weight.mul_(3)
    elif kind == "module":
        layer.mlp = nn.Identity()
    elif kind == "class":
        layer.mlp.fc1.__class__ = type(
            "Tripled", (nn.Linear,), {"forward": lambda self, x: 3 * F.linear(x, self.weight)}
        )
    else:
        parametrize.register_parametrization(layer.mlp.fc1, "weight", nn.Hardtanh(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:A hook or a replaced forward:UserWarning")
@pytest.mark.parametrize("kind", ["weights", "module", "class", "parametrization"])
@pytest.mark.parametrize("when", ["before", "after the engine", "after the first pictures"])
def test_a_tower_that_was_changed_is_not_the_one_of_before(
    model: Model, stock: tuple[list[Any], Tensor], kind: str, when: str
) -> None:
    pictures, before = stock
    if when == "before":
        _change(kind, model)
    embedder = Embedder(model.clip, model.image_processor)
    if when == "after the first pictures":
        torch.testing.assert_close(embedder(pictures), before, atol=1e-3, rtol=1e-3)
    if when != "before":
        _change(kind, model)
    expected = model.get_image_features(**model.image_processor(images=pictures, return_tensors="pt"))
    assert not torch.allclose(expected, before, atol=0.01)
    torch.testing.assert_close(embedder(pictures), expected, atol=1e-3, rtol=1e-3)


def test_a_hook_on_every_module_takes_part(model: Model, stock: tuple[list[Any], Tensor]) -> None:
    pictures, _ = stock
    embedder = Embedder(model.clip, model.image_processor)
    embedder.get_ready()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 3 * output if isinstance(module, nn.Linear) else None
    )
    try:
        expected = model.get_image_features(**model.image_processor(images=pictures, return_tensors="pt"))
        with pytest.warns(UserWarning, match="takes part in the image tower"):
            torch.testing.assert_close(embedder(pictures), expected, atol=1e-3, rtol=1e-3)
        assert not embedder.is_reproducible
    finally:
        handle.remove()


def test_a_tower_that_cannot_be_converted_runs_as_it_is(
    model: Model, stock: tuple[list[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, expected = stock

    def fail(*_: Any) -> None:
        raise RuntimeError("this operator is not known")

    monkeypatch.setattr(choose, "rewritten", fail)
    embedder = Embedder(model.clip, model.image_processor)
    with pytest.warns(UserWarning, match="runs as it is instead: this operator is not known"):
        torch.testing.assert_close(embedder(pictures), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("fault", ["weights", "nan", "shape"])
def test_a_tower_that_comes_out_differently_is_not_used(
    model: Model, stock: tuple[list[Any], Tensor], precision: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: an operator of this torch that computes something else, a module nobody thought of."""
    real = choose.rewritten

    def other(*arguments: Any) -> Any:
        tower = real(*arguments)
        norm = tower.vision_model.post_layernorm
        wrong = nn.LayerNorm(norm.normalized_shape, norm.eps)
        wrong.weight.data = torch.randn(norm.normalized_shape) if fault == "weights" else norm.weight.detach()
        if fault == "nan":
            wrong.bias.data[0] = float("nan")
        tower.vision_model._modules["post_layernorm"] = wrong.requires_grad_(False)
        if fault == "shape":
            tower._modules["visual_projection"] = nn.Identity()
        return tower

    monkeypatch.setattr(choose, "rewritten", lambda base, dtype=None, *rest: other(base, dtype, *rest))
    embedder = Embedder(model.clip, model.image_processor, "torch", precision)
    key = embedder.key
    if fault == "shape":
        model.clip.visual_projection.weight.data = model.clip.visual_projection.weight.data[:100].clone()
    pictures, expected = stock
    with pytest.warns(UserWarning, match=f"torch-{precision} gives other embeddings"):
        found = embedder(pictures)
    torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-3, rtol=1e-3)
    assert embedder.engine.name == "torch-fp32"
    assert precision == "fp32" or embedder.key != key


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_what_most_embeddings_have_in_common_does_not_hide_an_error(precision: str) -> None:
    """Embeddings that lie close together: a tower that gives every picture the same one is off by little."""
    torch.manual_seed(0)
    apart = {"fp32": 0.0012, "bf16": 0.06, "int8": 0.18}[precision] / 2**0.5
    expected = F.normalize(torch.ones(64), dim=0) + apart * F.normalize(torch.randn(2, 64), dim=1)
    same = expected.mean(dim=0).expand(2, -1)
    assert F.cosine_similarity(same, expected).min() > 0.99
    assert not agrees(same, expected, precision)
    assert not agrees(expected.flip(0), expected, precision)
    assert agrees(expected + 0.1 * apart * F.normalize(torch.randn(2, 64), dim=1), expected, precision)
    assert len({picture.tobytes() for picture in probe_pictures()}) == 2


def _paced(monkeypatch: pytest.MonkeyPatch, cache: Path, **seconds: float) -> list[str]:
    """Let each form take these seconds a picture (`stock`, `torch_bf16`, ...), others 9; what was timed, in order."""
    monkeypatch.setenv("TASKRES_CACHE", str(cache))
    measured: list[str] = []

    def pace(self: Embedder, engine: ImageEngine) -> float:
        name = "stock" if engine.is_stock else engine.name
        measured.append(name)
        return seconds.get(name.replace("-", "_"), 9.0)

    monkeypatch.setattr(Embedder, "_pace", pace)
    return measured


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bf16, and a tower that is large enough for it."""
    monkeypatch.setattr(choose, "_LARGE", 1)
    monkeypatch.setattr(choose, "is_faster", lambda dtype: True)
    monkeypatch.setattr(embedding, "_LARGE_JOB", 3)


@pytest.mark.parametrize(
    ("stock", "fp32", "bf16", "name"),
    [(2.0, 3.0, 1.0, "torch-bf16"), (2.0, 3.0, 4.0, "stock"), (2.0, 1.0, 1.5, "torch-fp32")],
)
def test_the_automatic_engine_is_the_fastest_right_one(
    model: Model, wide: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    stock: float, fp32: float, bf16: float, name: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(embedding, "_PAYS", float("inf"))  # nothing is converted for it
    measured = _paced(monkeypatch, tmp_path, stock=stock, torch_fp32=fp32, torch_bf16=bf16)

    def chosen(embedder: Embedder) -> str:
        return "stock" if embedder.engine.is_stock else embedder.engine.name

    small = Embedder(model.clip, model.image_processor, "auto", "auto")
    small.get_ready(small.batch_size)
    assert chosen(small) == "torch-bf16"
    assert not measured  # it would take longer than it could save
    large = Embedder(model.clip, model.image_processor, "auto", "auto")
    large.get_ready(3 * large.batch_size)
    assert set(measured) == {"stock", "torch-fp32", "torch-bf16"}
    assert chosen(large) == name
    del measured[:]
    again = Embedder(model.clip, model.image_processor, "auto", "auto")  # of any size: remembered
    assert chosen(again) == name
    again.get_ready(3 * again.batch_size)
    assert not measured
    exact = Embedder(model.clip, model.image_processor, "auto", "fp32")
    assert chosen(exact) == ("torch-fp32" if fp32 < stock else "stock")
    for precision in ("bf16", "fp32"):  # what was asked for is what runs
        asked = Embedder(model.clip, model.image_processor, "torch", precision)
        asked.get_ready(10**6)
        assert chosen(asked) == f"torch-{precision}"


def test_converting_is_tried_where_the_job_is_long(
    model: Model, wide: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    measured = _paced(monkeypatch, tmp_path, stock=2.0, torch_fp32=1.5, torch_bf16=1.6, openvino_fp32=1.0)
    monkeypatch.setattr(embedding, "SECONDS_TO_PREPARE", {"torch": 0.0, "openvino": 100.0, "onnxruntime": 1e9})
    embedder = Embedder(model.clip, model.image_processor, "auto", "auto")
    embedder.get_ready(3 * embedder.batch_size)
    assert "openvino-fp32" not in measured
    assert embedder.engine.name == "torch-fp32"
    embedder = Embedder(model.clip, model.image_processor, "auto", "auto")
    embedder.get_ready(10**4)
    assert set(measured) == {"stock", "torch-fp32", "torch-bf16", "openvino-fp32"}
    assert embedder.engine.name == "openvino-fp32"
    pictures = probe_pictures()
    stock = Embedder(model.clip, model.image_processor, "torch", "fp32")(pictures)
    torch.testing.assert_close(embedder(pictures), stock, atol=1e-4, rtol=1e-4)


def test_a_form_that_is_wrong_or_cannot_run_is_never_chosen(
    model: Model, wide: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However fast it is."""
    _paced(monkeypatch, tmp_path, torch_fp32=0.1, torch_bf16=0.2, torch_int8=0.3, stock=5.0)
    real = choose.rewritten

    def turned(base: Any, dtype: Any = None, *rest: Any) -> Any:
        if dtype is torch.bfloat16:
            raise RuntimeError("no such instruction\nat 0x0")
        tower = real(base, dtype, *rest)
        tower._modules["visual_projection"] = nn.Sequential(tower._modules["visual_projection"], Turned())
        return tower

    class Turned(nn.Module):
        def forward(self, embeds: Tensor) -> Tensor:
            return embeds + 0.2 * embeds.norm(dim=-1, keepdim=True) * F.normalize(embeds.flip(-1), dim=-1)

    monkeypatch.setattr(choose, "rewritten", turned)
    embedder = Embedder(model.clip, model.image_processor, "auto", "auto")
    proofs = embedder.prove()
    assert proofs["torch-fp32"].reason == "gives other embeddings"
    assert proofs["torch-fp32"].seconds is None
    assert proofs["torch-bf16"].reason == "RuntimeError: no such instruction"
    assert fastest(proofs, embedder.candidates()) in ("stock", "openvino-fp32", "onnxruntime-fp32")
    assert embedder.engine.name == "torch-bf16"  # trying leaves the embedder as it was


def test_a_cosine_tells_more_of_what_is_chosen_automatically() -> None:
    """Errors that one who asked for bf16 accepts, but nobody who asked for nothing."""
    torch.manual_seed(0)
    expected = F.normalize(torch.ones(64), dim=0) + 0.3 * F.normalize(torch.randn(2, 64), dim=1)
    off = expected + 0.04 * F.normalize(torch.randn(2, 64), dim=1)
    assert agrees(off, expected, "bf16")
    assert not agrees(off, expected, "bf16", proving.CENTRED)


@pytest.mark.parametrize(("engine", "precision", "name"), [("auto", "auto", "stock"), ("torch", "bf16", "torch-bf16")])
def test_a_form_proved_on_another_tower_is_proved_on_this_one(
    model: Model, wide: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, precision: str, name: str
) -> None:
    """As strictly where it is chosen automatically: a record is of towers of this shape, not of these weights."""
    _paced(monkeypatch, tmp_path)
    record = {proving.STOCK: Proof(None, 2.0), "torch-bf16": Proof(None, 1.0), "torch-fp32": Proof(None, 3.0)}
    proving.remember(model.clip, record)
    real = choose.encode_images

    def rounded_more(base: Any, inputs: Any) -> Tensor:
        embeds = real(base, inputs)
        noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
        return embeds + 0.048 * embeds.norm(dim=1, keepdim=True) * F.normalize(noise, dim=1) * (base is not model.clip)

    monkeypatch.setattr(choose, "encode_images", rounded_more)
    embedder = Embedder(model.clip, model.image_processor, engine, precision)
    assert embedder.engine.name == "torch-bf16"
    with pytest.warns(UserWarning, match="other embeddings") if name == "stock" else nullcontext():
        assert (proving.STOCK if embedder.get_ready().is_stock else embedder.engine.name) == name


def test_an_interrupted_comparison_is_made_again(
    model: Model, stock: tuple[list[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    embedder = Embedder(model.clip, model.image_processor)
    monkeypatch.setattr(embedding, "agrees", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedder(stock[0])
    monkeypatch.setattr(embedding, "agrees", lambda *_: False)
    with pytest.warns(UserWarning, match="other embeddings"):
        assert embedder.get_ready().is_stock


def test_no_choice_without_the_tower_as_it_is() -> None:
    assert fastest({"torch-fp32": Proof(None, 0.1)}, ["torch-fp32"]) is None
    assert fastest({}, ["torch-fp32"]) is None
    proofs = {"stock": Proof(None, 1.0), "torch-bf16": Proof(None, 0.1), "torch-int8": Proof("on request", 0.01)}
    assert fastest(proofs, ["torch-fp32", "torch-int8"]) == "stock"


def test_what_is_remembered_is_of_this_machine_and_tower(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedding, "_LARGE_JOB", 1)
    _paced(monkeypatch, tmp_path, stock=2.0)
    Embedder(model.clip, model.image_processor, "auto").get_ready(10**4)
    assert Embedder(model.clip, model.image_processor, "auto").engine.is_stock
    for attribute, value in (("processor", lambda: "another"), ("_versions", lambda: ["9"])):
        with monkeypatch.context() as patch:
            patch.setattr(machine, attribute, value)
            assert not Embedder(model.clip, model.image_processor, "auto").engine.is_stock
    for content in (json.dumps({"x": 1})[:-1], "[]", "{}"):
        (tmp_path / "engines.json").write_text(content)
        assert not Embedder(model.clip, model.image_processor, "auto").engine.is_stock


def test_the_pace_is_of_pictures_that_are_all_embedded(model: Model) -> None:
    embedder = Embedder(model.clip, model.image_processor, "auto")
    threads = torch.get_num_threads()
    for cores in (1, 2):
        torch.set_num_threads(cores)
        try:
            assert embedder._pace(choose.stock_engine(model.clip)) > 0
            assert torch.get_num_threads() == cores
        finally:
            torch.set_num_threads(threads)


def _classes(model: Model) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_a_model_keeps_its_layers(
    base: str, spec: dict[str, Any], stock: tuple[list[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where MKL is slow, and after embedding: quantisers and walks over modules find what transformers made."""
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)
    pictures, _ = stock
    model = Model.from_base(base, spec["classes"], spec["template"])
    classes = _classes(model)
    assert sum(kind is nn.Linear for kind in classes.values()) > 50
    for precision in ("fp32", "bf16"):
        Embedder(model.clip, model.image_processor, "torch", precision)(pictures)
    assert _classes(model) == classes
    quantized = torch.ao.quantization.quantize_dynamic(model.clip.vision_model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module).__module__ for module in quantized.modules() if type(module).__name__ == "Linear"]
    layers = sum(kind is nn.Linear for kind in map(type, model.clip.vision_model.modules()))
    assert len(kinds) == layers > 20
    assert all("quantized" in kind for kind in kinds)


def test_int8_asked_for_by_name_still_says_why_not(model: Model) -> None:
    model.clip.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="int8"):
        make_engine(model.clip, "torch", "int8")
