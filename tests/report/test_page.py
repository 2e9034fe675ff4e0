"""A report as a reader meets it: right numbers, nothing that a name smuggles in, nothing loaded."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import DatasetDict
from support import TASK, forge, random_residual, run, tagger

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data import LabelledImages, load_training_data
from taskres_hf.errors import ArtifactError, ConfigurationError, MissingExtraError
from taskres_hf.evaluation import compare_with_zero_shot
from taskres_hf.report import figures, findings, page, write_report
from taskres_hf.report.gathering import Evidence, Measured, Pictures, Subject, gather

pytest.importorskip("matplotlib", reason="a report needs matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(__file__).parents[2] / "taskres_hf" / "demo_data"
SCRIPT, MAP = "<script>alert(1)</script>", {"cat": "<script>alert(1)</script>"}


class _Page(HTMLParser):
    """Tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def hostile_report(
    classifier: Path, hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("page") / "report.html"
    arguments = TaskResTrainingArguments(on_error="skip", label_map=MAP, disable_tqdm=True)
    return write_report(classifier, output, hostile, args=arguments), output


def test_numbers_are_those_of_the_trainer(trained: Path, splits: DatasetDict, tmp_path: Path) -> None:
    result = write_report(trained, tmp_path / "r.html", splits)
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), eval_dataset=splits["test"])
    expected = trainer.evaluate()
    for key in ("accuracy", "zero_shot_accuracy", "num_images", "per_class"):
        assert result["metrics"][key] == expected[key]
    assert result["metrics"]["method"] == "held-out"
    again = TaskResTrainingArguments(shots=4, seed=1, on_short="ignore", disable_tqdm=True)
    crossed = TaskResTrainer(model, again, splits["train"]).cross_validate()
    assert result["cross_validated"]["accuracy"] == crossed["accuracy"]
    text = _Page((tmp_path / "r.html").read_text()).text
    assert f"{100 * expected['accuracy']:.1f} %" in text
    assert "never on a picture that the" in text


def test_nothing_comes_of_names(hostile_report: tuple[dict[str, Any], Path]) -> None:
    result, output = hostile_report
    content = output.read_text()
    found = _Page(content)
    assert {"script", "iframe", "object", "form"}.isdisjoint(tag for tag, _ in found.tags)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("data:", "#")), target
    assert SCRIPT in found.text  # shown as it is
    assert "\x1b" not in content
    assert "\\x1b" in content
    assert result["unreadable"] == [{"split": "test", "file": "test/cat/broken \x1b[31m.png"}]


def test_a_picture_trained_on_is_told_and_not_measured(hostile_report: tuple[dict[str, Any], Path]) -> None:
    result, _ = hostile_report
    assert result["metrics"]["num_images"] == 9
    ((first, second),) = result["equal_pictures"]
    assert {first["split"], second["split"]} == {"train", "test"}
    assert "test/cat/copy.png" in (first["file"], second["file"])
    assert any("1 of 10 pictures in test were trained on" in note for note in result["notes"])


def test_pictures_are_small_and_tell_nothing_else(hostile_report: tuple[dict[str, Any], Path]) -> None:
    _, output = hostile_report
    pictures = _Page(output.read_text()).pictures
    assert pictures
    for attributes in pictures:
        address, alt = str(attributes["src"]), attributes["alt"]
        content = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
        picture = PIL.Image.open(io.BytesIO(content))
        assert max(picture.size) <= 96
        assert "comment" not in picture.info
        assert alt


def test_from_the_artifact_alone(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = write_report(classifier, tmp_path / "r.html")
    text = _Page((tmp_path / "r.html").read_text()).text
    assert result["metrics"]["accuracy"] is not None
    assert "as recorded in the artifact" in text
    assert "--dataset" in text
    assert "nearest after" in text

    def no_base(*_: Any, **__: Any) -> None:
        raise OSError("no such base")

    monkeypatch.setattr(TaskResCLIPForImageClassification, "from_pretrained", no_base)
    write_report(classifier, tmp_path / "r.html")
    assert "no such base" in _Page((tmp_path / "r.html").read_text()).text
    with pytest.raises(OSError, match="no such base"):
        write_report(classifier, tmp_path / "other.html", classifier)
    assert not (tmp_path / "other.html").exists()


def test_without_words_and_with_pictures(trained: Path, splits: DatasetDict, tmp_path: Path) -> None:
    write_report(trained, tmp_path / "plain.html", splits["test"], words=[])
    text = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "What was added is most like" in text
    assert "It speaks most for these pictures" in text
    assert "In words" not in text


def test_a_residual_that_alpha_switches_off_has_learned_nothing(base: str, tmp_path: Path) -> None:
    model = random_residual(TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"], alpha=0.0))
    model.save_pretrained(tmp_path / "off")
    write_report(tmp_path / "off", tmp_path / "off.html")
    text = (tmp_path / "off.html").read_text(encoding="utf-8")
    assert "it answers as the base model does without training" in text
    assert "Training on pictures" not in text


def test_an_artifact_without_a_record(trained: Path, splits: DatasetDict, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "artifact"))
    forge(folder, few_shot=None, training=None, metrics=None, data=None)
    write_report(folder, tmp_path / "r.html")
    assert "no record of its training" in _Page((tmp_path / "r.html").read_text()).text
    result = write_report(folder, tmp_path / "r.html", splits)
    assert result["cross_validated"] is None
    assert any("does not say which pictures" in note for note in result["notes"])


def test_a_single_class_in_test_and_no_test_at_all(trained: Path, splits: DatasetDict, tmp_path: Path) -> None:
    rows = [row for row, label in enumerate(splits["test"]["label"]) if label == 1]
    one = DatasetDict(train=splits["train"], test=splits["test"].select(rows))
    result = write_report(trained, tmp_path / "r.html", one, figures_dir=tmp_path / "figures")
    assert list(result["metrics"]["per_class"]) == ["bird"]
    names = {Path(file).name for file in result["figures"]}
    assert {"accuracy.png", "accuracy.svg", "reliability.png", "reliability.svg", "confusion.png"} <= names
    few_shot = json.loads((trained / "config.json").read_text())["few_shot"]
    alone = DatasetDict(train=splits["train"].select(few_shot["indices"]))
    result = write_report(trained, tmp_path / "r.html", alone)
    assert result["metrics"]["method"] == "cross-validation"
    assert "cross-validation" in _Page((tmp_path / "r.html").read_text()).text


def test_what_cross_validation_cannot_repeat_is_not_cross_validated(splits: DatasetDict, trained: Path) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    small = DatasetDict(train=splits["train"].select(model.config.few_shot["indices"]))
    assert gather(model, small, folds=2).cross_validated is not None
    model.config.training = {**model.config.training, "continued_from": {"recipe": "auto-v1", "train_images": 8}}
    found = gather(model, small, folds=2)
    assert found.cross_validated is None
    assert any("went on from another" in note for note in found.notes)
    model = TaskResCLIPForImageClassification.from_pretrained(trained).add_classes(["tractor"])
    found = gather(model, small, folds=2)
    assert found.cross_validated is None
    assert any("Classes were added" in note for note in found.notes)


def test_a_picture_under_two_labels_is_shown_as_each_file(base: str, hostile: Path, tmp_path: Path) -> None:
    for name in ("cat", "plain"):
        shutil.copytree(hostile / "train" / name, tmp_path / "data" / name)
    copy = next((tmp_path / "data" / "cat").iterdir())
    shutil.copyfile(copy, tmp_path / "data" / "plain" / "copy.png")
    data = load_training_data(tmp_path / "data", eval_split="none")
    model = TaskResCLIPForImageClassification.from_base(base, data.train.class_names)
    TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True), data.train).train()
    found = gather(model, tmp_path / "data", folds=2).cross_validated
    assert found is not None
    assert found.pictures is not None
    files = [found.pictures.name(place) for place in found.places]
    labels = [found.class_names[label] for label in found.labels.tolist()]
    assert [Path(file).parent.name for file in files] == labels
    assert "plain/copy.png" in files


def _random(classes: int, count: int) -> tuple[Evidence, Subject]:
    """Answers to pictures of noise, which compress worst."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    names = [f"class {number}" for number in range(classes)]
    logits, zero_shot = (torch.randn(count, classes, generator=generator) for _ in range(2))
    pixels = torch.randint(256, (64, 96, 96, 3), generator=generator, dtype=torch.uint8).numpy()
    cells = [PIL.Image.fromarray(pixels[number % 64]) for number in range(count)]

    class Cells(list):  # type: ignore[type-arg]
        def select(self, rows: Any) -> Any:
            return Cells(self[row] for row in rows)

    images = LabelledImages.from_cells(Cells(cells), labels.tolist(), names, split="test")
    metrics = compare_with_zero_shot(logits, zero_shot, labels, names) | {"method": "held-out", "split": "test"}
    pictures = Pictures("test", images, None, [f"{number:064x}" for number in range(count)])
    measured = Measured(logits, zero_shot, labels, names, metrics, pictures, range(count))
    config = {"id2label": {str(number): name for number, name in enumerate(names)}, "base_model_name_or_path": "a/b"}
    return Evidence(measured, splits=[pictures]), Subject("big", config, None, [1.0] * classes, [])


@pytest.mark.parametrize(("classes", "count"), [(200, 10_000), (20, 4_000)])
def test_a_page_of_many_pictures_stays_small(classes: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "suspicious_labels", lambda measured: [])  # another test's; takes its time
    evidence, subject = _random(classes, count)
    text = page._Page(subject, evidence, 8, True).html()
    assert len(text) < 10_000_000
    assert text.count("<img ") > 100
    assert ("cell-0-0" in text) == (classes == 20)
    assert text.count("<td") < 6_000
    targets = set(re.findall(r'href="#([\w-]+)"', text))
    assert len(targets) > 300 or classes == 200  # each number leads to its pictures
    assert targets <= set(re.findall(r' id="([\w-]+)"', text))


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"\.html"):
        write_report("nowhere", tmp_path / "report.pdf")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigurationError, match="folder"):
        write_report("nowhere", tmp_path / "folder.html")
    with pytest.raises(ConfigurationError, match="folds"):
        write_report("nowhere", tmp_path / "report.html", folds=1)
    with pytest.raises(ArtifactError):
        write_report(tmp_path, tmp_path / "report.html")
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"taskres_hf\[report\]"):
        write_report("nowhere", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_from_the_command_line(
    capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DATA / TASK
    train = ["train", data, "--base-model", base, "--shots", 2, "-o", "out", "--report", "train.html", "--quiet"]
    code, text, error = run(capsys, *train)
    assert code == 0, error
    assert "train.html" in text
    assert "train.html" not in (tmp_path / "out" / "run.yaml").read_text()
    code, text, _ = run(capsys, "evaluate", "out", data, "--report", "evaluate.html", "--json")
    metrics = json.loads(text)
    assert metrics["report"] == "evaluate.html"
    code, text, _ = run(capsys, "report", "out", "--dataset", data, "--figures", "figures", "--folds", 0, "--json")
    result = json.loads(text)
    assert code == 0
    assert result["metrics"]["accuracy"] == metrics["accuracy"]
    assert (tmp_path / "report.html").stat().st_size == result["bytes"]
    for name in ("train.html", "evaluate.html", "report.html"):
        assert f"{100 * metrics['accuracy']:.1f} %" in (tmp_path / name).read_text()
    code, _, error = run(capsys, "train", data, "--base-model", base, "-o", "other", "--report", "report.txt")
    assert code == 1
    assert ".html" in error
    assert not (tmp_path / "other").exists()
    code, text, _ = run(capsys, "report", "out", "-o", "bare.html", "--quiet")
    assert code == 0
    assert f"Accuracy {100 * metrics['accuracy']:.1f} %" in text


def test_the_snippet_runs(trained: Path, splits: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    write_report(trained, tmp_path / "r.html")
    splits["test"][0]["image"].convert("RGB").save(tmp_path / "picture.jpg")
    text = _Page((tmp_path / "r.html").read_text()).text
    code = text[text.index("import taskres_hf") : text.index("Or many pictures")]
    shown: list[Any] = []
    exec(code.replace("picture.jpg", str(tmp_path / "picture.jpg")), {"print": shown.append})
    assert {row["label"] for row in shown[0]} <= set(splits["test"].features["label"].names)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("There is no Chromium on this machine.")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_loads_nothing_and_complains_of_nothing(
    browser: Any, hostile_report: tuple[dict[str, Any], Path], width: int
) -> None:
    _, output = hostile_report
    tab = browser.new_page(viewport={"width": width, "height": 844})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(output.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [output.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing runs out of the screen
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    assert tab.evaluate(broken) == 0
    link = tab.locator(".matrix td a").first
    target = re.sub("^#", "", link.get_attribute("href"))
    assert not tab.locator(f"id={target}").is_visible()
    link.click()
    assert tab.locator(f"id={target}").is_visible()
    tab.close()


def test_several_labels_per_picture_are_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tagger(TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"]))
    with pytest.raises(ConfigurationError, match="taskres evaluate"):
        write_report(model, tmp_path / "out.html")
    model.save_pretrained(tmp_path / "tagger")
    code, _, error = run(capsys, "report", tmp_path / "tagger", "-o", tmp_path / "out.html")
    assert code == 1
    assert "gives several, or none" in error
    assert not (tmp_path / "out.html").exists()
