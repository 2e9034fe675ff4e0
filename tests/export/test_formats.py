"""Each format, run by nothing but the library it is for, gives the classifier's own logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tagger

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.errors import ConfigurationError, MissingExtraError
from taskres_hf.export import export

Tiny = Callable[..., Any]
Values = tuple[torch.Tensor, torch.Tensor]
EXACT = 1e-4


def without_the_library(code: str, *arguments: object, cwd: Path) -> str:
    """Standard output of a program in a fresh interpreter that cannot import taskres_hf."""
    program = f"import sys\nsys.modules['taskres_hf'] = None\n{code}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _needs(package: str) -> None:
    pytest.importorskip(package, reason=f"the optional package {package} is not installed")


@pytest.fixture(scope="session")
def onnx_folder(full: TaskResCLIPForImageClassification, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _needs("onnxruntime")
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export(full, folder, "onnx")
    return folder


def _onnx_logits(file: Path, pixels: torch.Tensor, output: str = "logits") -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {"pixel_values": pixels.numpy()})[0])


def test_onnx(onnx_folder: Path, values: Values, full: Any) -> None:
    pixels, logits = values
    assert {file.name for file in onnx_folder.iterdir()} == {
        "model.onnx", "labels.json", "preprocessor_config.json", "export.json",
    }  # fmt: skip
    assert json.loads((onnx_folder / "labels.json").read_text()) == full.class_names
    for count in (1, len(pixels)):
        found = _onnx_logits(onnx_folder / "model.onnx", pixels[:count])
        torch.testing.assert_close(found, logits[:count], atol=EXACT, rtol=0)
    found = _onnx_logits(onnx_folder / "model.onnx", pixels, "probabilities")
    torch.testing.assert_close(found, logits.softmax(dim=1), atol=EXACT, rtol=0)


def test_int8_is_smaller_and_keeps_the_classifier_exact(
    onnx_folder: Path, full: Any, values: Values, tmp_path: Path
) -> None:
    facts = export(full, tmp_path / "int8", "onnx", precision="int8")
    pixels, logits = values
    found = _onnx_logits(tmp_path / "int8" / "model.onnx", pixels)
    assert 0 < float((found - logits).abs().max()) <= facts["check"]["tolerance"]
    assert facts["bytes"] < (onnx_folder / "model.onnx").stat().st_size / 2
    import onnx

    stored = {array.name: array for array in onnx.load(str(tmp_path / "int8" / "model.onnx")).graph.initializer}
    weight = next(onnx.numpy_helper.to_array(stored[name]) for name in stored if name.startswith("head/linear.weight"))
    assert weight.dtype == np.float32


def test_fp16_is_half_as_large(tiny: Tiny, tmp_path: Path) -> None:
    _needs("onnxruntime")
    model = tiny()
    pixels = torch.randn(3, 3, 32, 32)
    sizes = {}
    for precision in ("fp32", "fp16"):
        facts = export(model, tmp_path / precision, "linear", precision=precision)
        sizes[precision] = (tmp_path / precision / "model.safetensors").stat().st_size
    assert 0 < facts["check"]["largest_difference"] <= facts["check"]["tolerance"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    export(model, tmp_path / "onnx", "onnx", precision="fp16")
    found = _onnx_logits(tmp_path / "onnx" / "model.onnx", pixels)
    torch.testing.assert_close(found, model(pixels).logits.detach(), atol=facts["check"]["tolerance"], rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino(full: Any, values: Values, tmp_path: Path, precision: str) -> None:
    _needs("openvino")
    import openvino

    pixels, logits = values
    facts = export(full, tmp_path / "ir", "openvino", precision=precision)
    core = openvino.Core()
    model = core.compile_model(str(tmp_path / "ir" / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert "pixel_values" in model.inputs[0].names
    found = torch.from_numpy(model(pixels.numpy())["logits"])
    tolerance = EXACT if precision == "fp32" else facts["check"]["tolerance"]
    torch.testing.assert_close(found, logits, atol=tolerance, rtol=0)


def test_torch_program_needs_no_library(full: Any, values: Values, tmp_path: Path) -> None:
    pixels, logits = values
    export(full, tmp_path / "program", "torch")
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = """
import numpy as np, torch
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    logits, probabilities = program(torch.from_numpy(np.load("pixels.npy")))
np.save("logits.npy", logits.numpy())
"""
    without_the_library(code, tmp_path / "program" / "model.pt2", cwd=tmp_path)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), logits, atol=EXACT, rtol=0)


def test_linear_script_gives_the_same_logits(tiny: Tiny, pictures: list[Any], tmp_path: Path) -> None:
    model = tiny()
    export(model, tmp_path / "plain", "linear")
    for number, picture in enumerate(pictures[:3]):
        picture.save(tmp_path / f"{number}.png")
    code = "import runpy\nscript = sys.argv.pop(1)\nrunpy.run_path(script, run_name='__main__')"
    printed = without_the_library(code, tmp_path / "plain" / "classify.py", "0.png", "1.png", "2.png", cwd=tmp_path)
    rows = [json.loads(line) for line in printed.splitlines()]
    expected = model(model.image_processor(images=pictures[:3], return_tensors="pt")["pixel_values"]).logits
    # torchvision rounds the grey levels of a picture that is resized alone otherwise than in a batch.
    tolerance = 100 * EXACT if find_spec("torchvision") else EXACT
    torch.testing.assert_close(torch.tensor([row["logits"] for row in rows]), expected.detach(), atol=tolerance, rtol=0)
    assert [row["label"] for row in rows] == [model.class_names[int(row.argmax())] for row in expected]
    assert len((tmp_path / "plain" / "classify.py").read_text().splitlines()) <= 26


def test_linear_script_gives_all_labels_from_the_threshold_on(tiny: Tiny, pictures: list[Any], tmp_path: Path) -> None:
    model = tagger(tiny())
    with pytest.raises(ConfigurationError, match="gives several, or none"):
        export(model, tmp_path / "plain", "linear", dataset=tmp_path)
    facts = export(model, tmp_path / "plain", "linear")
    assert (facts["label_threshold"], facts["accuracy"]) == (0.4, None)
    pictures[0].save(tmp_path / "0.png")
    code = "import runpy\nscript = sys.argv.pop(1)\nrunpy.run_path(script, run_name='__main__')"
    printed = without_the_library(code, tmp_path / "plain" / "classify.py", "0.png", cwd=tmp_path)
    with torch.no_grad():
        logits = model(model.image_processor(images=pictures[:1], return_tensors="pt")["pixel_values"]).logits[0]
    expected = [name for name, score in zip(model.class_names, logits.sigmoid().tolist(), strict=True) if score >= 0.4]
    assert json.loads(printed)["labels"] == expected
    assert 0 < len(expected) < 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "format"),
    [("siglip", "onnx"), ("siglip", "openvino"), ("siglip", "linear"), ("metaclip_2", "linear"), ("align", "torch")],
)
def test_families(tiny: Tiny, tmp_path: Path, family: str, format: str) -> None:
    if format in ("onnx", "openvino"):
        _needs({"onnx": "onnxruntime"}.get(format, format))
    facts = export(tiny(family), tmp_path / "out", format)
    assert facts["base_model_type"] == family
    assert facts["check"]["largest_difference"] <= EXACT


def test_families_without_a_class_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'altclip'.*'onnx' or 'torch'"):
        export(tiny("altclip"), tmp_path / "out", "linear")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "extra"), [("onnx", "onnx"), ("handler", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, {"onnx": "onnxscript"}.get(extra, extra), None)
    with pytest.raises(MissingExtraError, match=rf"taskres_hf\[{extra}\]"):
        export(tiny(), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


_HANDLER = """
import base64, io, json, runpy
from PIL import Image
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
answer = EndpointHandler(sys.argv[1])
content = open("0.png", "rb").read()
text = base64.b64encode(content).decode()
kinds = {
    "picture": Image.open("0.png"), "bytes": content, "inputs": {"inputs": Image.open("0.png")},
    "base64": {"inputs": text}, "data": {"inputs": "data:image/png;base64," + text},
    "top": {"inputs": text, "parameters": {"top_k": 2}}, "none": {"inputs": content, "parameters": None},
    "list": {"inputs": [text, base64.b64encode(open("1.png", "rb").read()).decode()]},
}
answers = {kind: answer(data) for kind, data in kinds.items()}
bad = {
    "no inputs": {"data": text}, "address": {"inputs": "https://example.com/a.png"}, "path": {"inputs": "0.png"},
    "text": {"inputs": base64.b64encode(b"no picture").decode()}, "number": {"inputs": 7},
    "floats": {"inputs": Image.open("0.png").convert("F")},
    "top_k": {"inputs": text, "parameters": {"top_k": 0}}, "unknown": {"inputs": text, "parameters": {"topk": 1}},
}
refused = {}
for kind, data in bad.items():
    try:
        answer(data)
    except ValueError as error:
        refused[kind] = str(error)
print(json.dumps([answers, refused]))
"""


def test_handler_answers_what_endpoints_send(full: Any, pictures: list[Any], values: Values, tmp_path: Path) -> None:
    _needs("onnxruntime")
    export(full, tmp_path / "endpoint", "handler")
    for number, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / f"{number}.png")
    answers, refused = json.loads(without_the_library(_HANDLER, tmp_path / "endpoint", cwd=tmp_path))
    expected = values[1].softmax(dim=1)
    for kind, found in answers.items():
        for number, rows in enumerate(found if kind == "list" else [found]):
            best = expected[number].argsort(descending=True)[: 2 if kind == "top" else 5]
            assert [row["label"] for row in rows] == [full.class_names[int(index)] for index in best], kind
            np.testing.assert_allclose([row["score"] for row in rows], expected[number][best], atol=EXACT)
    assert len(refused) == 8
    assert "unknown range" in refused["floats"]
    assert "base64" in refused["address"]
    assert "base64" in refused["path"]
    assert "top_k" in refused["unknown"]
    requirements = (tmp_path / "endpoint" / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in requirements} == {"onnxruntime", "transformers", "numpy", "pillow"}
