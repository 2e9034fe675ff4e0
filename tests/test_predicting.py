"""Answers for picture files: whole, in order, in every format, and not lost when a run is stopped."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification, predicting, prediction_files
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.data.reading import FileCells
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import embed_images
from taskres_hf.errors import ArtifactError, ConfigurationError, ImageError
from taskres_hf.pictures import read_image
from taskres_hf.predicting import PredictionWriter, classify_files, classify_to_file
from taskres_hf.prediction_files import check_output, write_predictions

FORMATS = ("csv", "jsonl", "parquet")


@pytest.fixture(scope="module")
def classifier(trained: Path) -> TaskResCLIPForImageClassification:
    return TaskResCLIPForImageClassification.from_pretrained(trained)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, splits: Any) -> list[str]:
    """Eleven real pictures of different classes, and one that cannot be read among them."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [folder / f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        splits["test"][number * 13]["image"].convert("RGB").save(name)
    names[4].write_bytes(b"no picture")
    return [str(name) for name in names]


def _stopped(monkeypatch: pytest.MonkeyPatch, after: int, call: Any) -> None:
    """Make the call, and stop it after so many rows."""
    write = PredictionWriter.write

    def limited(self: PredictionWriter, row: Any) -> None:
        if self.rows == after:
            raise KeyboardInterrupt
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "write", limited)
        with pytest.raises(KeyboardInterrupt):
            call()


def _rows(path: Path) -> list[dict[str, Any]]:
    """File, label and error of each row, whatever the format."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
        return [{"file": row["file"], "label": row["label"] or None, "error": row["error"] or None} for row in table]
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{**row, "label": (row.pop("predictions") or [{"label": None}])[0]["label"]} for row in lines]
    return [
        {"file": row["file"], "label": (row["labels"] or [None])[0], "error": row["error"]}
        for row in pq.read_table(path).to_pylist()
    ]


# ---------------------------------------------------------------------- rows


def test_rows_stay_with_their_files(classifier: TaskResCLIPForImageClassification, files: list[str]) -> None:
    together = list(classify_files(classifier, files, top_k=2, batch_size=5))
    assert [row["file"] for row in together] == files
    assert [row["error"] is None for row in together] == [number != 4 for number in range(12)]
    for file, row in zip(files, together, strict=True):
        alone = next(classify_files(classifier, [file], top_k=2))
        assert [top["label"] for top in alone["predictions"]] == [top["label"] for top in row["predictions"]]
        scores = [top["score"] for top in row["predictions"]]
        assert [top["score"] for top in alone["predictions"]] == pytest.approx(scores, abs=1e-5)


def test_a_file_named_twice_that_is_readable_once(
    classifier: TaskResCLIPForImageClassification, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it is being written: the answers of the files after it must not be those of others."""
    expected = [row["predictions"] for row in classify_files(classifier, [files[0], files[1], files[2]])]
    reads: list[str] = []

    def read(file: str, **options: Any) -> PIL.Image.Image:
        reads.append(file)
        if reads.count(file) == 1 and file == files[0]:
            raise ImageError("not yet")
        return read_image(file, **options)

    monkeypatch.setattr(predicting, "read_image", read)
    rows = list(classify_files(classifier, [files[0], files[1], files[0], files[2]], batch_size=4))
    first = next(number for number in (0, 2) if rows[number]["error"])
    assert sum("not yet" in (row["error"] or "") for row in rows) == 1
    answers = [row["predictions"][0]["label"] for row in rows if not row["error"]]
    labels = [predictions[0]["label"] for predictions in expected]
    assert answers == ([labels[1], labels[0], labels[2]] if first == 0 else labels)


def test_one_warning_for_all_transparent_pictures(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path
) -> None:
    clear = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(clear):
        PIL.Image.new("RGBA", (30, 20), (20 * number, 99, 99, 0)).save(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(classify_files(classifier, [*clear, files[0]], batch_size=2))
    assert [str(warning.message)[:33] for warning in caught] == ["Transparent pixels in 6 pictures "]


def test_odd_kinds_are_classified_as_by_pipeline(
    classifier: TaskResCLIPForImageClassification, trained: Path, files: list[str], tmp_path: Path
) -> None:
    from transformers import pipeline

    picture = PIL.Image.open(files[0])
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.save(tmp_path / "pages.tif", save_all=True, append_images=[PIL.Image.open(files[1])])
    picture.quantize(16).save(tmp_path / "palette.png", transparency=1)
    picture.save(tmp_path / "stamp.ico")
    odd = [str(path) for path in sorted(tmp_path.iterdir())]
    with pytest.warns(UserWarning, match="Transparent pixels"):
        rows = list(classify_files(classifier, odd))
    expected = pipeline("image-classification", model=str(trained))(odd, top_k=1)
    for row, [top] in zip(rows, expected, strict=True):
        assert row["predictions"][0]["label"] == top["label"]
        assert row["predictions"][0]["score"] == pytest.approx(top["score"], abs=1e-3)


def test_very_long_pictures_take_no_more_memory_than_others(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled whole, each would have billions of bytes; where it would be, it is skipped and named."""
    for name, size in (("wide.png", (20000, 1)), ("high.png", (1, 20000))):
        PIL.Image.open(files[0]).resize(size).save(tmp_path / name)
    names = [files[1], str(tmp_path / "wide.png"), str(tmp_path / "high.png"), files[2]]
    resize = PIL.Image.Image.resize

    def bounded(self: PIL.Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> PIL.Image.Image:
        assert size[0] * size[1] < 1 << 26
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(PIL.Image.Image, "resize", bounded)
    assert [row["error"] for row in classify_files(classifier, names)] == [None] * 4
    monkeypatch.setattr("taskres_hf.embedding.preprocessing._Plan.of", lambda _: None)  # a processor of another kind
    rows = list(classify_files(classifier, names))
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "wide.png" in rows[1]["error"]
    assert "20000x1" in rows[1]["error"]


def test_training_and_predicting_agree_on_what_is_a_picture(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path
) -> None:
    picture = PIL.Image.open(files[0])
    for ending in ("jfif", "jp2", "tga", "gif"):
        picture.save(tmp_path / f"good.{ending}")
    for number in (1, 2):
        PIL.Image.new("RGBA", (30, 20), (99, 50 * number, 0, 0)).save(tmp_path / f"good{number}.png")
    picture.save(tmp_path / "bad1.jpg", "EPS")
    (tmp_path / "bad2.png").write_bytes((tmp_path / "good1.png").read_bytes()[:-40])
    (tmp_path / "bad3.jpg").mkdir()
    os.mkfifo(tmp_path / "bad4.png")
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    with pytest.warns(UserWarning, match="Transparent pixels in 2 pictures"):
        errors = [row["error"] for row in classify_files(classifier, paths)]
    assert [error is None for error in errors] == ["good" in path for path in paths]

    images = LabelledImages.from_cells(FileCells(paths), [0] * len(paths), classifier.class_names[:1])
    embedder = Embedder(classifier.clip, classifier.image_processor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = embed_images(embedder, images, views=2, on_error="skip", progress=False)
    assert features.skipped == tuple(number for number, error in enumerate(errors) if error)
    messages = [str(warning.message) for warning in caught]
    assert sum(message.startswith("Transparent pixels in 2 pictures") for message in messages) == 1
    assert len(messages) == 2
    for error in filter(None, errors):
        assert error in messages[0] + messages[1]


def test_an_answer_is_never_nan(trained: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    expected = list(classify_files(model, files[:3]))
    run = Embedder.stream

    def one_is_nan(self: Embedder, *arguments: Any, **options: Any) -> Any:
        for places, embeds in run(self, *arguments, **options):
            embeds[1] = float("nan")
            yield places, embeds

    monkeypatch.setattr(Embedder, "stream", one_is_nan)
    rows = list(classify_files(model, files[:3]))
    assert [rows[0], rows[2]] == [expected[0], expected[2]]
    assert rows[1]["predictions"] == []
    assert "NaN" in rows[1]["error"]
    with torch.no_grad():
        model.classifier.residual[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="NaN"):
        list(classify_files(model, files[:3]))


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_are_not_utf8_or_speak_to_a_terminal(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path, kind: str
) -> None:
    names = [b"\xe9t\xe9.png", b"\x1b[31mred\r.png", "\u202egnp.x\x9b.png".encode(), b"=1+1.png", b"none\xff.png"]
    odd = [os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names]
    for path in odd[:-1]:
        Path(path).write_bytes(Path(files[0]).read_bytes())
    output = tmp_path / f"r.{kind}"
    written = classify_to_file(classifier, [*odd, files[0]], output)
    assert (written.classified, len(written.skipped)) == (5, 1)
    rows = _rows(output)
    assert [row["error"] is None for row in rows] == [True, True, True, True, False, True]
    assert rows[0]["file"].endswith("\\udce9t\\udce9.png")
    assert "none\\udcff.png" in rows[4]["error"]
    if kind == "csv":
        assert "\\x1b[31mred\\x0d.png" in rows[1]["file"]
    else:  # read back as they are
        assert "\x1b[31mred\r.png" in rows[1]["file"]
    if kind != "parquet":
        assert output.read_text(encoding="utf-8").replace("\n", "").isprintable()


def test_spreadsheet_formulas_are_defused(tmp_path: Path) -> None:
    rows = [{"file": "=1+1.png", "predictions": [{"label": "@SUM(A1)", "score": 1.0}], "error": None}]
    write_predictions(tmp_path / "r.CSV", rows)
    assert (tmp_path / "r.CSV").read_text() == "file,label,score,error\n'=1+1.png,'@SUM(A1),1.000000,\n"


def test_parquet_of_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_files, "_ROW_GROUP", 2)
    rows = [{"file": f"{n}", "predictions": [{"label": "a", "score": n / 8}], "error": None} for n in range(5)]
    write_predictions(tmp_path / "r.parquet", iter(rows))
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 3
    assert pq.read_table(tmp_path / "r.parquet")["scores"].to_pylist() == [[n / 8] for n in range(5)]
    write_predictions(tmp_path / "r.parquet", [])
    assert pq.read_table(tmp_path / "r.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("r.xlsx", "end its name in .csv"), ("none/r.csv", "no folder"), ("folder.csv", "is a folder"), ("r", "format")],
)
def test_outputs_are_checked_first(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigurationError, match=message):
        check_output(tmp_path / name)


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("after", [1, 3, 7, 12])
def test_a_resumed_run_gives_the_same_file(
    classifier: TaskResCLIPForImageClassification,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    after: int,
) -> None:
    options: dict[str, Any] = {"top_k": 2, "batch_size": 3}
    whole = classify_to_file(classifier, files, tmp_path / f"whole.{kind}", **options)
    output, partial = tmp_path / f"r.{kind}", tmp_path / f"r.{kind}.partial"
    output.write_text("of an earlier run")
    if after == 12:  # the answers are there, the output cannot be written
        with monkeypatch.context() as patch:
            patch.setattr(prediction_files, "write_bytes", _refuse)
            with pytest.raises(ArtifactError, match="--resume"):
                classify_to_file(classifier, files, output, **options)
    else:
        _stopped(monkeypatch, after, lambda: classify_to_file(classifier, files, output, **options))
    assert output.read_text() == "of an earlier run"
    assert len(partial.read_bytes().splitlines()) == 1 + after
    with partial.open("ab") as stream:
        stream.write(b'1234abcd {"file": "half a li')
    resumed = classify_to_file(classifier, files, output, resume=True, **options)
    assert output.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert resumed.resumed == after // 3 * 3
    assert (resumed.classified, resumed.skipped) == (whole.classified, whole.skipped) == (11, resumed.skipped)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"r.{kind}", f"whole.{kind}"]


def _refuse(*_: Any) -> None:
    raise ArtifactError("Cannot write.")


@pytest.mark.parametrize("change", ["content", "time", "gone"])
def test_pictures_that_changed_meanwhile_are_no_rows_of_this_run(
    classifier: TaskResCLIPForImageClassification,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    copied = shutil.copy(files[0], tmp_path / "copied.png")
    mine, output = [str(copied), *files[1:]], tmp_path / "r.csv"
    _stopped(monkeypatch, 3, lambda: classify_to_file(classifier, mine, output, batch_size=3))
    if change == "content":
        shutil.copyfile(files[1], copied)
    elif change == "time":
        os.utime(copied, ns=(0, 0))
    else:
        os.unlink(copied)
    with pytest.raises(ConfigurationError, match=r"begun with other files, sizes or times of files, so its 3 rows"):
        classify_to_file(classifier, mine, output, batch_size=3, resume=True)
    assert len((tmp_path / "r.csv.partial").read_bytes().splitlines()) == 4


def test_a_row_is_with_the_system_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """So that killing the process loses nothing."""
    row = {"file": "a", "predictions": [], "error": "bad"}
    with PredictionWriter(tmp_path / "r.csv", {"top_k": 1}) as writer:
        for number in range(3):
            writer.write(row)
            assert len((tmp_path / "r.csv.partial").read_bytes().splitlines()) == 2 + number
        assert not (tmp_path / "r.csv").exists()
        assert writer.finish(1) == ["bad"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]


def test_a_run_without_a_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PredictionWriter(tmp_path / "r.csv", {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_not_continued(
    classifier: TaskResCLIPForImageClassification,
    trained: Path,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "r.csv"
    options: dict[str, Any] = {"top_k": 2, "batch_size": 3}
    _stopped(monkeypatch, 6, lambda: classify_to_file(classifier, files, output, **options))
    before = (tmp_path / "r.csv.partial").read_bytes()
    other = TaskResCLIPForImageClassification.from_pretrained(trained)
    with torch.no_grad():
        other.classifier.residual[0, 0] += 1e-3
    weaker = TaskResCLIPForImageClassification.from_pretrained(trained, strength=0.5)
    biased = TaskResCLIPForImageClassification.from_pretrained(trained)
    biased.classifier.class_bias = torch.ones(8)
    longer = TaskResCLIPForImageClassification.from_pretrained(trained)
    longer.classifier.logit_scale_factor = 2.0
    for model, names, changed, what in (
        (classifier, files, {"top_k": 3}, "other top_k,"),
        (classifier, files, {"batch_size": 4}, "other batch_size,"),
        (classifier, files[:-1], {}, "other files, sizes or times of files,"),
        (classifier, files[::-1], {}, "other files, sizes or times of files,"),
        (other, files, {}, "other classifier,"),
        (weaker, files, {}, "other classifier,"),
        (biased, files, {}, "other classifier,"),
        (longer, files, {}, "other classifier,"),
    ):
        with pytest.raises(ConfigurationError, match=f"begun with {what} so its 6 rows would not fit"):
            classify_to_file(model, names, output, resume=True, **{**options, **changed})
    with pytest.raises(ConfigurationError, match=r"holds 6 rows of a run that was stopped. Go on with.*--resume"):
        classify_to_file(classifier, files, output, **options)
    assert (tmp_path / "r.csv.partial").read_bytes() == before


def test_relative_names_mean_files_of_the_folder_a_run_was_begun_in(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in (0, 1):
            (tmp_path / folder / f"{number}.png").write_bytes(Path(files[number]).read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    names, output = ["0.png", "1.png"], tmp_path / "r.csv"
    _stopped(monkeypatch, 1, lambda: classify_to_file(classifier, names, output, batch_size=1))
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ConfigurationError, match="other files"):
        classify_to_file(classifier, names, output, batch_size=1, resume=True)


def test_a_changed_row_is_made_again(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.jsonl"
    classify_to_file(classifier, files, whole, batch_size=3)
    output, partial = tmp_path / "r.jsonl", tmp_path / "r.jsonl.partial"
    _stopped(monkeypatch, 9, lambda: classify_to_file(classifier, files, output, batch_size=3))
    lines = partial.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b'"label": "', b'"label": "X')
    partial.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="damaged after row 5: what follows is made again"):
        assert classify_to_file(classifier, files, output, batch_size=3, resume=True).resumed == 3
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["lost", "repeated", "swapped"])
def test_rows_of_other_places_are_made_again(
    classifier: TaskResCLIPForImageClassification,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    """Each row is whole for itself; only their order tells."""
    whole = tmp_path / "whole.jsonl"
    classify_to_file(classifier, files, whole, batch_size=1)
    output, partial = tmp_path / "r.jsonl", tmp_path / "r.jsonl.partial"
    _stopped(monkeypatch, 5, lambda: classify_to_file(classifier, files, output, batch_size=1))
    lines = partial.read_bytes().splitlines(keepends=True)
    changed = {"lost": lines[:2] + lines[3:], "repeated": [*lines[:3], *lines[2:]]}
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    partial.write_bytes(b"".join(changed.get(change, swapped)))
    with pytest.warns(UserWarning, match="is damaged after row"):
        classify_to_file(classifier, files, output, batch_size=1, resume=True)
    assert output.read_bytes() == whole.read_bytes()


def test_rows_changed_meanwhile_are_no_answer(tmp_path: Path) -> None:
    row = {"file": "a", "predictions": [], "error": None}
    with PredictionWriter(tmp_path / "r.csv", {}) as writer:
        writer.write(row)
        writer.write(row)
        content = (tmp_path / "r.csv.partial").read_bytes()
        (tmp_path / "r.csv.partial").write_bytes(content.replace(b'"a"', b'"b"'))
        with pytest.raises(ArtifactError, match="was changed"):
            writer.finish(1)
    assert not (tmp_path / "r.csv").exists()


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Call it with a number of bytes: no file can grow beyond, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_no_answer(
    classifier: TaskResCLIPForImageClassification, files: list[str], tmp_path: Path, small_files: Any
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "r.csv"
    classify_to_file(classifier, files, whole, batch_size=2)
    small_files(1500)
    with pytest.raises(ArtifactError, match=r"Cannot write .*r.csv.partial: .* rows stay: make room.*--resume"):
        classify_to_file(classifier, files, output, batch_size=2)
    small_files(resource.RLIM_INFINITY)
    assert not output.exists()
    assert classify_to_file(classifier, files, output, batch_size=2, resume=True).resumed >= 2
    assert output.read_bytes() == whole.read_bytes()


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with PredictionWriter(tmp_path / "r.csv", {}) as writer:
        for resume in (False, True):
            with pytest.raises(ConfigurationError, match="Another process is writing"):
                PredictionWriter(tmp_path / "r.csv", {}, resume=resume)
        writer.write({"file": "a", "predictions": [], "error": None})
        writer.finish(1)


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    partial, treasure = tmp_path / "r.csv.partial", tmp_path / "treasure"
    partial.write_text("of another program")
    for resume in (False, True):
        with pytest.raises(ConfigurationError, match="in the way"):
            PredictionWriter(tmp_path / "r.csv", {}, resume=resume)
    assert partial.read_text() == "of another program"
    partial.unlink()
    partial.symlink_to(treasure)
    with pytest.raises(ArtifactError, match="Cannot write"):
        PredictionWriter(tmp_path / "r.csv", {})
    assert not treasure.exists()
