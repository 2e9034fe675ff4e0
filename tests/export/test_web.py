"""The page in headless Chromium, with the package of the npm registry: what it says is what Python says."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from support import tagger

from taskres_hf.errors import ArtifactError, ConfigurationError, MissingExtraError
from taskres_hf.export import export, web
from taskres_hf.pictures import read_image

Tiny = Callable[..., Any]
CHROMIUM = shutil.which("chromium") or ""
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SAME = 1e-4  # largest difference of a probability


@pytest.fixture(scope="module")
def vendored() -> Path:
    """The JavaScript, fetched once into the cache folder of the tests."""
    try:
        return web.vendored()
    except (MissingExtraError, ArtifactError) as error:
        pytest.skip(f"no JavaScript: {error}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Serves a folder as any static host would, below a path of its own."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(_Quiet, directory=str(folder.parent))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/{folder.name}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _answer(page: Any, file: Path) -> dict[str, float]:
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#status[data-state=done], #status[data-state=error]", state="attached")
    assert page.inner_text("#status") == ""
    if page.locator("#more").is_visible():
        page.click("#more")
    rows = page.locator("#classes li").all()
    return {row.locator("span").first.text_content(): float(row.get_attribute("data-score")) for row in rows}


def _files(folder: Path, pictures: list[Any]) -> list[Path]:
    """Picture files as people have them: other sizes and formats, a turned camera, strong edges."""
    turned = PIL.Image.Exif()
    turned[0x112] = 6
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 301, 3), dtype=np.uint8))
    saved = {
        "plain.png": (pictures[0], {}), "odd.png": (pictures[1], {}), "odd.jpg": (pictures[1], {"quality": 90}),
        "tall.webp": (pictures[2], {"lossless": True}), "small.png": (pictures[4], {}),
        "turned.jpg": (pictures[1], {"exif": turned, "quality": 95}), "noise.png": (noise, {}),
        "grey.png": (pictures[1].convert("L"), {}), "palette.png": (pictures[1].convert("P"), {}),
    }  # fmt: skip
    for name, (picture, options) in saved.items():
        picture.save(folder / name, **options)
    return [folder / name for name in saved]


@pytest.mark.usefixtures("vendored")
def test_the_browser_says_what_python_says(
    browser: Any, serve: Any, full: Any, pictures: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    export(full, tmp_path / "page", "web", vendor=True)
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    address = serve(tmp_path / "page")
    page.goto(address)
    page.wait_for_selector("#status[data-state=ready], #status[data-state=error]")
    assert page.inner_text("#status") == "Ready."
    for file in _files(tmp_path, pictures):
        found = _answer(page, file)
        pixels = full.image_processor(images=read_image(str(file)), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = full(pixels).logits.softmax(dim=1)[0]
        for name, probability in zip(full.class_names, expected.tolist(), strict=True):
            assert abs(found[name] - probability) <= SAME, (file.name, name)
    assert all(one.startswith((address, f"blob:{address[:20]}")) for one in asked)  # no CDN, nothing sent


@pytest.mark.usefixtures("vendored")
def test_several_labels_per_picture_have_a_probability_each(
    browser: Any, serve: Any, tiny: Tiny, pictures: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model = tagger(tiny())
    export(model, tmp_path / "page", "web", vendor=True)
    page = browser.new_page()
    page.goto(serve(tmp_path / "page"))
    page.wait_for_selector("#status[data-state=ready], #status[data-state=error]")
    pictures[0].save(tmp_path / "0.png")
    found = _answer(page, tmp_path / "0.png")
    with torch.no_grad():
        logits = model(model.image_processor(images=pictures[0], return_tensors="pt")["pixel_values"]).logits[0]
    assert found == pytest.approx(dict(zip(model.class_names, logits.sigmoid().tolist(), strict=True)), abs=SAME)
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.usefixtures("vendored")
def test_hostile_names_are_text_and_a_broken_picture_is_said(
    browser: Any, serve: Any, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny()
    export(model, tmp_path / "page", "web", precision="int8", vendor=True)
    page = browser.new_page()
    dialogs: list[Any] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    page.goto(serve(tmp_path / "page"))
    page.wait_for_selector("#status[data-state=ready], #status[data-state=error]")
    PIL.Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    found = _answer(page, tmp_path / "red.png")
    assert sorted(found) == sorted(model.class_names)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-4)
    assert page.locator("#classes script, #classes b").count() == 0
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", str(tmp_path / "broken.png"))
    page.wait_for_selector("#status[data-state=error]")
    assert "cannot be classified" in page.inner_text("#status")
    assert not dialogs


def _page(tiny: Tiny, folder: Path, vendor: bool = False) -> str:
    model = tiny()
    web.add_page(folder, model.config, model.image_processor, "int8", vendor)
    return (folder / "index.html").read_text()


def test_without_vendor_the_packages_are_pinned(tiny: Tiny, tmp_path: Path) -> None:
    text = _page(tiny, tmp_path)
    assert f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{web.TRANSFORMERS_JS}/dist/" in text
    assert "https://cdn.jsdelivr.net/npm/onnxruntime-web@1." in text
    assert not re.search("%[A-Z]+%", text)
    assert "unsafe-eval'" not in text.replace("'wasm-unsafe-eval'", "")
    assert not any(name in text for name in tiny().class_names)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == tiny().class_names
    assert config["transformers.js_config"] == {"dtype": "int8"}


def test_another_kind_of_processor_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    model.image_processor.do_pad, model.image_processor.resample = True, 0
    with pytest.raises(ConfigurationError, match="crops and normalises"):
        web.add_page(tmp_path, model.config, model.image_processor, "fp32", False)


@pytest.mark.parametrize("trouble", ["no npm", "no registry", "another package"])
def test_vendoring_fails_in_words(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "npm"
    body = "echo npm error network >&2; exit 1" if trouble == "no registry" else 'echo x > "$4/a.tgz"'
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: None if trouble == "no npm" else str(script))
    expected = {"no npm": "Node.js", "no registry": "npm error network", "another package": "SHA-512"}[trouble]
    kind = MissingExtraError if trouble == "no npm" else ArtifactError
    with pytest.raises(kind, match=expected):
        web.vendored()
    assert not list((tmp_path / "cache").rglob("*.js"))
