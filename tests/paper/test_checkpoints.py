"""Checkpoints of the published code: imported exactly, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual, run

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.errors import ArtifactError, BaseMismatchError
from taskres_hf.paper.checkpoints import import_checkpoint, read_checkpoint

Model = TaskResCLIPForImageClassification


def _save(path: Path, base: torch.Tensor, residual: torch.Tensor, **more: Any) -> Path:
    """A checkpoint as the published trainer writes it: its scheduler state holds scheduler and optimiser objects."""
    parameter = torch.nn.Parameter(residual.clone())
    optimizer = torch.optim.Adam([parameter], lr=2e-3, weight_decay=5e-4)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        parameter.copy_(residual)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200.0)
    content = {
        "state_dict": {"text_feature_residuals": parameter.detach(), "base_text_features": base},
        "epoch": 200,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": successor, "warmup_epoch": 1, "last_epoch": 200},
        "val_result": None,
        **more,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def imported(model: Model, tmp_path: Path) -> tuple[Model, Path]:
    random_residual(model)
    rounded = model.classifier.base.half().float()  # as the published code rounds
    return model, _save(tmp_path / "model.pth.tar-200", rounded, model.classifier.residual.detach())


def test_imported_model_gives_the_same_logits(
    imported: tuple[Model, Path], base: str, spec: dict[str, Any], pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    model, path = imported
    found = import_checkpoint(path, base, spec["classes"], spec["template"])
    assert found.classifier.shift is None
    assert torch.equal(found.classifier.residual, model.classifier.residual)
    found.save_pretrained(tmp_path / "a")
    loaded = Model.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


def test_an_enhanced_base_becomes_a_shift(model: Model, base: str, spec: dict[str, Any], tmp_path: Path) -> None:
    random_residual(model)
    enhanced = model.classifier.base + 0.3 * torch.randn_like(model.classifier.base)
    path = _save(tmp_path / "model.pth.tar-200", enhanced, model.classifier.residual.detach())
    found = import_checkpoint(path, base, spec["classes"], spec["template"])
    found.save_pretrained(tmp_path / "a")
    loaded = Model.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(
        loaded.classifier.weight(), enhanced + 0.5 * model.classifier.residual, atol=1e-5, rtol=1e-5
    )


class _Attack:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, ("touch attacked",))


def test_code_in_a_checkpoint_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = torch.zeros(8, 192)
    _save(tmp_path / "a.tar", table, table, extra=_Attack())
    (tmp_path / "b.tar").write_bytes(pickle.dumps(_Attack()))
    torch.save(
        {"state_dict": {"text_feature_residuals": table}, "more": _Attack()},
        tmp_path / "c.tar",
        _use_new_zipfile_serialization=False,
    )
    for name in ("a.tar", "b.tar", "c.tar"):
        with pytest.raises(ArtifactError, match="refused"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "attacked").exists()


def test_what_is_no_taskres_checkpoint(imported: tuple[Model, Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {"ctx": torch.zeros(16, 512)}}, tmp_path / "coop.tar")
    with pytest.raises(ArtifactError, match="no TaskRes checkpoint"):
        read_checkpoint(tmp_path / "coop.tar")
    with pytest.raises(ArtifactError, match="no file"):
        read_checkpoint(tmp_path / "missing.tar")
    (tmp_path / "cut.tar").write_bytes(imported[1].read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="damaged"):
        read_checkpoint(tmp_path / "cut.tar")
    torch.save({"state_dict": {"text_feature_residuals": torch.full((8, 192), float("nan"))}}, tmp_path / "nan.tar")
    with pytest.raises(ArtifactError, match="NaN"):
        read_checkpoint(tmp_path / "nan.tar")


def test_wrong_classes_are_noticed(imported: tuple[Model, Path], base: str, spec: dict[str, Any]) -> None:
    _, path = imported
    with pytest.raises(ArtifactError, match="8 classes; 2 names"):
        import_checkpoint(path, base, ["cat", "dog"])
    with pytest.raises(BaseMismatchError, match="order"):
        import_checkpoint(path, base, list(reversed(spec["classes"])), spec["template"])


def test_command_line(
    imported: tuple[Model, Path], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = imported
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, "import", path, "--base-model", base, "--dataset", "animals-plants", "-o", out, "--json"
    )
    assert code == 0
    assert json.loads(text) == {"output_dir": str(out), "classes": 8, "alpha": 0.5, "enhanced_base": False}
    assert torch.equal(Model.from_pretrained(out).classifier.residual, model.classifier.residual)
    assert json.loads(run(capsys, "info", out, "--json")[1])["recipe"] == "imported"
    code, _, error = run(capsys, "import", path, "--base-model", base, "-o", out)
    assert code == 1
    assert "--class-names" in error
