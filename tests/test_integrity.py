"""Damage and edits: whatever changed after a save is noticed, and what cannot be is whole."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from support import copied, forge, golden_v3, random_residual
from transformers import AutoModelForImageClassification, pipeline

from taskres_hf import TaskResCLIPForImageClassification, artifact
from taskres_hf.artifact import read_artifact, read_checked, write_artifact
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, HubError, TaskResError

Model = TaskResCLIPForImageClassification


def _load(folder: Path) -> None:
    Model.from_pretrained(folder)


@pytest.fixture
def newest(model: Model, tmp_path: Path) -> Path:
    return golden_v3(model, tmp_path / "newest")


@pytest.mark.parametrize("keep", [0, 4, 100, 6000])
def test_truncated_weights(trained: Path, tmp_path: Path, keep: int) -> None:
    folder = copied(trained, tmp_path / "a")
    (folder / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        _load(folder)


def test_a_flipped_bit(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        _load(folder)


def test_a_pickle_is_never_opened(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises((ArtifactError, OSError), match=r"model\.safetensors"):
        _load(folder)


@pytest.mark.parametrize("change", ["changed", "left out"])
def test_the_checksum_covers_the_bias(newest: Path, change: str) -> None:
    tensors = load_file(newest / "model.safetensors")
    bias = tensors.pop("class_bias")
    save_file(tensors if change == "left out" else {**tensors, "class_bias": bias + 1}, newest / "model.safetensors")
    with pytest.raises(ArtifactError, match="checksum"):
        _load(newest)


# ---------------------------------------------------------------------- edits


def _edit(file: Path, key: str, value: Any) -> None:
    values = json.loads(file.read_text())
    values[key] = value
    file.write_text(json.dumps(values))


EDITS = [
    ("config.json", "alpha", 0.7), ("config.json", "dtype", "bfloat16"), ("config.json", "logit_scale", 1.0),
    ("config.json", "id2label", {str(n + 1): str(n) for n in range(8)}), ("config.json", "a_key_of_mine", 1),
    ("config.json", "residual_sha256", "0" * 64), ("config.json", "processor_sha256", None),
    ("config.json", "library_versions", {}), ("config.json", "training", None), ("config.json", "alpha", True),
    ("preprocessor_config.json", "image_mean", [0.0, 0.0, 0.0]), ("preprocessor_config.json", "do_resize", False),
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "value"), EDITS)
def test_an_edit_is_refused_and_named(trained: Path, tmp_path: Path, file: str, key: str, value: Any) -> None:
    folder = copied(trained, tmp_path / "a")
    _edit(folder / file, key, value)
    for read in (describe, _load):
        with pytest.raises(ArtifactError, match=rf"{file} was changed .* in {key}: .*taskres sign"):
            read(folder)
    with pytest.raises(TaskResError):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("key", ["residual_sha256", "processor_sha256", "alpha"])
def test_a_key_that_is_deleted_is_missed(trained: Path, tmp_path: Path, key: str) -> None:
    folder = copied(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"was changed .* in {key}"):
        _load(folder)


def test_the_checksum_cannot_be_left_out(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="has lost its checksum"):
        _load(folder)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "\ufeff{}", "[]", "{", '{"a": ' * 3000, "1" * 5000, ""])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_file_that_is_no_object_of_ours(trained: Path, tmp_path: Path, file: str, text: str) -> None:
    folder = copied(trained, tmp_path / "a")
    for content in (text.encode(), b"\xff\xfe" + text.encode()):
        (folder / file).write_bytes(content)
        with pytest.raises(ArtifactError):
            _load(folder)


def test_a_processor_that_is_gone_or_another_beside_it(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    other = {"image_processor": {**processor, "image_mean": [0.0, 0.0, 0.0]}}
    (folder / "processor_config.json").write_text(json.dumps(other))
    with pytest.raises(ArtifactError, match="another image processor"):
        _load(folder)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        _load(folder)


def test_layout_is_no_edit(trained: Path, tmp_path: Path) -> None:
    """Another order of keys, other spaces and line ends, as of an editor or of git."""
    folder = copied(trained, tmp_path / "a")
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        text = json.dumps(dict(reversed(values.items())), indent=4).replace("\n", "\r\n")
        (folder / name).write_bytes(text.encode())
    _load(folder)


def test_the_pipeline_refuses_an_edited_processor(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    _edit(folder / "preprocessor_config.json", "image_mean", [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"preprocessor_config\.json was changed"):
        pipeline("image-classification", model=str(folder))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_an_edit_of_an_old_format_is_noticed(tmp_path: Path, version: str) -> None:
    folder = copied(Path(__file__).parent / "golden" / version, tmp_path / "a")
    describe(folder)
    _edit(folder / "config.json", "alpha", 0.7)
    with pytest.raises(ArtifactError, match=r"was changed .* in alpha"):
        describe(folder)


# ---------------------------------------------------------------------- saves beside loads


def _saved(folder: Path, value: float) -> None:
    """An artifact whose every part says the same number."""
    config = {
        "model_type": "taskres", "base_model_name_or_path": "some/base", "projection_dim": 3, "alpha": value,
        "base_fingerprint": {"shape": [2, 3]}, "logit_scale": 100.0, "id2label": {"0": "a", "1": "b"},
    }  # fmt: skip
    processor = json.dumps({"rescale_factor": value}).encode()
    write_artifact(folder, config, {"residual": torch.full((2, 3), value)}, {"preprocessor_config.json": processor})


def _parts(folder: Path) -> set[float]:
    config, tensors, processor = read_artifact(folder / "config.json", folder / "model.safetensors")
    assert processor is not None
    return {config["alpha"], float(tensors["residual"][0, 0]), processor["rescale_factor"]}


@pytest.mark.parametrize("old", ["sealed", "unsealed", "none"])
@pytest.mark.parametrize("cut", ["model.safetensors", "preprocessor_config.json", "config.json"])
def test_a_save_that_was_cut_leaves_one_artifact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cut: str, old: str
) -> None:
    """Killed before any of its files takes its place: the old artifact or the new one, its processor with it."""
    if old != "none":
        _saved(tmp_path, 1.0)
    if old == "unsealed":  # as an earlier version wrote it
        config = json.loads((tmp_path / "config.json").read_text())
        del config["processor_sha256"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "config": json.dumps(config)})
        assert _parts(tmp_path) == {1.0}
    real = artifact.os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / cut:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            _saved(tmp_path, 2.0)
    if old != "none":
        assert _parts(tmp_path) == ({1.0} if cut == "model.safetensors" else {2.0})
    else:
        with pytest.raises(ArtifactError):
            _parts(tmp_path)
    _saved(tmp_path, 4.0)
    assert _parts(tmp_path) == {4.0}


def _stop(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_save_that_was_cut_is_said_where_others_would_mix_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pipeline reads the processor's file by itself; `taskres sign` completes the save."""
    _saved(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "sync_folder", _stop)
        with pytest.raises(KeyboardInterrupt):
            _saved(tmp_path, 2.0)
    with pytest.warns(UserWarning, match="cut short.*taskres sign"):
        assert _parts(tmp_path) == {2.0}


def test_a_save_that_is_through_leaves_no_trace_of_the_earlier_one(model: Model, tmp_path: Path) -> None:
    """The same bytes as in a new folder; and what was there before is an edit like any other."""
    random_residual(model).save_pretrained(tmp_path / "a")
    earlier = (tmp_path / "a" / "config.json").read_bytes()
    model.classifier.alpha = 0.7
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "a" / "config.json").write_bytes(earlier)
    with pytest.raises(ArtifactError, match=r"was changed .* in alpha"):
        _load(tmp_path / "a")


def _keep_saving(folder: str, values: list[float], stop: Any) -> None:
    while not stop.is_set():
        for value in values:
            _saved(Path(folder), value)


def test_a_load_beside_saves_sees_one_artifact(tmp_path: Path) -> None:
    """Two processes save different artifacts into one folder, this one reads them."""
    folder = tmp_path / "a"
    context = multiprocessing.get_context("fork")
    stop, started = context.Event(), time.time()
    writers = [context.Process(target=_keep_saving, args=(str(folder), values, stop)) for values in ([1.0], [2.0, 4.0])]
    for writer in writers:
        writer.start()
    seen: set[float] = set()
    try:  # for a while, and until both were seen, however busy the machine
        while time.time() < started + 3 or (len(seen) < 3 and time.time() < started + 90):
            if (folder / "config.json").is_file():
                parts = _parts(folder)
                assert len(parts) == 1
                seen |= parts
    finally:
        stop.set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen == {1.0, 2.0, 4.0}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_the_processor_is_the_one_that_was_read_with_the_model(model: Model, trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    loaded = Model.from_pretrained(folder)
    model.image_processor.image_mean = [0.25, 0.25, 0.25]
    model.save_pretrained(folder)
    assert list(loaded.image_processor.image_mean) != [0.25, 0.25, 0.25]
    assert list(Model.from_pretrained(folder).image_processor.image_mean) == [0.25, 0.25, 0.25]


def test_values_of_a_config_that_was_read_before_a_save_do_not_mix_with_it(model: Model, tmp_path: Path) -> None:
    """As where AutoModel reads config.json, and the artifact is replaced before it reads the rest."""
    random_residual(model).save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    model.classifier.alpha = 0.7
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path, config=config).classifier.alpha == 0.7
    config.alpha = 0.9  # set on purpose
    assert Model.from_pretrained(tmp_path, config=config).classifier.alpha == 0.9


def test_files_of_a_download_are_of_one_commit(
    model: Model, base: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("tester/tiny-clip", Path(base))
    online = random_residual(Model.from_base("tester/tiny-clip", model.class_names))
    online.push_to_hub("tester/moving")
    expected, real = online.classifier.residual.detach().clone(), artifact._download

    def push_meanwhile(name: str, file: str, *rest: Any) -> str:
        path = real(name, file, *rest)
        if file == "config.json":
            monkeypatch.setattr(artifact, "_download", real)
            random_residual(online, 1).push_to_hub("tester/moving")
        return path

    monkeypatch.setattr(artifact, "_download", push_meanwhile)
    assert torch.equal(Model.from_pretrained("tester/moving").classifier.residual, expected)
    assert torch.equal(Model.from_pretrained("tester/moving").classifier.residual, online.classifier.residual)


def test_a_processor_that_does_not_arrive_is_not_taken_for_none(
    model: Model, base: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("tester/tiny-clip", Path(base))
    Model.from_base("tester/tiny-clip", model.class_names).push_to_hub("tester/animals")
    real = artifact._download

    def lost(name: str, file: str, *rest: Any) -> str:
        if file == "preprocessor_config.json":
            raise HubError("no connection")
        return real(name, file, *rest)

    monkeypatch.setattr(artifact, "_download", lost)
    with pytest.raises(HubError, match="no connection"):
        Model.from_pretrained("tester/animals")


# ---------------------------------------------------------------------- anything


def _mutated(content: bytes, generator: random.Random) -> bytes:
    changed, at = bytearray(content), generator.randrange(len(content))
    kind = generator.randrange(4)
    if kind == 0:
        changed[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        del changed[at : at + generator.randrange(1, 9)]
    else:
        changed[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 9)))
    return bytes(changed)


def test_any_byte_that_changes_is_noticed(trained: Path, tmp_path: Path) -> None:
    """What loads all the same says the same: a space in JSON."""
    folder = copied(trained, tmp_path / "a")
    expected = read_checked(folder / "config.json", folder / "model.safetensors")
    generator = random.Random(0)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        content = (folder / name).read_bytes()
        for _ in range(150):
            (folder / name).write_bytes(_mutated(content, generator))
            try:
                found = read_checked(folder / "config.json", folder / "model.safetensors")
            except ArtifactError:
                continue
            assert found == expected
        (folder / name).write_bytes(content)


_STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 2**70, "", "x", "\0", "\ud800", [], [None], {}, {"": None}, [[]], {"a": {"b": []}},
    float("nan"), "NaN", [1] * 3, {"0": 1},
]  # fmt: skip


def test_any_value_in_any_place_is_an_error_of_ours_or_loads(trained: Path, tmp_path: Path) -> None:
    """Also where the checksums are those of the changed values."""
    folder = copied(trained, tmp_path / "a")
    shared = Model.from_pretrained(folder, text_tower=True).clip
    config = json.loads((folder / "config.json").read_text())
    places = [(key,) for key in (*config, "attn_implementation", "_experts_implementation", "to_dict", "facts")]
    places += [(key, inner) for key, value in config.items() if isinstance(value, dict) for inner in list(value)[:8]]
    generator = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(120):
            changed = json.loads(json.dumps(config))
            *outer, last = generator.choice(places)
            (changed[outer[0]] if outer else changed)[last] = generator.choice(_STRANGE)
            forge(folder, **changed)
            with suppress(TaskResError):
                describe(folder)
                Model.from_pretrained(folder, base_model=shared)(image_embeds=torch.ones(1, 192))


def test_too_many_prompts_are_refused_before_any_is_embedded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = forge(copied(trained, tmp_path / "a"), templates=[f"a photo number {n} of a {{}}." for n in range(10_000)])
    monkeypatch.setattr("taskres_hf.base_classifier.encode_texts", lambda *args: pytest.fail("prompts were embedded"))
    with pytest.raises(TaskResError, match="templates"):
        _load(folder)
