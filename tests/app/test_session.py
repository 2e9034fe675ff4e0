"""What a person does in the app, without a browser."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow
import pytest
import torch
from hub_server import HubServer
from pyarrow import parquet

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments, load_training_data
from taskres_hf.app.looking import Backbone
from taskres_hf.app.session import Session
from taskres_hf.errors import ClassNamesError, ConfigurationError, DataError, HubError, ImageError
from taskres_hf.pictures import read_image
from taskres_hf.predicting import classify_files

NAMES = ["fruit", "vegetable", "prepared meal"]
ALL = 18


def _zipped(folder: Path, to: Path, *more: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
        for name, content in more:
            archive.writestr(name, content)
    return to


# ---------------------------------------------------------------------- classes


def test_classes_are_lines_or_commas(session: Session) -> None:
    session.set_classes(" fruit \n\nvegetable, prepared meal\n")
    assert session.class_names == NAMES


def test_a_folder_name_with_commas_stays_one_class(session: Session, food: Path) -> None:
    session.set_classes(["soup, stew", "fruit"])
    session.add_files([food / "class" / "fruit" / "0.png"], "soup, stew")
    session.set_classes("soup, stew\nfruit, drink", "a drawing of {}.")
    assert session.counts() == {"soup, stew": 1, "fruit": 0, "drink": 0}


@pytest.mark.parametrize("names", ["", "fruit", "fruit\nfruit", "fruit\n\n , "])
def test_too_few_classes_or_equal_ones_are_refused(session: Session, names: str) -> None:
    with pytest.raises(ClassNamesError):
        session.set_classes(names)
    assert session.class_names == []


def test_a_sentence_needs_a_place_for_the_class(session: Session) -> None:
    with pytest.raises(ConfigurationError, match=r"\{\}"):
        session.set_classes(NAMES, "a drawing")


def test_a_class_is_renamed_with_its_pictures(filled: Session, embedded: list[Any]) -> None:
    filled.set_classes(["ripe fruit", "vegetable", "prepared meal"])
    assert filled.counts() == {"ripe fruit": 6, "vegetable": 6, "prepared meal": 6}
    assert filled.templates == ["a drawing of {}."]
    assert not embedded


def test_a_class_with_pictures_is_never_lost(filled: Session) -> None:
    with pytest.raises(DataError, match=r"fruit \(6\)"):
        filled.set_classes(["vegetable", "prepared meal"])
    assert filled.counts() == dict.fromkeys(NAMES, 6)


def test_nothing_works_without_classes(session: Session, food: Path) -> None:
    with pytest.raises(ConfigurationError, match="Name the classes first"):
        session.classify([food / "new" / "fruit" / "0.png"])
    with pytest.raises(DataError, match="no class"):
        session.add_files([food / "new" / "fruit" / "0.png"], "fruit")


# ---------------------------------------------------------------------- pictures


def test_each_picture_passes_the_backbone_once(session: Session, food: Path, embedded: list[Any]) -> None:
    moves: list[float] = []
    added = session.add_tree(food / "class", lambda share, _: moves.append(share))
    assert (added.new, added.repeated, added.problems) == (ALL, 0, ())
    assert session.class_names == sorted(NAMES)
    assert moves[-1] == 1.0
    assert len(embedded) == ALL
    again = session.add_files((food / "class" / "fruit").iterdir(), "fruit")
    assert (again.new, again.repeated) == (0, 6)
    session.zero_shot()
    session.train()
    session.classify([food / "class" / "fruit" / "0.png"])
    assert len(embedded) == ALL


def test_embeddings_and_guesses_are_those_of_the_model(filled: Session, food: Path) -> None:
    picture = read_image(food / "class" / "fruit" / "0.png")
    pixels = filled.model.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    first = next(
        guess for guess in filled.zero_shot() if (guess.picture.label, guess.picture.name) == ("fruit", "0.png")
    )
    torch.testing.assert_close(first.picture.embeds, filled.model.get_image_features(pixels)[0], rtol=1e-4, atol=1e-4)
    scores = filled.model.zero_shot_logits(pixels).softmax(1)[0]
    assert first.label == NAMES[int(scores.argmax())]
    assert first.score == pytest.approx(float(scores.max()), abs=1e-3)


def test_what_cannot_be_read_is_named_and_the_rest_is_added(session: Session, food: Path, tmp_path: Path) -> None:
    good = food / "new" / "fruit" / "0.png"
    text, empty, cut = tmp_path / "notes.png", tmp_path / "empty.png", tmp_path / "cut.png"
    text.write_text("no picture")
    empty.touch()
    cut.write_bytes(good.read_bytes()[:400])
    session.set_classes(NAMES)
    added = session.add_files([text, good, empty, cut, tmp_path / "gone.png"], "fruit")
    assert added.new == 1
    for file, problem in zip((text, empty), added.problems, strict=False):
        with pytest.raises(ImageError) as expected:
            read_image({"bytes": file.read_bytes(), "path": file.name})
        assert str(expected.value) in added.problems, problem
    assert len(added.problems) == 4
    assert not any(str(tmp_path) in problem for problem in added.problems)  # no temporary folder in a message


def test_a_picture_has_one_class(filled: Session, food: Path) -> None:
    added = filled.add_files([food / "class" / "fruit" / "0.png"], "vegetable")
    assert added.new == 0
    assert "as fruit" in added.problems[0]
    assert filled.counts()["fruit"] == 6


def test_what_is_odd_about_pictures_is_said(session: Session, tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (40, 40), (255, 0, 0, 90)).save(tmp_path / "clear.png")
    session.set_classes(NAMES)
    assert "Transparent" in session.add_files([tmp_path / "clear.png"], "fruit").notes[0]


def test_an_archive_adds_classes_and_nothing_leaves_it(
    session: Session, food: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = b"\0" * 20_000_000
    path = _zipped(food / "class", tmp_path / "all.zip", ("../../evil.png", b"x"), ("fruit/bomb.png", bomb))
    session.set_classes(["Prepared_Meal", "drink"])
    added = session.add_tree(path)
    assert added.new == ALL
    assert session.class_names == ["Prepared_Meal", "drink", "fruit", "vegetable"]
    assert session.counts()["Prepared_Meal"] == 6
    told = "\n".join(added.notes)
    assert "leads out of the archive" in told
    assert "packed beyond belief" in told
    assert not list(tmp_path.rglob("evil*"))


def test_a_damaged_archive_is_an_error(session: Session, tmp_path: Path) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(DataError):
        session.add_tree(tmp_path / "cut.zip")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO(b""))
    with pytest.raises(DataError):
        session.add_tree(tmp_path / "flat.tar")


def test_a_folder_that_comes_file_by_file(session: Session, food: Path) -> None:
    files = [(str(file), f"class/{file.parent.name}/{file.name}") for file in (food / "class").rglob("*.png")]
    assert session.add_folder(files).new == ALL
    assert not list(session.folder.iterdir())
    for place in ("../fruit/1.png", "/etc/fruit/1.png", "C:/fruit/1.png", "a\\..\\..\\b.png", ""):
        with pytest.raises(DataError, match="not a place"):
            session.add_folder([(files[0][0], place)])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_reads_no_picture_of_this_machine(session: Session, food: Path, tmp_path: Path, kind: str) -> None:
    private = [str(food / "new" / name / "0.png") for name in NAMES[:2]]
    table, own = tmp_path / f"train.{kind}", food / "class" / "fruit" / "0.png"
    if kind == "csv":
        near = os.path.relpath(private[1], session.folder / "some-folder")
        table.write_text(f"file_name,label\n{private[0]},a\n{near},b\nown.png,b\n")
    elif kind == "jsonl":
        rows = zip([*private, "own.png"], "abb", strict=True)
        table.write_text("\n".join(json.dumps({"image": name, "label": label}) for name, label in rows))
    else:
        cells = [{"bytes": None, "path": name} for name in private] + [{"bytes": own.read_bytes(), "path": "own.png"}]
        parquet.write_table(pyarrow.table({"image": cells, "label": list("abb")}), table)
    files = [(str(table), table.name)] + [(str(own), "own.png")] * (kind != "parquet")
    added = session.add_folder(files)
    assert added.new == 1
    assert [problem for problem in added.problems if "outside" not in problem] == []
    assert session.counts() == {"a": 0, "b": 1}
    if kind == "jsonl":
        shutil.copyfile(own, tmp_path / "own.png")
        again = session.add_tree(table)
        assert (again.new, again.repeated, len(again.problems)) == (0, 1, 2)


def test_no_copy_of_a_table_stays_in_the_cache(session: Session, food: Path, tmp_path: Path) -> None:
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in (food / "new" / "fruit").iterdir()]
    parquet.write_table(pyarrow.table({"image": cells, "label": list("ab")}), tmp_path / "train.parquet")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*.arrow"))
    assert session.add_folder([(str(tmp_path / "train.parquet"), "photos/train.parquet")]).new == 2
    assert set(cache.rglob("*.arrow")) == before
    session.close()
    assert not session.folder.exists()


# ---------------------------------------------------------------------- training


def test_training_gives_what_the_trainer_gives(ready: Session, food: Path) -> None:
    filled, outcome = ready, ready.outcome
    assert outcome is not None
    model = filled.backbone.classifier(NAMES, templates="a drawing of {}.")
    data = load_training_data(food / "class", class_names=NAMES).train
    arguments = TaskResTrainingArguments(disable_tqdm=True, engine="torch")
    trainer = TaskResTrainer(model, arguments, data)
    trainer.train()
    torch.testing.assert_close(model.classifier.weight(), filled.model.classifier.weight(), rtol=1e-3, atol=1e-3)
    assert trainer.args.recipe == "auto"
    assert outcome.metrics["method"] == "cross-validation"
    assert outcome.metrics["num_images"] == ALL
    low, high = outcome.metrics["accuracy_interval"]
    assert low < outcome.metrics["accuracy"] < high
    right = sum(guess.is_right for guess in filled.zero_shot())
    assert outcome.metrics["zero_shot_accuracy"] == pytest.approx(right / ALL)


def test_mistakes_are_those_of_cross_validation(filled: Session) -> None:
    """A wrong label is among them, the surest first; correcting it and training again takes it off."""
    wrong = next(
        guess for guess in filled.zero_shot() if guess.is_right and guess.label == "fruit" and guess.score > 0.9
    )
    filled.relabel(wrong.picture.key, "vegetable")
    metrics = filled.train().metrics
    mistakes = filled.mistakes()
    assert len(mistakes) == round(ALL * (1 - metrics["accuracy"]))
    assert [guess.score for guess in mistakes] == sorted((guess.score for guess in mistakes), reverse=True)
    found = next(guess for guess in mistakes if guess.picture.key == wrong.picture.key)
    assert (found.picture.label, found.label) == ("vegetable", "fruit")
    filled.relabel(wrong.picture.key, "fruit")
    assert wrong.picture.key not in {guess.picture.key for guess in filled.mistakes()}
    filled.remove(mistakes[-1].picture.key)
    assert mistakes[-1].picture.key not in {guess.picture.key for guess in filled.mistakes()}
    with pytest.raises(DataError, match="gone"):
        filled.relabel(mistakes[-1].picture.key, "fruit")
    assert filled.is_stale
    with pytest.raises(DataError, match="changed since"):
        _ = filled.archive
    assert filled.train().metrics["num_images"] == ALL - 1
    assert not filled.is_stale


def test_what_was_trained_stays_where_a_new_one_cannot_be_saved(
    filled: Session, food: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, model, content = filled.train(), filled.model, filled.archive.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr("taskres_hf.app.session.write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            filled.train()
    assert (filled.outcome, filled.model, filled.is_trained) == (outcome, model, True)
    assert filled.archive.read_bytes() == content
    assert TaskResCLIPForImageClassification.from_pretrained(filled.artifact, base_model=filled.backbone.base)


def test_a_class_without_pictures_is_named(filled: Session) -> None:
    filled.set_classes([*NAMES, "drink"])
    with pytest.raises(DataError, match="drink"):
        filled.train()


def test_one_picture_of_each_class_trains_and_says_that_nothing_was_measured(session: Session, food: Path) -> None:
    session.set_classes(NAMES)
    for name in NAMES:
        session.add_files([food / "class" / name / "0.png"], name)
    outcome = session.train()
    assert outcome.metrics == {}
    assert "Nothing was measured" in " ".join(outcome.notes)
    assert session.mistakes() == []
    assert session.archive.is_file()


# ---------------------------------------------------------------------- using and keeping


def test_the_archive_answers_as_the_app_does(ready: Session, food: Path, tmp_path: Path) -> None:
    filled = ready
    files = sorted((food / "new").rglob("*.png"))
    with zipfile.ZipFile(filled.archive) as archive:
        archive.extractall(tmp_path)
    loaded = TaskResCLIPForImageClassification.from_pretrained(tmp_path / "classifier")
    assert loaded.config.metrics["method"] == "cross-validation"
    for answer, row in zip(filled.classify(files), classify_files(loaded, files, top_k=3), strict=True):
        assert [name for name, _ in answer.classes] == [one["label"] for one in row["predictions"]]
        for (_, score), one in zip(answer.classes, row["predictions"], strict=True):
            assert score == pytest.approx(one["score"], abs=1e-3)
        assert answer.zero_shot is not None
        assert not answer.known
    assert filled.classify([food / "class" / "fruit" / "0.png"])[0].known


def test_a_picture_that_cannot_be_read_has_an_error(filled: Session, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    (answer,) = filled.classify([tmp_path / "x.png"])
    assert "not a picture" in str(answer.error)


def test_a_session_can_begin_with_a_classifier(
    backbone: Backbone, trained: Path, splits: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(trained, base_model=backbone.base)
    session = Session(backbone, tmp_path / "session", model)
    assert session.class_names == spec["classes"]
    splits["test"][0]["image"].convert("RGB").save(tmp_path / "0.png")
    (answer,) = session.classify([tmp_path / "0.png"])
    (row,) = classify_files(model, [tmp_path / "0.png"])
    assert answer.classes[0][0] == row["predictions"][0]["label"]
    with pytest.raises(DataError, match="Nothing was trained"):
        _ = session.archive


def test_upload_with_the_login_of_the_machine(ready: Session, session: Session, hub: HubServer) -> None:
    with pytest.raises(DataError, match="Nothing was trained"):
        session.push("tester/food")
    with pytest.raises(ConfigurationError, match="name"):
        ready.push("  ")
    assert ready.push(" tester/food ").endswith("/tester/food")
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("tester/food"))
    assert hub.repos["models/tester/food"].private
    hub.read_only.add("other")
    with pytest.raises(HubError, match="still here") as refused:
        ready.push("other/food")
    assert str(ready.folder) not in str(refused.value)


def test_nothing_stays(filled: Session) -> None:
    folder = filled.folder
    assert folder.is_dir()
    filled.close()
    assert not folder.exists()
    assert not filled.pictures


def test_a_preview_is_small(filled: Session) -> None:
    sizes = [len(picture.preview) for picture in filled.pictures.values()]
    assert max(sizes) < 20_000
    assert all(math.isfinite(float(picture.embeds.sum())) for picture in filled.pictures.values())
