"""Deriving again what an artifact claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from support import copied, forge, run

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.checking import verify

Model = TaskResCLIPForImageClassification


def _results(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["what"]: row["result"] for row in rows}


def test_all_that_an_artifact_claims(trained: Path, splits: Any) -> None:
    found = _results(verify(trained, splits, split="test"))
    assert set(found.values()) == {"matches"}, found
    assert {"checksums", "base: t", "base: image tower", "few-shot draw", "training pictures", "accuracy"} <= set(found)


def test_cross_validation_is_derived_again(model: Model, splits: Any, tmp_path: Path) -> None:
    arguments = TaskResTrainingArguments(shots=2, seed=3, on_short="ignore", disable_tqdm=True)
    trainer = TaskResTrainer(model, arguments, splits["train"])
    trainer.train()
    trainer.measure()
    model.save_pretrained(tmp_path)
    found = _results(verify(tmp_path, splits))
    assert set(found.values()) == {"matches"}, found


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"metrics.accuracy": 0.99}, "accuracy"), ({"few_shot.indices": [1, 2, 3]}, "few-shot draw"),
        ({"few_shot.seed": 2}, "few-shot draw"),
        ({"data.train_pictures": {"count": 1, "sha256_prefixes": ""}}, "training pictures"),
        ({"base_fingerprint.norm": 3.0}, "base: t"),
        ({"base_fingerprint.image.sketch": [0.0] * 8}, "base: image tower"),
    ],
)  # fmt: skip
def test_a_false_claim_is_told(trained: Path, splits: Any, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    """By whoever knows the checksums."""
    folder = copied(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = config
        for name in outer:
            place = place[name]
        place[last] = value
    forge(folder, **config)
    found = _results(verify(folder, splits, split="test"))
    assert found[what] == "differs"
    assert found["checksums"] == "matches"


def test_the_command(trained: Path, tmp_path: Path, splits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        splits[split].to_parquet(data / f"{split}.parquet")
    code, text, _ = run(capsys, "verify", trained, "--dataset", data, "--split", "test")
    assert code == 0, text
    assert "matches      few-shot draw" in text
    code, text, _ = run(capsys, "verify", trained, "--json")
    answer = json.loads(text)
    assert code == 0
    assert answer["matches"]
    assert {row["result"] for row in answer["rows"]} == {"matches", "not checked"}
    folder = copied(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "alpha": 0.9}))
    code, text, _ = run(capsys, "verify", folder)
    assert code == 1
    assert "differs      checksums" in text
    assert "alpha" in text


def test_another_base_and_a_repository(model: Model, base: str, hub: HubServer, tmp_path: Path) -> None:
    hub.add_folder("tester/tiny-clip", Path(base))
    online = Model.from_base("tester/tiny-clip", model.class_names)
    online.push_to_hub("tester/animals")
    found = _results(verify("tester/animals"))
    assert found["checksums"] == found["base: t"] == "matches"
    other = Model.from_base(base, model.class_names).clip
    with torch.no_grad():
        for parameter in other.vision_model.parameters():
            parameter.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (Path(base) / name).is_file():
            shutil.copy(Path(base) / name, tmp_path / "other")
    found = _results(verify("tester/animals", base_model=str(tmp_path / "other")))
    assert found["base: image tower"] == "differs"
    assert found["base: t"] == "matches"
