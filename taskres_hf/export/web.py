"""A static page that classifies pictures in the browser, with transformers.js and the exported ONNX file.

    index.html  app.js  pictures.js         the page; pictures.js resizes as Pillow does, which a canvas does not
    model/config.json, onnx/model*.onnx     as transformers.js wants it: pipeline("image-classification", "model")
    vendor/                                 with `vendor=True`, the JavaScript and WebAssembly; else a CDN has it

No text of the user's is in the page: it reads the class names from config.json and shows them as text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from ..embedding.preprocessing import Preprocessor
from ..errors import ArtifactError, ConfigurationError, MissingExtraError
from ..storage import cache_root, read_sealed, staging_folder, umask, write_bytes, write_json, write_sealed
from .formats import FusedClassifier, Run, write_onnx_file

MODEL = "model"
_NAMES = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
}  # as transformers.js spells dtypes
_PAGE = ("index.html", "app.js", "pictures.js")
# Package, version and SHA-512 of what the npm registry has, and the files of it that a page needs.
TRANSFORMERS_JS = "4.3.2"
_PACKAGES = {
    f"@huggingface/transformers@{TRANSFORMERS_JS}": (
        "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
        {"dist/transformers.min.js": "transformers.min.js", "LICENSE": "LICENSE-transformers.js"},
    ),
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0": (
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        {f"dist/{name}": name for name in ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")},
    ),
}
_CDN = "https://cdn.jsdelivr.net"
_PATIENCE = 300  # seconds for npm


def to_web(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """`model/onnx/`; the rest is `add_page`."""
    file = folder / MODEL / "onnx" / _NAMES[precision]
    file.parent.mkdir(parents=True)
    return write_onnx_file(fused, file, precision)


def add_page(folder: Path, config: Any, image_processor: Any, precision: str, vendor: bool) -> None:
    """The page around the model.

    Raises:
        ConfigurationError: the image processor does something else than resize, crop and normalise.
        MissingExtraError: npm is not there. ArtifactError: npm cannot fetch a package, or fetched another one.
    """
    kind = type(image_processor).__name__
    if not Preprocessor(image_processor).fast:
        raise ConfigurationError(
            f"A page resizes (bilinear or bicubic), crops and normalises pictures; {kind} does something else. "
            "Export in format 'onnx' and prepare them on a server."
        )
    # The file is called like any image classifier's: pixel_values in, logits out. `vit` is how transformers.js says so.
    labels = {str(index): name for index, name in enumerate(config.class_names)}
    described = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
        "transformers.js_config": {"dtype": precision}, "problem_type": config.problem_type,
    }  # fmt: skip
    write_json(folder / MODEL / "config.json", described)
    packages = dict(name.rsplit("@", 1) for name in _PACKAGES)
    places = {
        "SOURCES": f"'self'{'' if vendor else f' {_CDN}'}",
        "TRANSFORMERS": f"{_CDN}/npm/@huggingface/transformers@{TRANSFORMERS_JS}/dist/transformers.min.js",
        "RUNTIME": f"{_CDN}/npm/onnxruntime-web@{packages['onnxruntime-web']}/dist/",
    }
    if vendor:
        shutil.copytree(vendored(), folder / "vendor", ignore=shutil.ignore_patterns("*.json"))
        places |= {"TRANSFORMERS": "./vendor/transformers.min.js", "RUNTIME": "./vendor/"}
    for name in _PAGE:
        text = resources.files(__package__).joinpath("page").joinpath(name).read_text(encoding="utf-8")
        for place, value in places.items():
            text = text.replace(f"%{place}%", value)
        write_bytes(folder / name, text.encode())


def vendored() -> Path:
    """A folder with the JavaScript and WebAssembly of a page; fetched by npm once, then kept in the cache folder.

    Raises:
        MissingExtraError: npm is not there. ArtifactError: npm cannot fetch a package, or fetched another one.
    """
    folder = cache_root() / "npm" / f"transformers-{TRANSFORMERS_JS}"
    with suppress(ArtifactError, OSError):
        sums = read_sealed(folder / "sha256.json")
        if all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in sums.items()):
            return folder
    content = {name: data for package in _PACKAGES for name, data in _fetched(package).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    with staging_folder(folder.parent, folder.name) as staging:
        for name, data in content.items():
            write_bytes(staging / name, data)
        write_sealed(
            staging / "sha256.json", {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        )
        staging.chmod(0o777 & ~umask())
        with suppress(FileExistsError):  # another process was faster
            staging.rename(folder)
    return folder


def _fetched(package: str) -> dict[str, bytes]:
    """The files of a package that a page needs, checked against the checksum known here."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(
            "vendor=True (--vendor) needs npm, which comes with Node.js: install it, or leave it out."
        )
    expected, files = _PACKAGES[package]
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package, "--pack-destination", folder, "--ignore-scripts", "--silent"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            raise ArtifactError(f"npm did not fetch {package} in {_PATIENCE} seconds. Nothing was changed.") from None
        packed = sorted(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            reason = " ".join(done.stderr.split())[-200:] or f"it ended with {done.returncode}"
            raise ArtifactError(f"npm cannot fetch {package}: {reason}. Is the registry in reach? Nothing was changed.")
        content = packed[0].read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != expected:
        raise ArtifactError(f"npm fetched another {package} than the one known here (SHA-512). Nothing was changed.")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {to: archive.extractfile(f"package/{name}") for name, to in files.items()}
        return {name: member.read() for name, member in members.items() if member is not None}
