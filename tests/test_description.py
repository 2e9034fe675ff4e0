"""What is told of an artifact without loading its base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import copied

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError

Model = TaskResCLIPForImageClassification
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


def test_describe(trained: Path) -> None:
    facts = describe(trained)
    assert facts["num_classes"] == 8
    assert facts["shots"] == 4
    assert facts["residual"]["shape"] == [8, 192]
    assert facts["engine"] == "torch-fp32"
    assert 0 < facts["zero_shot_accuracy"] < 1
    assert set(facts["bytes"]) == FILES
    assert "torch" in facts["library_versions"]
    with pytest.raises(ArtifactError, match="no-such"):
        describe(trained.parent / "no-such")


def test_describing_needs_no_torch(trained: Path) -> None:
    code = """
import sys, json
from taskres_hf.errors import ArtifactError, TaskResError
from taskres_hf.description import describe
facts = describe(sys.argv[1])
try:
    describe(sys.argv[2])
except ArtifactError as error:
    facts = [facts, str(error)]
heavy = {"torch", "transformers", "datasets", "tokenizers", "sklearn", "pandas"}
print(json.dumps([facts, sorted(heavy & set(sys.modules))]))
"""
    flipped = copied(trained, trained.parent / "flipped")
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained), str(flipped)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (facts, error), loaded = json.loads(done.stdout)
    assert loaded == []
    assert "checksum" in error
    assert facts == json.loads(json.dumps(describe(trained)))
    residual = Model.from_pretrained(trained).classifier.residual.detach()
    assert facts["residual"]["mean_length"] == pytest.approx(float(residual.norm(dim=1).mean()), rel=1e-5)
