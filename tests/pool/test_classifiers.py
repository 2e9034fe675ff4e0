"""What a pool answers is what each classifier's own model answers, of one version, whatever is exchanged meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from support import copied, forge, random_residual, same_predictions
from transformers import pipeline

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification, base_model
from taskres_hf.demo import demo_dataset
from taskres_hf.errors import ArtifactError, BaseMismatchError, ConfigurationError, ImageError, TaskResError
from taskres_hf.pool import PoolView
from taskres_hf.pool import bases as pool_bases

Model = TaskResCLIPForImageClassification


@pytest.fixture(scope="module")
def pool(folders: Path) -> ClassifierPool:
    return ClassifierPool.from_folders(folders)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1))


def test_every_classifier_answers_as_its_own_model(pool: Any, models: dict[str, Any], embeds: torch.Tensor) -> None:
    wanted = {name: model(image_embeds=embeds).logits.detach() for name, model in models.items()}
    found = pool(image_embeds=embeds)
    assert list(found) == pool.names == sorted(models)
    assert all(close(found[name], wanted[name]) for name in models)
    some = pool.logits(embeds, ["many", "pair", "image-side"])  # a large part, and a small one: two ways to multiply
    few = pool.logits(embeds, ["tags", "half"])
    assert list(some) == ["many", "pair", "image-side"]
    assert all(close(logits, wanted[name]) for name, logits in {**some, **few}.items())


def test_every_picture_by_its_own_classifier(pool: Any, models: dict[str, Any], embeds: torch.Tensor) -> None:
    names = [list(models)[place % 7 if place < 14 else 7 + place % 3] for place in range(len(embeds))]
    found = pool.logits_of_each(embeds, names)
    for name, row, one in zip(names, found, embeds, strict=True):
        assert close(row[None], models[name](image_embeds=one[None]).logits.detach()), name
    assert pool.logits_of_each(embeds[:0], []) == []
    with pytest.raises(ConfigurationError, match="for each picture: got 1 for 20"):
        pool.logits_of_each(embeds, ["pair"])


def test_pictures_are_classified_as_by_pipeline(pool: ClassifierPool, folders: Path) -> None:
    pictures = [row["image"].convert("RGB") for row in demo_dataset("food")["test"].select(range(3))]
    names = ["many", "tags", "pair", "linear"]
    found = pool.classify(pictures, names, top_k=4)
    own = pool.classify(pictures, each=["many", "tags", "many"], top_k=4)
    for name in names:
        wanted = pipeline("image-classification", model=str(folders / name))(pictures, top_k=4)
        assert all(same_predictions(row[name], answers) for row, answers in zip(found, wanted, strict=True))
        assert same_predictions(own[0], wanted[0]) or name != "many"
    tags = pool.classify(pictures, ["tags"])
    assert all(answer["score"] >= 0.4 for row in tags for answer in row["tags"])  # its own threshold
    assert len(pool.classify(pictures[0], ["many"])[0]["many"]) == 1


def test_pixels_pass_the_base_once(pool: ClassifierPool, models: dict[str, Any], pixel_values: torch.Tensor) -> None:
    calls: list[int] = []
    hook = pool.clip.vision_model.register_forward_hook(lambda *_: calls.append(1))
    found = pool(pixel_values)
    hook.remove()
    assert len(calls) == 1
    assert all(close(found[name], model(pixel_values).logits.detach()) for name, model in models.items())
    with pytest.raises(ConfigurationError, match="both or neither"):
        pool()


def test_rejection_is_each_classifiers_own(pool: ClassifierPool, models: dict[str, Any], embeds: torch.Tensor) -> None:
    found = pool.rejects(embeds)
    assert list(found) == ["rejecting"]
    assert found["rejecting"].tolist() == models["rejecting"].rejects(image_embeds=embeds).tolist()
    assert 0 < int(found["rejecting"].sum()) < len(embeds)
    with pytest.raises(ConfigurationError, match="'many' has no threshold"):
        pool.rejects(embeds, ["rejecting", "many"])


def test_no_base_is_loaded_again(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ClassifierPool.from_folders(folders)  # from here on every text embedding is known
    towers: list[str] = []
    load = base_model.load_image_tower

    def counted(*arguments: Any, **options: Any) -> Any:
        towers.append("image tower")
        return load(*arguments, **options)

    monkeypatch.setattr("taskres_hf.base_classifier.load_image_tower", counted)
    monkeypatch.setattr("taskres_hf.base_classifier.load_base_fp32", lambda *_: pytest.fail("the whole base"))
    monkeypatch.setattr(pool_bases, "unrounded_text_side", lambda *_: pytest.fail("the text tower"))
    pool = ClassifierPool.from_folders(folders)
    assert towers == ["image tower"]
    assert len(pool) == 10
    held = sum(len(pool[name].class_names) for name in pool)
    assert pool.view().weight.untyped_storage().nbytes() == 4 * 192 * held


@pytest.mark.filterwarnings("ignore:.*no longer")
def test_text_embeddings_that_are_not_known_are_made(folders: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))
    pool = ClassifierPool.from_folders(folders)
    assert pool.view().logits(torch.ones(1, 192))["pair"].shape == (1, 2)
    assert len(list(tmp_path.glob("base_classifiers/*"))) == len(pool)  # kept for the next time
    assert pool._base is not None
    assert pool._base._text is None


def test_put_in_exchange_and_take_out(folders: Path, models: dict[str, Any], embeds: torch.Tensor) -> None:
    pool = ClassifierPool()
    assert (len(pool), pool.names, "pair" in pool, pool.logits(embeds)) == (0, [], False, {})
    with pytest.raises(ConfigurationError, match="no base yet"):
        pool.embed([])
    pool.add("a", folders / "residual")
    pool.update([f"b={folders / 'half'}", models["linear"]])  # a model is named after where it came from
    assert pool.names == ["a", "b", "linear"]
    before = pool.view()
    pool.add("a", folders / "many")
    pool.remove("b", "linear")
    assert pool.names == ["a"]
    assert before.names == ["a", "b", "linear"]
    assert close(before.logits(embeds)["a"], models["residual"](image_embeds=embeds).logits.detach())
    assert close(pool.logits(embeds)["a"], models["many"](image_embeds=embeds).logits.detach())
    for number in range(30):  # rows that nobody names any more do not pile up
        pool.add("a", folders / ("pair" if number % 2 else "many"))
    assert len(pool.view().weight) == 2
    assert close(pool.logits(embeds)["a"], models["pair"](image_embeds=embeds).logits.detach())
    with pytest.raises(ConfigurationError, match=r"no classifier 'b' .*There are: a\."):
        pool.remove("a", "b")
    assert pool.names == ["a"]
    assert "1 classifiers, 2 classes" in repr(pool)


def test_training_on_does_not_change_what_was_put_in(model: Model, embeds: torch.Tensor) -> None:
    pool = ClassifierPool(model, {"mine": random_residual(model)})
    before = pool.logits(embeds)["mine"]
    random_residual(model, 5)
    assert torch.equal(pool.logits(embeds)["mine"], before)
    pool.add("mine", model)
    assert close(pool.logits(embeds)["mine"], model(image_embeds=embeds).logits.detach())


def test_threads_that_exchange_never_mix_two_versions(base: str) -> None:
    """Two names that are exchanged together; each version is marked by a bias, and by a number of classes."""
    versions: list[dict[str, Any]] = []
    clip: Any = base
    for mark in (100.0, 200.0, 300.0):
        made = {}
        for name in ("left", "right"):
            model = Model.from_base(clip, [f"{mark:g} {number}" for number in range(int(mark) // 100 + 1)])
            rows = torch.nn.functional.normalize(model.classifier.base, dim=1)
            model.classifier.set_weight(rows, class_bias=torch.full((len(rows),), mark))
            made[name], clip = model, model.clip
        versions.append(made)
    pool, over, found = ClassifierPool(classifiers=versions[0]), threading.Event(), []
    image = torch.ones(4, 192)

    def ask() -> None:
        while not over.is_set():
            view = pool.view()
            both = view.logits(image)
            marks = {round(float(value), -2) for logits in both.values() for value in logits.flatten()}
            each = pool.logits_of_each(image, ["left", "right", "left", "right"])
            marks_of_each = {round(float(value), -2) for logits in each for value in logits}
            sizes = {len(view[name].class_names) for name in view} | {logits.shape[1] for logits in both.values()}
            labels = {top["label"].split()[0] for top in view.predictions("left", both["left"])[0]}
            found.append((marks, len(marks_of_each), sizes, labels))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(80):
        pool.update(versions[number % 3])
    while len(found) < 30 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert len(found) >= 30
    for marks, of_each, sizes, labels in found:
        (mark,) = marks
        assert of_each == 1
        assert sizes == {int(mark) // 100 + 1}
        assert labels == {f"{mark:g}"}
    assert len({tuple(marks) for marks, *_ in found}) > 1


def test_another_base_is_refused(folders: Path, stranger: Path, tmp_path: Path) -> None:
    pool = ClassifierPool(classifiers={"pair": folders / "pair"})
    with pytest.raises(BaseMismatchError, match=r"colours was not made for the base of this pool.*image towers"):
        pool.add("colours", stranger)
    with pytest.raises(BaseMismatchError, match="weights of its image tower"):
        pool.add("colours", Model.from_pretrained(stranger))
    edited = forge(copied(folders / "half", tmp_path / "edited"), templates=["a drawing of a {}."])
    with pytest.raises(BaseMismatchError, match="not those the residual was trained with") as caught:
        pool.add("edited", edited)
    assert "accept_base_mismatch" not in str(caught.value)
    assert pool.names == ["pair"]


def test_another_image_processor_is_refused(folders: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(folders / "half")
    model.image_processor.image_mean = [0.0, 0.0, 0.0]
    model.save_pretrained(tmp_path / "grey")
    pool = ClassifierPool(classifiers={"pair": folders / "pair"})
    for source in (tmp_path / "grey", model):
        with pytest.raises(ConfigurationError, match="prepares pictures otherwise"):
            pool.add("grey", source)


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "<script>", "=cmd()", "a\x1b[31m", "x" * 101, 3])
def test_hostile_names_are_refused(name: Any, folders: Path) -> None:
    pool = ClassifierPool()
    with pytest.raises(ConfigurationError, match="cannot be called") as caught:
        pool.add(name, folders / "pair")
    assert "\x1b" not in str(caught.value)
    assert len(pool) == 0


def test_what_cannot_be_read_changes_nothing(folders: Path, tmp_path: Path, embeds: torch.Tensor) -> None:
    pool = ClassifierPool(classifiers={"pair": folders / "pair"})
    damaged = copied(folders / "half", tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        pool.update({"two": folders / "many", "three": damaged})
    untrained = Model.from_base(pool.clip if pool.clip is None else str(pool._base.name), ["a", "b"])  # type: ignore
    untrained.config.problem_type = "multi_label_classification"
    with pytest.raises(ConfigurationError, match="not trained"):
        pool.add("tags", untrained)
    assert pool.names == ["pair"]
    with pytest.raises(ArtifactError, match="There is no folder"):
        ClassifierPool.from_folders(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is a classifier"):
        ClassifierPool.from_folders(folders / "pair")
    with pytest.raises(ConfigurationError, match=r"must be \[N, 192\]"):
        pool.logits(embeds[:, :100])
    with pytest.raises(ConfigurationError, match="1 of 20 embeddings hold NaN"):
        pool.logits(embeds.where(torch.arange(20)[:, None] != 3, torch.nan))
    with pytest.raises(ConfigurationError, match="must be a list of names"):
        pool.logits(embeds, "pair")
    with pytest.raises(ConfigurationError, match="either names"):
        pool.classify([], ["pair"], each=["pair"])
    with pytest.raises(ImageError):
        pool.classify(["no-such.jpg"], ["pair"])


def test_files_that_cannot_be_read_are_rows(pool: ClassifierPool, tmp_path: Path) -> None:
    demo_dataset("food")["test"][0]["image"].convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "bad.png"]
    rows = list(pool.classify_files(files, ["pair", "many"], batch_size=1))
    assert [row["error"] is None for row in rows] == [False, True, False]
    assert set(rows[1]["classifiers"]) == {"pair", "many"}
    assert rows[0]["classifiers"] == {}
    with pytest.raises(ConfigurationError, match="no classifier 'two'"):
        next(pool.classify_files(files, ["two"]))


def test_from_the_hub(hub: HubServer, folders: Path, base: str, embeds: torch.Tensor, pool: ClassifierPool) -> None:
    for name in ("half", "many"):
        hub.add_folder(f"me/{name}", folders / name)
    with pytest.raises(TaskResError, match="path from a"):  # a download names a folder of this machine as its base
        ClassifierPool.from_pretrained(["me/half", "me/many"])
    found = ClassifierPool.from_pretrained(["me/half", "me/many"], base=base)
    assert found.names == ["half", "many"]
    assert all(torch.equal(found.logits(embeds)[name], pool.logits(embeds, [name])[name]) or
               close(found.logits(embeds)[name], pool.logits(embeds, [name])[name]) for name in found)  # fmt: skip


def test_a_base_given_as_a_model_or_a_classifier(folders: Path, models: dict[str, Any], embeds: torch.Tensor) -> None:
    wanted = models["half"](image_embeds=embeds).logits.detach()
    for given in (models["many"], models["many"].clip):
        pool = ClassifierPool(given, {"half": folders / "half"})
        assert pool.clip is models["many"].clip
        assert close(pool.logits(embeds)["half"], wanted)
    assert isinstance(pool.view(), PoolView)


def test_who_did_not_get_in_leaves_no_base_behind(folders: Path, stranger: Path) -> None:
    pool = ClassifierPool()
    with pytest.raises(BaseMismatchError):
        pool.update({"colours": stranger, "pair": folders / "pair"})
    pool.add("pair", folders / "pair")
    assert pool.names == ["pair"]
