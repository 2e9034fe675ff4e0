"""`taskres engines` as people use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import run

from taskres_hf import TaskResCLIPForImageClassification, machine
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines import choose


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_what_is_found_is_what_auto_runs_from_then_on(
    capsys: pytest.CaptureFixture[str], base: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = choose.importlib.util.find_spec
    monkeypatch.setattr(
        choose.importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
    )
    code, text, error = run(capsys, "engines", "--base-model", "shipped", "--json")
    assert code == 0, error
    told = json.loads(text)
    assert {"stock", "torch-fp32"} <= set(told["engines"])
    assert "onnx" in told["not_installed"]["onnxruntime"]
    rates = {name: facts["pictures_per_second"] for name, facts in told["engines"].items()}
    assert told["engine"] == max(rates, key=lambda name: rates[name])
    assert told["engines"]["stock"]["times_stock"] == 1.0
    assert all(facts["centred_cosine"] > 0.999 for facts in told["engines"].values())
    model = TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"])
    engine = Embedder(model.clip, model.image_processor, "auto", "auto").engine
    assert ("stock" if engine.is_stock else engine.name) == told["engine"]


@pytest.mark.parametrize("speed", [0.557, 2.0])
def test_why_bf16_is_not_tried_is_said_and_measured_anew(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch, speed: float
) -> None:
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda *name: None)
    monkeypatch.setattr(choose, "_LARGE", 1)
    monkeypatch.setattr(Embedder, "_pace", lambda self, engine: 1.0)
    monkeypatch.setattr(machine, "_MEASURED", {})
    machine.measured("products in torch.bfloat16", lambda: 0.7)
    monkeypatch.setattr(machine, "times_faster", lambda *_: speed)
    code, text, error = run(capsys, "engines", "--base-model", "shipped")
    assert code == 0, error
    if speed < 1:
        assert "torch-bf16 is not tried: bf16 products have 0.56 times the speed of fp32 here." in text
    else:
        assert "torch-bf16  " in text
        assert "not tried" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_table_says_which_runs_and_why_others_do_not(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda *name: None)
    monkeypatch.setattr(Embedder, "_pace", lambda self, engine: 1.0 if engine.is_stock else 0.5)
    code, text, error = run(capsys, "engines", "--base-model", "shipped", "--int8")
    assert code == 0, error
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "2.00" in lines["torch-fp32"]
    assert lines["torch-fp32"].rstrip().endswith("automatic")
    assert "automatic" not in lines["the tower as it is"]
    assert "on request" in lines["torch-int8"] or "int8" in lines["torch-int8"]
    assert 'openvino is not installed: pip install "taskres_hf[openvino]"' in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_base_that_is_not_there(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, _, error = run(capsys, "engines", "--base-model", "./nowhere")
    assert code == 1
    assert "nowhere" in error
