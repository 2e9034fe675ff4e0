"""The benchmarks on machines that cannot run all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import embedding, material, timing
from benchmarks.timing import Report
from taskres_hf.embedding.engines import rewriting


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    material.obstacle.cache_clear()
    yield
    material.obstacle.cache_clear()


def test_a_row_that_cannot_run_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A processor without VNNI and bf16, and no openvino: every mode but exact fp32."""
    monkeypatch.setattr(rewriting, "onednn_int8", lambda: None)
    monkeypatch.setattr(material, "cpu_has_bf16", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    reasons = {name: material.obstacle(*mode) for name, mode in embedding.MODES.items()}
    assert [name for name, reason in reasons.items() if reason is None] == ["torch, exact fp32"]
    assert "VNNI" in str(reasons["torch, int8"])
    assert "bf16" in str(reasons["torch, bf16"])
    assert "taskres_hf[openvino]" in str(reasons["openvino, fp32"])
    monkeypatch.setattr(embedding, "demo_tasks", dict)  # no task: what is left is which rows there are
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results.json")
    possible = {name: mode for name, mode in embedding.MODES.items() if reasons[name] is not None}
    monkeypatch.setattr(embedding, "MODES", possible)
    report = Report()
    embedding.precision(report)
    report.save()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2 * len(possible)
    table = Report.stored().markdown()
    assert table.count("not measured: ") == 2 * len(possible)
    assert "this processor has no VNNI" in table
    assert "not measured" in capsys.readouterr().out
