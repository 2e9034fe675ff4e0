"""A packed file gives back the very artifacts, loads without a text tower, and is refused when it is not whole."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import copied

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification
from taskres_hf.errors import ArtifactError, ConfigurationError
from taskres_hf.pool import Pack, pack, pack_with_base, unpack
from taskres_hf.pool import bases as pool_bases
from taskres_hf.pool.classifiers import load_packed
from taskres_hf.pool.packing import described
from taskres_hf.storage import read_tensors, write_tensors


@pytest.fixture(scope="module")
def packed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "pool.safetensors"
    pack_with_base(sorted(folders.iterdir()), file)
    return file


def changed(packed: Path, to: Path, **index: Any) -> Path:
    """A pack with something else in its index, sealed as whoever knows how would."""
    tensors, metadata = read_tensors(packed)
    write_tensors(to, tensors, {**metadata, "index": json.dumps({**json.loads(metadata["index"]), **index})})
    return to


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_unpacking_gives_the_very_files(packed: Path, folders: Path, tmp_path: Path) -> None:
    written = unpack(packed, tmp_path / "out")
    assert [folder.name for folder in written] == sorted(entry.name for entry in folders.iterdir())
    assert tree(tmp_path / "out") == tree(folders)
    assert sorted(entry.name for entry in (tmp_path / "some").parent.iterdir()) == ["out"]  # nothing is left over
    unpack(packed, tmp_path / "out2", ["half"])
    assert tree(tmp_path / "out2") == {f"half/{name}": text for name, text in tree(folders / "half").items()}


def test_what_they_have_in_common_is_there_once(packed: Path, folders: Path, tmp_path: Path) -> None:
    parts = json.loads(read_tensors(packed)[1]["index"])
    processors = {entry["files"]["preprocessor_config.json"] for entry in parts["classifiers"].values()}
    assert len(processors) == 1
    again = tmp_path / "again.safetensors"
    pack_with_base(sorted(folders.iterdir()), again)
    assert again.read_bytes() == packed.read_bytes()  # the same artifacts, the same file
    assert not pack(sorted(folders.iterdir()), tmp_path / "light.safetensors").has_base
    light, alone = (tmp_path / "light.safetensors").stat().st_size, sum(map(len, tree(folders).values()))
    assert light < 0.7 * packed.stat().st_size
    assert light < alone


def test_a_pool_from_a_pack_is_that_from_the_folders(
    packed: Path, folders: Path, embeds: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ClassifierPool.from_folders(folders).logits(embeds)
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "empty"))  # another machine, which knows no text embeddings
    with monkeypatch.context() as patch:
        patch.setattr(pool_bases, "unrounded_text_side", lambda *_: pytest.fail("the text tower"))
        pool = ClassifierPool.from_pretrained(packed)
        found = pool.logits(embeds)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    pack(sorted(folders.iterdir()), tmp_path / "light.safetensors")
    found = ClassifierPool.from_pretrained(Pack(tmp_path / "light.safetensors")).logits(embeds)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-3) for name in wanted)


def test_one_of_a_pack_is_a_model(packed: Path, models: dict[str, Any], embeds: torch.Tensor) -> None:
    model = load_packed(Pack(packed), "linear", base_model=models["linear"].clip)
    assert isinstance(model, TaskResCLIPForImageClassification)
    assert torch.allclose(model(image_embeds=embeds).logits, models["linear"](image_embeds=embeds).logits, atol=1e-4)
    assert model.image_processor.to_json_string() == models["linear"].image_processor.to_json_string()
    with pytest.raises(ConfigurationError, match="no classifier 'dogs'"):
        load_packed(Pack(packed), "dogs")


def test_what_is_in_it(packed: Path) -> None:
    rows = {row["name"]: row for row in described(Pack(packed))}
    assert rows["many"]["classes"] == 61
    assert rows["tags"]["several_labels"]
    assert rows["linear"]["base_model"].endswith("tiny-clip")


@pytest.mark.parametrize("part", ["head", "texts", "weights", "base", "end"])
def test_a_damaged_pack_is_refused(packed: Path, tmp_path: Path, part: str) -> None:
    content = bytearray(packed.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    if part in header:
        content[size + sum(header[part]["data_offsets"]) // 2] ^= 0x10
    elif part == "head":
        content[content.index(b"half")] ^= 1
    else:
        del content[-100:]
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Pack(tmp_path / "damaged.safetensors")


def _without_room(name: str = "half", **entry: Any) -> Any:
    def change(index: dict[str, Any]) -> dict[str, Any]:
        return {**index, name: {**index["half"], **entry}}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_room("../../evil"), "cannot be called"),
        (_without_room("<script>"), "cannot be called"),
        (_without_room("\x1b[31m"), "cannot be called"),
        (_without_room(data=[0, 10**9]), "index does not describe"),
        (_without_room(data=[-8, 8]), "index does not describe"),
        (_without_room(base=[3, 10**6]), "index does not describe"),
        (_without_room(files={"config.json": 0, "model.safetensors": 1, "../up.py": 2}), "index does not describe"),
        (_without_room(files={"config.json": 0, "model.safetensors": 10**6}), "index does not describe"),
        (_without_room(files={"config.json": 0}), "index does not describe"),
        (_without_room(more=1), "index does not describe"),
    ],
)
def test_a_forged_index_is_refused(packed: Path, tmp_path: Path, change: Any, message: str) -> None:
    index = change(json.loads(read_tensors(packed)[1]["index"])["classifiers"])
    with pytest.raises(ArtifactError, match=message) as caught:
        Pack(changed(packed, tmp_path / "forged.safetensors", classifiers=index))
    assert "\x1b" not in str(caught.value)


def test_forged_texts_and_tensors_are_refused(packed: Path, tmp_path: Path) -> None:
    to = tmp_path / "forged.safetensors"
    with pytest.raises(ArtifactError, match="more text than"):
        Pack(changed(packed, to, texts=[2**40]))
    bomb = torch.frombuffer(bytearray(zlib.compress(b"\0" * 2**22)), dtype=torch.uint8)
    tensors, metadata = read_tensors(packed)
    write_tensors(to, {**tensors, "texts": bomb}, metadata)
    with pytest.raises(ArtifactError, match="not as long as it says"):
        Pack(to)
    write_tensors(to, {"texts": tensors["texts"]}, metadata)
    with pytest.raises(ArtifactError, match="index does not describe"):
        Pack(to)
    write_tensors(to, tensors, {**metadata, "pack_version": "2"})
    with pytest.raises(ArtifactError, match="newer taskres_hf"):
        Pack(to)
    write_tensors(to, tensors, {"contents": "something"})
    with pytest.raises(ArtifactError, match="no packed file"):
        Pack(to)
    with pytest.raises(ArtifactError, match="does not exist"):
        Pack(tmp_path / "nothing.safetensors")
    # Another classifier's numbers under the config of this one: the artifact's own checksum tells.
    index = json.loads(metadata["index"])["classifiers"]
    swapped = {**index, "half": {**index["half"], "data": index["many"]["data"]}}
    for read in (lambda: Pack(to).read("half"), lambda: ClassifierPool.from_pretrained(to)):
        changed(packed, to, classifiers=swapped)
        with pytest.raises(ArtifactError):
            read()


def test_text_embeddings_of_other_classes_are_not_taken(packed: Path, tmp_path: Path, embeds: torch.Tensor) -> None:
    """Rows that do not fit the fingerprint are made again, from the prompts."""
    tensors, metadata = read_tensors(packed)
    to = tmp_path / "forged.safetensors"
    write_tensors(to, {**tensors, "base": tensors["base"].flip(0)}, metadata)
    wanted = ClassifierPool.from_pretrained(packed).logits(embeds)["half"]
    assert torch.allclose(ClassifierPool.from_pretrained(to).logits(embeds)["half"], wanted, atol=1e-3)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Cannot write"):
        pack(tmp_path / "missing", Path(__file__, "pool.safetensors"))


def test_what_cannot_be_packed(folders: Path, stranger: Path, tmp_path: Path) -> None:
    to = tmp_path / "pool.safetensors"
    with pytest.raises(ConfigurationError, match="different bases"):
        pack([folders / "half", stranger], to)
    other = TaskResCLIPForImageClassification.from_pretrained(folders / "half")
    other.image_processor.image_mean = [0.0, 0.0, 0.0]
    other.save_pretrained(tmp_path / "grey")
    with pytest.raises(ConfigurationError, match="prepare pictures differently"):
        pack([folders / "half", tmp_path / "grey"], to)
    with pytest.raises(ConfigurationError, match="Two classifiers would be called 'half'"):
        pack([folders / "half", folders / "half"], to)
    with pytest.raises(ConfigurationError, match="cannot be called"):
        pack({"../half": folders / "half"}, to)
    with pytest.raises(ConfigurationError, match="nothing to pack"):
        pack([], to)
    with pytest.raises(ConfigurationError, match=r"end in \.safetensors"):
        pack([folders / "half"], tmp_path / "pool.bin")
    mine = copied(folders / "half", tmp_path / "mine") / "model.safetensors"
    before = mine.read_bytes()
    with pytest.raises(ArtifactError, match=rf"is no packed file.*name its folder, .*{mine.parent.name}"):
        Pack(mine)
    with pytest.raises(ConfigurationError, match="would be lost"):
        pack([mine.parent], mine)
    assert mine.read_bytes() == before
    damaged = copied(folders / "half", tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")
    with pytest.raises(ArtifactError):
        pack([folders / "many", damaged], to)
    assert not to.exists()
    (copied(folders / "half", tmp_path / "with-more") / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"Not packed.*notes\.txt"):
        pack([tmp_path / "with-more"], to)


def test_what_is_there_is_not_overwritten(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "half").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="is there already"):
        unpack(packed, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["half"]
    with pytest.raises(ConfigurationError, match="no classifier 'dogs'"):
        unpack(packed, tmp_path / "new", ["dogs"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot unpack into"):
        unpack(packed, tmp_path / "file")
