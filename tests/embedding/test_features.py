"""Frozen embeddings: the same as the model's own, cached by content, honest about unreadable pictures."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from support import beside_a_device

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding import features as features
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import embed_images
from taskres_hf.embedding.preprocessing import augment
from taskres_hf.embedding.stored import StoredFeatures
from taskres_hf.errors import ConfigurationError, DataError, ImageError

Model = TaskResCLIPForImageClassification


def _embed(model: Model, images: LabelledImages, **options: Any) -> features.ImageFeatures:
    return embed_images(Embedder(model.clip, model.image_processor), images, progress=False, **options)


@pytest.fixture
def few(splits: Any) -> LabelledImages:
    return LabelledImages(splits["test"].select(range(12)))


def test_equal_to_the_model_at_any_batch_size(model: Model, few: LabelledImages) -> None:
    inputs = model.image_processor(images=[few.image(index) for index in range(12)], return_tensors="pt")
    expected = model.get_image_features(inputs["pixel_values"])
    for size in (1, 5, 32):
        found = _embed(model, few, batch_size=size)
        assert found.image_embeds.shape == (1, 12, 192)
        torch.testing.assert_close(found.image_embeds[0], expected, atol=1e-4, rtol=1e-4)
        assert found.labels.tolist() == few.labels


def test_cache_is_used_and_keyed_by_content(
    model: Model, few: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _embed(model, few, cache_dir=tmp_path)
    calls: list[int] = []
    real = Embedder.stream_found
    monkeypatch.setattr(Embedder, "stream_found", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = _embed(model, few, cache_dir=tmp_path)
    assert not calls
    assert torch.equal(first.image_embeds, again.image_embeds)
    assert again.digest == first.digest
    part = _embed(model, few.select([3, 1]), cache_dir=tmp_path)  # some of them, in another order
    assert not calls
    assert torch.equal(part.image_embeds, first.image_embeds[:, [3, 1]])
    _embed(model, few, cache_dir=tmp_path, views=1)  # augmented
    with torch.no_grad():
        model.clip.visual_projection.weight.mul_(2)  # other weights
    _embed(model, few, cache_dir=tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("setting", ["activation", "epsilon", "heads"])
def test_the_same_weights_told_otherwise_have_embeddings_of_their_own(
    model: Model, few: LabelledImages, tmp_path: Path, setting: str
) -> None:
    """As where a config.json with the wrong activation was mended."""
    before = _embed(model, few, cache_dir=tmp_path).image_embeds
    vision: Any = model.clip.vision_model
    for layer in vision.encoder.layers:
        if setting == "activation":
            layer.mlp.activation_fn = torch.nn.ReLU()
        elif setting == "epsilon":
            layer.layer_norm1.eps = 0.1
        else:
            layer.self_attn.num_heads, layer.self_attn.head_dim = 12, 16
            layer.self_attn.scale = 0.25
    after = _embed(model, few, cache_dir=tmp_path).image_embeds
    assert not torch.allclose(after, before, atol=0.01)
    assert torch.equal(after, _embed(model, few).image_embeds)


@pytest.mark.parametrize(
    ("part", "key", "value"), [("vision_config", "hidden_act", "gelu"), ("", "problem_type", None)]
)
def test_what_has_no_weight_has_embeddings_of_its_own(
    base: str, few: LabelledImages, tmp_path: Path, part: str, key: str, value: Any
) -> None:
    """Two checkpoints of the same weights and other activations, as with and without QuickGELU, are two towers."""
    first = _embed(Model.from_base(base, ["a", "b"]), few, cache_dir=tmp_path / "cache")
    config = json.loads(Path(base, "config.json").read_text())
    (config[part] if part else config)[key] = value
    (shutil.copytree(base, tmp_path / "other") / "config.json").write_text(json.dumps(config))
    other = Model.from_base(str(tmp_path / "other"), ["a", "b"])
    found = _embed(other, few, cache_dir=tmp_path / "cache")
    assert torch.equal(found.image_embeds, _embed(other, few).image_embeds)
    assert torch.equal(found.image_embeds, first.image_embeds) == (not part)


@pytest.mark.parametrize("exact", [False, True])
def test_an_image_processor_that_is_changed_later_counts(
    base: str, few: LabelledImages, tmp_path: Path, exact: bool
) -> None:
    model = Model.from_base(base, ["a", "b"])
    embedder = Embedder(model.clip, model.image_processor, exact_preprocessing=exact)
    embed_images(embedder, few, cache_dir=tmp_path, progress=False)
    model.image_processor.image_mean, model.image_processor.size = [0.1, 0.2, 0.3], {"shortest_edge": 80}
    fresh = Embedder(model.clip, model.image_processor, exact_preprocessing=exact)
    expected = embed_images(fresh, few, progress=False).image_embeds
    assert torch.equal(embedder([few.image(0)]), fresh([few.image(0)]))
    assert torch.equal(embed_images(embedder, few, cache_dir=tmp_path, progress=False).image_embeds, expected)
    assert torch.equal(embed_images(fresh, few, cache_dir=tmp_path, progress=False).image_embeds, expected)


def test_digest_tells_labels_apart(model: Model, few: LabelledImages) -> None:
    other = few.select(range(12))
    other.labels = [*few.labels[:-1], 7 - few.labels[-1]]
    assert _embed(model, few).digest != _embed(model, other).digest


def test_a_damaged_cache_is_made_again(model: Model, few: LabelledImages, tmp_path: Path) -> None:
    first = _embed(model, few, cache_dir=tmp_path)
    file = next(path for path in tmp_path.glob("*/*.safetensors") if path.parent.name != "files")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="computed again"):
        again = _embed(model, few, cache_dir=tmp_path)
    assert torch.equal(first.image_embeds, again.image_embeds)


def test_views_differ_and_follow_the_seed(model: Model, few: LabelledImages) -> None:
    views = _embed(model, few, views=3, seed=5)
    assert views.image_embeds.shape == (3, 12, 192)
    assert not torch.allclose(views.image_embeds[0], views.image_embeds[1])
    assert torch.equal(_embed(model, few, views=3, seed=5).image_embeds, views.image_embeds)
    assert not torch.equal(_embed(model, few, views=3, seed=6).image_embeds, views.image_embeds)


def test_augmentation_is_crop_and_flip(few: LabelledImages) -> None:
    pictures = [augment(few.image(0), (32, 48), random.Random(seed)) for seed in range(20)]
    assert {picture.size for picture in pictures} == {(48, 32)}
    assert len({picture.tobytes() for picture in pictures}) == 20
    assert augment(few.image(0).resize((4000, 4)), (8, 8), random.Random(0)).size == (8, 8)


@pytest.mark.parametrize(("exact", "held"), [(False, 6), (True, 2)])
def test_whole_pictures_are_held_only_a_batch_at_a_time(
    model: Model, few: LabelledImages, exact: bool, held: int
) -> None:
    embedder = Embedder(model.clip, model.image_processor, exact_preprocessing=exact)
    seen: list[int] = []
    batches = iter([[0, 1], [2, 3], [4, 5]])
    stream = embedder.stream(batches, lambda index: (seen.append(index), few.image(index))[1], augmented=False)
    next(stream)
    assert len(seen) == held
    assert len(list(stream)) == 2


def _streamed(stream: Any) -> list[tuple[list[int], torch.Tensor | None]]:
    return [(list(batch), embeds) for batch, embeds in stream]


def test_every_way_to_stream_gives_the_same_in_order(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = Embedder(model.clip, model.image_processor)
    batches = [[0, 1, 2], [], [3], [4, 5], [6, 7, 8, 9]]

    def load(index: int) -> Any:
        time.sleep(0.01 * (9 - index))  # the first are the last to be ready
        return None if index == 3 else few.image(index)

    found = {}
    for cores in (1, 2, 9):  # taking turns; every core for itself; more cores than batches
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        found[cores] = _streamed(embedder.stream(batches, load, augmented=False))
    beside_a_device(monkeypatch)
    embedder = Embedder(model.clip, model.image_processor)
    found[0] = _streamed(embedder.stream(batches, load, augmented=False))
    for ways in found.values():
        assert [batch for batch, _ in ways] == batches
        for (_, embeds), (_, expected) in zip(ways, found[1], strict=True):
            assert (embeds is None) == (expected is None)
            if embeds is not None:
                torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=1e-4)
    assert found[2][1][1] is found[2][2][1] is None  # an empty batch, and one that cannot be read


def test_one_core_decodes_while_another_runs_the_tower(
    model: Model, few: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    embedder = Embedder(model.clip, model.image_processor)
    embedder.get_ready()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    decoding, running = threading.Event(), threading.Event()
    real = embedder.engine._run

    def run(inputs: Any) -> torch.Tensor:
        running.set()
        assert decoding.wait(20), "nobody decodes meanwhile"
        return real(inputs)

    def load(index: int) -> Any:
        if index == 1:
            assert running.wait(20), "the tower does not run meanwhile"
            decoding.set()
        return few.image(index)

    embedder.engine.__dict__["_run"] = run
    assert len(_streamed(embedder.stream([[0], [1], [2]], load, augmented=False))) == 3
    monkeypatch.undo()
    torch.set_num_threads(threads)

    def fail(index: int) -> Any:
        raise ValueError("a bug in load")

    with pytest.raises(ValueError, match="a bug"):
        _streamed(embedder.stream([[0], [1], [2]], fail, augmented=False))
    assert torch.get_num_threads() == threads  # also of threads to come
    counts: list[int] = []
    other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [threads]


def _with_broken() -> LabelledImages:
    import io

    import PIL.Image

    stream = io.BytesIO()
    PIL.Image.new("RGB", (20, 20), (9, 99, 200)).save(stream, "PNG")
    cells = [
        {"bytes": stream.getvalue(), "path": None},
        {"bytes": b"not a picture", "path": "broken.jpg"},
        {"bytes": None, "path": "missing.jpg"},
        {"bytes": stream.getvalue(), "path": None},
    ]
    data = Dataset.from_dict(
        {"image": cells, "label": ["a", "b", "a", "b"]},
        Features({"image": Image(decode=False), "label": Value("string")}),
    )
    return LabelledImages(data)


_BOTH = r"(?s)2 of 4.*Row 1: 'broken.jpg'.*Row 2: 'missing.jpg'"


def test_unreadable_pictures_are_all_named(model: Model) -> None:
    with pytest.raises(ImageError, match=_BOTH):
        _embed(model, _with_broken())


def test_unreadable_pictures_can_be_skipped(model: Model, tmp_path: Path) -> None:
    messages = []
    for _ in range(3):  # made, then read from the cache: the same names and counts
        with pytest.warns(UserWarning, match=_BOTH) as seen:
            found = _embed(model, _with_broken(), on_error="skip", cache_dir=tmp_path)
        messages.append([re.sub("0x[0-9a-f]+", "", str(warning.message)) for warning in seen])
        assert found.skipped == (1, 2)
        assert found.labels.tolist() == [0, 1]
        with pytest.raises(ImageError, match=_BOTH):
            _embed(model, _with_broken(), cache_dir=tmp_path)
    assert messages[0] == messages[1] == messages[2]
    for size in (1, 2, 3):  # in batches without any, or with some that can be read
        with pytest.warns(UserWarning, match="left out"):
            again = _embed(model, _with_broken(), on_error="skip", batch_size=size)
        torch.testing.assert_close(again.image_embeds, found.image_embeds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("rows", [[1], [2], [1, 2]])
def test_where_no_picture_can_be_read_all_are_named(model: Model, rows: list[int], on_error: str) -> None:
    with pytest.raises(ImageError, match="None of the pictures") as error:
        _embed(model, _with_broken().select(rows), on_error=on_error)
    assert all(f"Row {row}: " in str(error.value) for row in rows)


@pytest.mark.parametrize("views", [0, 2])
def test_a_read_error_does_not_last(
    model: Model, few: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    """A drive that hiccups once, whether when a picture is read or when it is decoded."""
    embedder = Embedder(model.clip, model.image_processor)
    few = few.select(range(8))
    expected = embed_images(embedder, few, views=views, progress=False)
    for method in ("read", "image"):
        cache = tmp_path / method
        with monkeypatch.context() as patch:
            real = getattr(LabelledImages, method)

            def hiccup(self: LabelledImages, index: int, *rest: Any, real: Any = real) -> Any:
                if index == 5:
                    raise ImageError(f"Row {index}: the drive hiccups")
                return real(self, index, *rest)

            patch.setattr(LabelledImages, method, hiccup)
            with pytest.raises(ImageError, match="Row 5: the drive hiccups"):
                embed_images(embedder, few, views=views, cache_dir=cache, progress=False)
        again = embed_images(embedder, few, views=views, cache_dir=cache, progress=False)
        assert torch.equal(again.image_embeds, expected.image_embeds)
        assert again.digests == expected.digests


def test_broken_pictures_need_no_tower(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="left out"):
        _embed(model, _with_broken(), on_error="skip", cache_dir=tmp_path)
    monkeypatch.setattr(Embedder, "get_ready", lambda *a: pytest.fail("the tower is not needed"))
    with pytest.warns(UserWarning, match="left out"):
        assert len(_embed(model, _with_broken(), on_error="skip", cache_dir=tmp_path)) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_picture_does_not_depend_on_its_neighbours(model: Model, few: LabelledImages, precision: str) -> None:
    """Few pictures are multiplied as many are, so that the draw for training is, to the bit, part of the whole set."""
    embedder = Embedder(model.clip, model.image_processor, "torch", precision)
    whole = embed_images(embedder, few, progress=False)
    for rows in ([7], [3, 1], list(range(11))):
        part = embed_images(embedder, few.select(rows), progress=False)
        assert torch.equal(part.image_embeds, whole.image_embeds[:, rows])


def test_hooks_take_part_and_nothing_is_cached(model: Model, few: LabelledImages, tmp_path: Path) -> None:
    """What training sees is what `pipeline` sees, also with a hook that came after the engine."""
    embedder = Embedder(model.clip, model.image_processor)
    before = embed_images(embedder, few, cache_dir=tmp_path, progress=False)
    files = sorted(tmp_path.rglob("*"))
    layer = model.clip.vision_model.encoder.layers[1]
    layer.mlp.fc1.register_forward_hook(lambda module, inputs, output: -2 * output)
    with pytest.warns(UserWarning, match=r"not cached|layers\.1\.mlp\.fc1"):
        after = embed_images(embedder, few, cache_dir=tmp_path, progress=False)
    inputs = model.image_processor(images=[few.image(index) for index in range(12)], return_tensors="pt")
    expected = model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(after.image_embeds[0], expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(after.image_embeds, before.image_embeds, atol=0.1)
    assert sorted(tmp_path.rglob("*")) == files


def test_bad_settings(model: Model, few: LabelledImages) -> None:
    with pytest.raises(ConfigurationError, match="views"):
        _embed(model, few, views=-1)
    with pytest.raises(ConfigurationError, match="on_error"):
        _embed(model, few, on_error="explode")


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_some_rows_are_read_as_they_stand(model: Model, splits: Any, tmp_path: Path, dtype: Any) -> None:
    data = _stored(model, splits, tmp_path, dtype)
    data._BLOCK = 16  # type: ignore[misc]
    table = torch.from_numpy(np.load(tmp_path / "embeds.npy").astype(np.float32))
    for rows in ([0], [15, 16, 17, 100, 178], list(range(179))):
        assert torch.equal(data.read(torch.tensor(rows)), table[rows])


def test_a_part_of_a_file_is_balanced_and_spread(tmp_path: Path) -> None:
    labels = [0] * 40 + [1] * 3 + [2] * 57
    np.save(tmp_path / "embeds.npy", np.zeros((100, 4), np.float32))
    data = StoredFeatures(tmp_path / "embeds.npy", labels, ["a", "b", "c"])
    rows = data.spread(20)
    assert data.labels[rows].bincount().tolist() == [8, 3, 8]  # as many of each as fit, and all of the small class
    assert rows[:8].tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert torch.equal(data.spread(100), torch.arange(100))


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


# ---------------------------------------------------------------------- several processes


class _Process:
    """One of several processes, as `accelerate.Accelerator` shows them; here threads."""

    def __init__(self, rank: int, world: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")
        self.is_main_process = rank == 0
        self.shared, self.barrier = shared, barrier

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shared[self.process_index] = tensor
        self.barrier.wait(60)
        everyone = torch.cat(self.shared)
        self.barrier.wait(60)
        return everyone


def _in_processes(world: int, embed: Any) -> list[Any]:
    """What `embed(rank, accelerator)` gives, or the error it raises, in each of several processes at once."""
    shared, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def work(rank: int) -> None:
        try:
            results[rank] = embed(rank, _Process(rank, world, shared, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("views", [0, 2])
def test_every_process_has_the_whole_and_names_what_another_could_not_read(
    model: Model, tmp_path: Path, views: int
) -> None:
    embedders = [Embedder(model.clip, model.image_processor) for _ in range(2)]
    alone = _with_broken().select([0, 3])
    expected = embed_images(embedders[0], alone, views=views, progress=False).image_embeds

    def embed(rank: int, accelerator: Any, on_error: str = "skip") -> Any:
        # Folders of their own, as on machines that share no disk: only the first keeps anything.
        folder, options = tmp_path / str(rank), {"on_error": on_error, "accelerator": accelerator, "progress": False}
        return embed_images(embedders[rank], _with_broken(), views=views, cache_dir=folder, **options)

    with pytest.warns(UserWarning, match=_BOTH):
        # Made, then read by one and made again by the other.
        results = [*_in_processes(2, embed), *_in_processes(2, embed)]
    for found in results:
        torch.testing.assert_close(found.image_embeds, expected, atol=1e-4, rtol=1e-4)
        assert found.skipped == (1, 2)
    for error in _in_processes(2, lambda rank, accelerator: embed(rank, accelerator, "raise")):
        assert isinstance(error, ImageError)
        assert re.search(_BOTH, str(error))
