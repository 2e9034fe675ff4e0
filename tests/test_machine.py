"""What a machine does fast is measured on it once, whatever its processor is called or says that it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification, machine
from taskres_hf.embedding.engines import choose, onednn
from taskres_hf.embedding.engines.choose import candidates, make_engine

Model = TaskResCLIPForImageClassification


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing was measured; where what is measured is kept."""
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_MEASURED", {})
    return tmp_path / "engines.json"


def _next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MEASURED", {})


def test_a_speed_is_measured_once_a_machine(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(machine, "times_faster", lambda *ways: measured.append(ways) or 0.55)
    for _ in range(2):
        assert machine.speed_of(torch.bfloat16) == 0.55
        assert not machine.is_faster(torch.bfloat16)
        _next_process(monkeypatch)
    assert len(measured) == 1
    for attribute, value in (("processor", lambda: "another"), ("_versions", lambda: ["9"])):
        with monkeypatch.context() as patch:
            patch.setattr(machine, attribute, value)
            machine.speed_of(torch.bfloat16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    machine.speed_of(torch.bfloat16)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert len(measured) == 4
    for content in ("{", "[]", json.dumps({"x": 1})):
        new.write_text(content)
        _next_process(monkeypatch)
        assert machine.speed_of(torch.bfloat16) == 0.55
    assert len(measured) == 7
    monkeypatch.setattr(machine, "times_faster", lambda *_: 2.5)
    assert machine.speed_of(torch.bfloat16) == 0.55
    assert machine.speed_of(torch.bfloat16, anew=True) == machine.speed_of(torch.bfloat16) == 2.5
    _next_process(monkeypatch)
    assert machine.is_faster(torch.bfloat16)


def test_a_speed_is_that_of_the_products(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.speed_of(torch.bfloat16) > 0
    now = 0.0
    linear = machine.F.linear

    def slow(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 5.0 if rows.dtype == torch.float16 else 2.0
        return linear(rows.float(), weight.float())

    monkeypatch.setattr(machine.F, "linear", slow)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    assert machine.speed_of(torch.float16) == 0.4


def test_a_number_type_that_torch_has_no_products_of_is_never_faster(
    new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = machine.F.linear

    def refused(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if rows.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return linear(rows, weight)

    monkeypatch.setattr(machine.F, "linear", refused)
    assert machine.speed_of(torch.float16) == 0.0
    assert not machine.is_faster(torch.float16)


def test_where_nothing_can_be_kept_it_is_measured_anew(
    new: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "file"))
    measured: list[Any] = []
    monkeypatch.setattr(machine, "times_faster", lambda *ways: measured.append(ways) or 2.0)
    for _ in range(2):
        assert machine.is_faster(torch.bfloat16)
        assert machine.is_faster(torch.bfloat16)
        _next_process(monkeypatch)
    assert len(measured) == 2


@pytest.mark.parametrize(("speed", "name"), [(0.55, "torch-fp32"), (1.0, "torch-fp32"), (2.2, "torch-bf16")])
def test_bf16_is_taken_where_it_is_faster_and_not_where_it_only_can_be_multiplied(
    model: Model, new: Path, monkeypatch: pytest.MonkeyPatch, speed: float, name: str
) -> None:
    monkeypatch.setattr(choose, "_LARGE", 1)
    monkeypatch.setattr(machine, "times_faster", lambda *_: speed)
    assert make_engine(model.clip).name == name
    assert (("torch", "bf16") in candidates(model.clip)) == (name == "torch-bf16")
    assert make_engine(model.clip, precision="bf16").name == "torch-bf16"  # on request


def test_who_multiplies_in_training_is_found_out(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn.onednn(torch.float32) is None:
        pytest.skip("this torch was built without oneDNN")
    for speed in (0.9, 1.3):
        monkeypatch.setattr(onednn, "times_faster", lambda *_, speed=speed: speed)
        monkeypatch.setattr(machine, "_MEASURED", {})
        new.unlink(missing_ok=True)
        onednn.onednn_is_faster.cache_clear()
        try:
            assert onednn.onednn_is_faster() == (speed > 1.1)
        finally:
            onednn.onednn_is_faster.cache_clear()
