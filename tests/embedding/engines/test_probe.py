"""A faster form of the tower is used only where it gives the same embeddings, and is faster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding import embedder as embedding
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import choose, onednn
from taskres_hf.embedding.engines.choose import agrees, make_engine, probe_pictures
from taskres_hf.embedding.engines.onednn import onednn_int8

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


def _timed(monkeypatch: pytest.MonkeyPatch, cache: Path, engine: float, stock: float) -> list[float]:
    """Let measuring find these seconds, in turn; what was measured."""
    monkeypatch.setenv("TASKRES_CACHE", str(cache))
    measured: list[float] = []

    def seconds(work: Any) -> float:
        if len(measured) < 2:  # each form once
            work()
        measured.append(stock if len(measured) % 2 else engine)
        return measured[-1]

    monkeypatch.setattr(choose, "_seconds", seconds)
    return measured


@pytest.mark.parametrize(("seconds", "name"), [(1.0, "torch-bf16"), (3.0, "torch-fp32")])
def test_the_automatic_engine_is_not_slower_than_the_tower_as_it_is(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, name: str
) -> None:
    monkeypatch.setattr(choose, "_LARGE", 1)
    monkeypatch.setattr(choose, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(embedding, "_LARGE_JOB", 3)
    measured = _timed(monkeypatch, tmp_path, seconds, 2.0)
    small = Embedder(model.clip, model.image_processor, "auto", "auto")
    small.get_ready(small.batch_size)
    assert small.engine.name == "torch-bf16"
    assert not measured  # it would take longer than it could save
    large = Embedder(model.clip, model.image_processor, "auto", "auto")
    large.get_ready(3 * large.batch_size)
    assert measured
    assert large.engine.name == name
    del measured[:]
    again = Embedder(model.clip, model.image_processor, "auto", "auto")  # of any size: remembered
    assert again.engine.name == name
    again.get_ready(3 * again.batch_size)
    assert not measured
    for precision in ("bf16", "fp32"):  # what was asked for is what runs
        asked = Embedder(model.clip, model.image_processor, "torch", precision)
        asked.get_ready(10**6)
        assert asked.engine.name == f"torch-{precision}"
        assert not asked.engine.is_stock


def test_a_choice_stays_on_several_cores(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured anew, two forms that are as fast would take turns, and with them last bits of what is embedded."""
    monkeypatch.setattr(embedding, "_LARGE_JOB", 4)
    measured = _timed(monkeypatch, tmp_path, 3.0, 2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Embedder(model.clip, model.image_processor, "auto").get_ready(10**4)
        del measured[:]
        again = Embedder(model.clip, model.image_processor, "auto")
        again.get_ready(10**4)
    finally:
        torch.set_num_threads(threads)
    assert again.engine.is_stock
    assert not measured


def test_what_is_remembered_is_of_this_machine_and_tower(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedding, "_LARGE_JOB", 1)
    _timed(monkeypatch, tmp_path, 3.0, 2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # of which one is used while measuring, as in embedding
    try:
        Embedder(model.clip, model.image_processor, "auto").get_ready(10**4)
        assert torch.get_num_threads() == 2
        assert Embedder(model.clip, model.image_processor, "auto").engine.is_stock
    finally:
        torch.set_num_threads(threads)
    assert Embedder(model.clip, model.image_processor, "auto").engine.is_stock
    for attribute, value in (
        ("_processor", lambda: "another"),
        ("torch", type("T", (), {**vars(torch), "__version__": "9"})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(choose, attribute, value)
            assert not Embedder(model.clip, model.image_processor, "auto").engine.is_stock
    (tmp_path / "engines.json").write_text(json.dumps({"x": 1})[:-1])
    assert not Embedder(model.clip, model.image_processor, "auto").engine.is_stock


def _classes(model: Model) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_a_model_keeps_its_layers(
    base: str, spec: dict[str, Any], stock: tuple[list[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where MKL is slow, and after embedding: quantisers and walks over modules find what transformers made."""
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
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
