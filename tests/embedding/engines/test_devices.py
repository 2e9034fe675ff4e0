"""What belongs to a GPU, on the CPU: its choices with what a device says made up, its ways with a device made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import beside_a_device, tiny_config
from torch import Tensor, nn
from transformers import AutoModel

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import choose, devices
from taskres_hf.embedding.engines.choose import candidates, make_engine
from taskres_hf.embedding.engines.devices import DeviceTower, embed_ahead
from taskres_hf.embedding.features import embed_images

Model = TaskResCLIPForImageClassification
CUDA = torch.device("cuda:1")


class _Device(devices._Accelerator):
    """A device that does not exist: it has `room` bytes, takes `each` a picture, and records what is replayed."""

    def __init__(self, room: int | None = None, each: int = 1, records: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.room, self.each, self.records = room, each, records
        self.seen: list[str] = []

    def free(self) -> int | None:
        return self.room

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return devices._PROBED * self.each

    def record(self, forward: Any, inputs: Any) -> Any:
        self.seen.append("record")
        if not self.records:
            raise RuntimeError("operation not permitted when stream is capturing")
        forward(inputs)

        def replay(given: Any) -> Tensor:
            self.seen.append("replay")
            return forward(given)  # type: ignore[no-any-return]

        return replay

    def release(self) -> None:
        self.seen.append("release")


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config("clip")).eval()


@pytest.fixture
def few(splits: Any) -> LabelledImages:
    return LabelledImages(splits["test"].select(range(13)))


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("native", "wide", "dtype", "expected"),
    [
        (True, True, torch.float32, "torch-bf16"),
        (False, True, torch.float32, "torch-fp32"),
        (True, False, torch.float32, "torch-fp32"),
        (True, True, torch.float16, "torch-float16"),
        (True, True, torch.bfloat16, "torch-bfloat16"),
    ],
)
def test_bf16_where_the_gpu_multiplies_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, native: bool, wide: bool, dtype: torch.dtype, expected: str
) -> None:
    asked: list[Any] = []

    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(choose, "device_of", lambda base: CUDA)
    tiny.config.vision_config.hidden_size = 512 if wide else 64
    engine = make_engine(tiny.to(dtype), "auto", "auto")
    assert engine.name == expected
    assert asked in ([], [CUDA])  # of the tower's device, not the current one
    assert engine.is_stock == (expected != "torch-bf16")
    assert candidates(tiny) == []  # there is nothing to time beside it
    assert make_engine(tiny, "auto", "fp32").is_stock  # as recipe `paper` asks


def test_a_wrong_bf16_is_not_taken(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    beside_a_device(monkeypatch)
    embedder = Embedder(model.clip, model.image_processor, "torch", "bf16")
    embedder.get_ready()
    assert embedder.engine.name == "torch-bf16"
    real = choose.rewritten

    def wrong(*arguments: Any) -> Any:
        tower = real(*arguments)
        tower._modules["visual_projection"] = nn.Sequential(tower.visual_projection, nn.ReLU())
        return tower

    monkeypatch.setattr(choose, "rewritten", wrong)
    embedder = Embedder(model.clip, model.image_processor, "torch", "bf16")
    with pytest.warns(UserWarning, match="gives other embeddings"):
        embedder.get_ready()
    assert embedder.engine.is_stock


# ---------------------------------------------------------------------- size of batches


@pytest.mark.parametrize(
    ("pictures", "room", "expected"),
    [
        (5, 10**9, 32),  # no more than the job has, but for what is stable
        (33, 10**9, 64),
        (10**6, 10**9, 256),
        (10**6, 10**5, 32),  # 100,000 bytes, of which 40 % hold 40 pictures
        (10**6, 2500, 1),
        (10**6, 10, 1),
        (10**6, None, 256),
    ],
)
def test_a_batch_fits_the_job_and_the_memory(tiny: Any, pictures: int, room: int | None, expected: int) -> None:
    tower = DeviceTower(tiny, lambda inputs: inputs["pixel_values"].flatten(1), _Device(room, each=1000))
    example = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert tower.batch_size(pictures, 256, example) == expected


def test_a_probe_that_finds_no_memory_is_made_smaller(tiny: Any) -> None:
    sizes: list[int] = []

    def forward(inputs: Any) -> Tensor:
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return torch.zeros(sizes[-1], 4)

    tower = DeviceTower(tiny, forward, _Device(10**6, each=10))
    assert tower.batch_size(100, 64, {"pixel_values": torch.zeros(1, 3, 4, 4)}) == 64
    assert sizes == [8, 4, 2, 2]


def test_larger_batches_on_a_gpu_and_the_users_own_stays(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices.largest_batch(model.clip, CUDA) == devices._LARGEST_BATCH
    assert devices.largest_batch(model.clip, torch.device("mps")) == 32
    beside_a_device(monkeypatch)
    embedder, sizes = Embedder(model.clip, model.image_processor), []
    collate = type(embedder.preprocess).collate

    def collated(preprocess: Any, prepared: Any, *rest: Any) -> Any:
        sizes.append(len(prepared))
        return collate(preprocess, prepared, *rest)

    monkeypatch.setattr(type(embedder.preprocess), "collate", collated)
    for batch_size, expected in ((None, [32]), (4, [4, 4, 4, 4])):  # the last one filled up
        sizes.clear()
        found = embed_images(embedder, few, batch_size=batch_size, progress=False)
        assert [size for size in sizes if size != 2] == expected  # two are the probe pictures
        assert len(found) == 13


@pytest.mark.parametrize("fits", [5, 3, 1, 0])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    embedder = Embedder(model.clip, model.image_processor)
    expected = embed_images(embedder, few, progress=False)
    beside_a_device(monkeypatch)
    embedder = Embedder(model.clip, model.image_processor)
    tower, sizes = embedder.engine.beside, []
    assert tower is not None
    real = tower._forward

    def forward(inputs: Any) -> Tensor:
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > (fits if len(sizes) > 2 else 8):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(inputs)

    monkeypatch.setattr(tower, "_forward", forward)
    if not fits:
        with pytest.raises(torch.OutOfMemoryError):
            embed_images(embedder, few, batch_size=5, progress=False)
        return
    found = embed_images(embedder, few, batch_size=5, progress=False)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-4, rtol=1e-4)
    assert found.digests == expected.digests
    assert (
        sizes
        == {
            5: [5, 5, 5],
            3: [5, 5, 5, 2, 2],  # 10, then 5 that do not fit; the other 3 by 2
            1: [5, 5, 5, 2, 1, 1, 1],
        }[fits]
    )


def test_other_errors_are_not_taken_for_it(tiny: Any) -> None:
    def forward(inputs: Any) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    tower = DeviceTower(tiny, forward, _Device())
    pairs = iter([(0, torch.zeros(2))] * 4)
    with pytest.raises(RuntimeError, match="assert"):
        list(embed_ahead(tower, pairs, 2, lambda rows: {"pixel_values": torch.stack(rows)}, lambda moved: moved))


# ---------------------------------------------------------------------- recorded passes


def _pass_through(tower: DeviceTower, *sizes: int) -> list[Tensor]:
    return [tower.submit({"pixel_values": torch.arange(float(size))[:, None]})() for size in sizes]


def test_a_pass_is_recorded_when_its_shape_comes_again(tiny: Any) -> None:
    device = _Device()
    tower = DeviceTower(tiny, lambda inputs: 2 * inputs["pixel_values"], device)
    found = _pass_through(tower, 4, 4, 4, 3, 4)
    assert device.seen == ["record", "replay", "replay", "replay"]  # the shorter one as it is
    assert [rows.flatten().tolist() for rows in found[2:4]] == [[0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0]]
    with torch.no_grad():
        next(tiny.vision_model.parameters()).add_(1)  # another tower: what was recorded no longer holds
    device.seen.clear()
    _pass_through(tower, 4, 4, 4)
    assert device.seen == ["record", "replay", "replay"]
    tower.release()
    device.seen.clear()
    _pass_through(tower, 4)
    assert device.seen == []


@pytest.mark.parametrize("why", ["fails", "hook", "training"])
def test_what_cannot_be_recorded_runs_as_it_is(tiny: Any, why: str) -> None:
    device = _Device(records=why != "fails")
    if why == "hook":
        tiny.vision_model.register_forward_hook(lambda *a: None)
    tiny.train(why == "training")
    tower = DeviceTower(tiny, lambda inputs: 2 * inputs["pixel_values"], device)
    assert [len(rows) for rows in _pass_through(tower, 4, 4, 4, 4)] == [4] * 4
    assert device.seen.count("record") == (why == "fails")  # once, not at each batch
    assert "replay" not in device.seen


def test_a_call_records_nothing(tiny: Any) -> None:
    """Requests of a service differ in size."""
    device = _Device()
    tower = DeviceTower(tiny, lambda inputs: inputs["pixel_values"], device)
    for _ in range(4):
        tower({"pixel_values": torch.zeros(2, 3)})
    assert device.seen == []


# ---------------------------------------------------------------------- the whole way


@pytest.mark.parametrize(("views", "exact"), [(0, False), (2, False), (0, True)])
def test_embeddings_beside_a_device_are_those_of_the_processor(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch, views: int, exact: bool
) -> None:
    options: dict[str, Any] = {"views": views, "progress": False, "batch_size": 4}
    expected = embed_images(Embedder(model.clip, model.image_processor, exact_preprocessing=exact), few, **options)
    beside_a_device(monkeypatch)
    embedder = Embedder(model.clip, model.image_processor, exact_preprocessing=exact)
    found = embed_images(embedder, few, **options)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-4, rtol=1e-4)
    assert embedder.engine.beside is not None


def test_pixels_finished_on_the_device_are_the_same_bits(model: Model, few: LabelledImages) -> None:
    preprocess = Embedder(model.clip, model.image_processor).preprocess
    pictures = [few.image(row) for row in range(4)]
    rows = preprocess.collate([preprocess.prepare(picture, as_bytes=True) for picture in pictures])
    assert rows["pixel_values"].dtype == torch.uint8
    finished = preprocess.finisher(torch.device("cpu"))(rows)
    assert torch.equal(finished["pixel_values"], preprocess(pictures)["pixel_values"])


def test_a_model_that_was_moved_is_embedded_where_it_is(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = Embedder(model.clip, model.image_processor)
    embedder.get_ready()
    assert embedder.engine.beside is None
    monkeypatch.setattr(embedder, "_device", torch.device("meta"))  # where it was
    beside_a_device(monkeypatch)
    assert isinstance(embedder([few.image(0)]), Tensor)
    assert embedder.engine.beside is not None


def test_bf16_beside_a_device_keeps_the_residual_stream(tiny: Any) -> None:
    """Without oneDNN's layout, as on a GPU: the same layers, multiplied in bf16 by torch."""
    meta = choose.rewritten(tiny.to("meta"), torch.bfloat16)
    layers: Any = {name: type(part).__name__ for name, part in meta.named_modules()}
    assert "PackedLinear" in layers.values()
    assert any(isinstance(part, nn.LayerNorm) for part in meta.modules())
    for name, part in meta.named_modules():
        if layers[name] == "PackedLinear":
            assert part.multiply is None
            assert part.weight.dtype == (torch.float32 if name.endswith("_projection") else torch.bfloat16)
    pixels = torch.zeros(
        2, 3, tiny.config.vision_config.image_size, tiny.config.vision_config.image_size, device="meta"
    )
    assert choose.encode_images(meta, {"pixel_values": pixels}).dtype == torch.float32
