"""From upload to download in a browser. `TASKRES_SCREENSHOTS=FOLDER` also makes the pictures of the documentation."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.predicting import classify_files

pytest.importorskip("gradio", reason='the app needs gradio: pip install "taskres_hf[app]"')
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
)

from taskres_hf.app import RunningApp  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and none is on the PATH")
NAMES = ["fruit", "vegetable", "prepared meal"]
HOSTILE = "<img src=x onerror=document.title='hacked'> ${document.title='hacked'} {{7*7}}"
_FLAGS = [
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def app(base: str) -> Iterator[RunningApp]:
    with RunningApp(base) as running:
        yield running
    assert not running.registry.root.exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield (chromium := playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS))
        chromium.close()


class Visit:
    """A page, the addresses it asked for, and what went wrong in it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.asked: list[str] = []
        self.faults: list[str] = []
        allowed = ["camera", "clipboard-read", "clipboard-write"]
        self.page = browser.new_page(viewport={"width": 1120, "height": 800}, permissions=allowed)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("response", lambda reply: self.faults.append(reply.url) if reply.status >= 400 else None)
        self.page.goto(url)
        self.see("h1", "taskres")

    def see(self, place: str, text: str | re.Pattern[str]) -> Any:
        """Wait until a text is at a place."""
        found = self.page.locator(place, has_text=text).first
        found.wait_for(timeout=120_000)
        return found

    def name(self, *names: str) -> None:
        self.page.get_by_label("Classes", exact=True).fill("\n".join(names))
        self.page.get_by_role("button", name="Use these classes").click()
        self.see(".drop", names[-1])

    def drop(self, place: str, files: list[Path]) -> None:
        self.page.locator(f"{place} input[type=file]").set_input_files([str(file) for file in files])

    def shoot(self, name: str, first: str, last: str) -> None:
        """A picture for the documentation, from one heading to before another."""
        folder = os.environ.get("TASKRES_SCREENSHOTS")
        if not folder:
            return
        self.page.wait_for_timeout(1200)
        steps = {}
        for title in (first, last):
            box = self.page.locator(".step", has=self.page.get_by_role("heading", name=title)).bounding_box()
            steps[title] = (box["y"], box["y"] + box["height"])
        scrolled = self.page.evaluate("scrollY")
        top, bottom = steps[first][0] + scrolled, steps[last][1] + scrolled
        clip = {"x": 10, "y": top, "width": 1100, "height": bottom - top + 8}
        raw = self.page.screenshot(full_page=True, clip=clip)
        _write_small(raw, Path(folder) / f"{name}.png")


def _write_small(raw: bytes, file: Path) -> None:
    import io

    import PIL.Image

    picture = PIL.Image.open(io.BytesIO(raw)).convert("RGB")
    picture = picture.resize((880, round(880 * picture.height / picture.width)), PIL.Image.Resampling.LANCZOS)
    picture.quantize(128, dither=PIL.Image.Dither.NONE).save(file, optimize=True)


@pytest.fixture
def visit(browser: Any, app: RunningApp) -> Iterator[Visit]:
    made = Visit(browser, app.url)
    yield made
    made.page.close()
    hosts = {re.sub(r"^\w+:(//[^/:]+)?.*", r"\1", url) for url in made.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"//127.0.0.1"}, "the page asked somebody else"
    assert not made.faults


def test_from_pictures_to_a_classifier(visit: Visit, food: Path, tmp_path: Path, app: RunningApp) -> None:
    page = visit.page
    visit.name(*NAMES)
    for place, name in enumerate(NAMES):
        drop = page.locator(".drop").nth(place)
        drop.locator("input[type=file]").set_input_files([str(file) for file in (food / "class" / name).iterdir()])
        visit.see(".drop", f"{name} (6)")
    visit.see("#summary", "18 pictures. Without any training")
    visit.shoot("app-pictures", "Name the classes", "Add pictures")
    page.locator("#train").click()
    visit.see("#report", "cross-validation on 18 pictures")
    visit.see("#report", "95 % interval")
    visit.see(".judged", "taken for")
    visit.shoot("app-mistakes", "Train", "Look at mistakes")

    box = page.locator(".judged").first.get_by_role("combobox")
    wrong, right = re.findall(r"(?:Labelled|taken for) ([a-z ]+?)(?:,| \()", page.locator(".judged").first.inner_text())
    assert box.input_value() == wrong
    box.click()
    page.get_by_role("option", name=right, exact=True).click()
    visit.see("#fixed", f"is {right} now")
    visit.see("#report", "train again")
    assert page.locator("#download").is_disabled()
    page.locator("#train").click()
    visit.see("#report:not(:has-text('train again'))", "cross-validation on 18 pictures")

    files = sorted((food / "new").rglob("*.png"))
    visit.drop("#try", files[:2])
    visit.see("#answers", "Without training:")
    visit.shoot("app-try", "Try it", "Keep it")
    shown = [text.split("\n")[0] for text in page.locator(".answer").all_inner_texts()]
    with page.expect_download() as download:
        page.locator("#download").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    loaded = TaskResCLIPForImageClassification.from_pretrained(tmp_path / "classifier")
    assert [row["predictions"][0]["label"] for row in classify_files(loaded, files[:2])] == shown
    assert loaded.config.few_shot["num_images"] == 18


def test_a_zip_and_a_folder_name_their_classes(browser: Any, visit: Visit, food: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for name in NAMES[:2]:
            archive.write(food / "class" / name / "0.png", f"{name}/0.png")
    archives = visit.page.locator("input[type=file]:not([webkitdirectory])").first
    archives.set_input_files(str(tmp_path / "some.zip"))
    visit.see("#added", "2 pictures added")
    assert visit.page.get_by_label("Classes", exact=True).input_value() == "fruit\nvegetable"
    visit.page.locator("#folder input").set_input_files(str(food / "class"))
    visit.see("#added", "16 pictures added")
    visit.see("#added", "2 pictures left out")
    assert visit.page.get_by_label("Classes", exact=True).input_value() == "fruit\nvegetable\nprepared meal"


_COPY = """async () => {
  const canvas = document.createElement('canvas');
  const blob = await new Promise(made => canvas.toBlob(made));
  await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
}"""


def test_pictures_come_from_the_clipboard_and_the_camera(visit: Visit) -> None:
    page = visit.page
    visit.name("fruit", "vegetable")
    page.evaluate(_COPY)
    page.get_by_text("Paste from Clipboard").click()
    visit.see("#answers", "vegetable")
    page.get_by_label("Classes", exact=True).fill("hat\nshoe")
    page.get_by_role("button", name="Use these classes").click()
    visit.see(".drop", "shoe (0)")
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    playing = "() => [...document.querySelectorAll('video')].some(v => v.readyState >= 3 && v.currentTime > 0)"
    page.wait_for_function(playing, timeout=120_000)  # before that there is nothing to capture
    page.get_by_label("capture photo").click()
    visit.see("#answers", "shoe")
    visit.faults.clear()  # Gradio asks how far the upload from the camera is, which has no number


def test_pages_side_by_side_do_not_mix(browser: Any, visit: Visit, app: RunningApp, food: Path) -> None:
    other = Visit(browser, app.url)
    visit.name("hat", "shoe")
    other.name("fruit", "vegetable")
    other.page.locator(".drop").first.locator("input[type=file]").set_input_files(
        str(food / "class" / "fruit" / "1.png")
    )
    other.see(".drop", "fruit (1)")
    visit.page.reload()  # a page that is opened anew is a new session
    visit.see("#summary", "Name the classes first")
    count = len(app.registry)
    other.page.close()
    for _ in range(100):
        if len(app.registry) < count:
            break
        visit.page.wait_for_timeout(100)
    assert len(app.registry) < count
    assert not list(app.registry.root.rglob("1.png"))


def test_errors_are_messages_and_hostile_names_do_nothing(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.get_by_role("button", name="Use these classes").click()
    visit.see("body", "A classifier needs at least 2 classes")
    visit.name("fruit", HOSTILE)
    visit.see(".drop", "<img src=x onerror=")
    (tmp_path / "a<b>.png").write_text("no picture")
    page.locator(".drop").nth(1).locator("input[type=file]").set_input_files(str(tmp_path / "a<b>.png"))
    visit.see("#added", "1 picture not added")
    visit.see("#added", "damaged or not a picture. Formats that are read: JPEG")
    page.locator("#train").click()
    visit.see("body", "Every class needs at least one picture")
    visit.drop("#try", [tmp_path / "a<b>.png"])
    visit.see("#answers", "damaged or not a picture")
    assert "Traceback" not in page.content()
    assert page.title() == "taskres"


def test_it_works_with_the_keyboard(visit: Visit, food: Path) -> None:
    page = visit.page
    page.get_by_label("Classes", exact=True).focus()
    page.keyboard.type("fruit\nvegetable")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Use these classes":
            break
    page.keyboard.press("Enter")
    visit.see(".drop", "vegetable (0)")
    for place in range(2):
        chooser = _enter(page, page.locator(".drop").nth(place).get_by_role("button").first, "filechooser")
        chooser.set_files(str(food / "class" / NAMES[place] / "0.png"))
        visit.see(".drop", f"{NAMES[place]} (1)")
    page.locator("#train").focus()
    page.keyboard.press("Enter")
    visit.see("#report", "Nothing was measured")
    sync_api.expect(page.locator("#download")).to_be_enabled()
    assert _enter(page, page.locator("#download"), "download").suggested_filename == "classifier.zip"


def _enter(page: Any, place: Any, event: str) -> Any:
    """What comes of pressing Enter there; again where the part was just made anew and lost the focus."""
    got: list[Any] = []
    page.once(event, lambda value: got.append(value))
    for _ in range(100):
        place.focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        if got:
            return got[0]
    raise AssertionError(f"Enter gives no {event}.")
