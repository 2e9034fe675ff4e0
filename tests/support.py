"""What several test files use."""

from __future__ import annotations

import pytest
import torch

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.cli import main


def random_residual(model: TaskResCLIPForImageClassification, seed: int = 0) -> TaskResCLIPForImageClassification:
    """The same model with a residual that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.classifier.residual.copy_(torch.randn(model.classifier.residual.shape, generator=generator))
    return model


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
