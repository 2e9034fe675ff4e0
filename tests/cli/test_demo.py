"""The demo: what it shows by itself, and on a public model and public photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel
from hub_server import HubServer
from support import run

from taskres_hf.demo import DEMO_TASKS, HUB_DATASET, HUB_MODEL, demo_tasks

SMALL = ["--shots", "1,2", "--seeds", "1,2", "--quiet"]
LEAVES = ["angular_leaf_spot", "bean_rust", "healthy"]


@pytest.fixture
def public(hub: HubServer, base: str, splits: Any, tmp_path: Path) -> HubServer:
    """The public model and the public photographs by their names and in their form, with shipped content."""
    hub.add_folder(HUB_MODEL, base)
    folder = tmp_path / "beans"
    (folder / "data").mkdir(parents=True)
    for split, part in splits.items():
        rows = part.filter(lambda row: row["label"] < 3).select_columns(["image", "label"])
        rows = rows.cast_column("label", ClassLabel(names=LEAVES)).rename_column("label", "labels")
        rows = rows.add_column("image_file_path", [f"{number}.jpg" for number in range(len(rows))])
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    hub.add_folder(HUB_DATASET, folder, "datasets")
    return hub


def test_three_tasks_with_their_spread(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text, _ = run(capsys, "demo", *SMALL, "--markdown", "-o", tmp_path / "demo")
    assert code == 0
    for task in DEMO_TASKS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {task} ")]
        assert line.count("±") == 2
    assert "zero-shot" in text
    assert text.count(" %)") == 6
    assert set(DEMO_TASKS) <= set(demo_tasks())


@pytest.mark.filterwarnings("ignore")
def test_the_same_on_the_hub(capsys: pytest.CaptureFixture[str], public: HubServer, tmp_path: Path) -> None:
    arguments = ["demo", "--hub", *SMALL, "-o", tmp_path / "demo"]
    code, text, error = run(capsys, *arguments, "--json")
    assert code == 0, error
    result = json.loads(text)
    assert result["base_model"] == HUB_MODEL
    assert [len(scores) for scores in result["tasks"]["beans"]["trained"].values()] == [2, 2]
    config = json.loads((tmp_path / "demo" / "config.json").read_text())
    assert config["base_model_name_or_path"] == HUB_MODEL
    assert sorted(config["id2label"].values()) == LEAVES
    assert config["data"]["name"] == HUB_DATASET
    code, text, _ = run(capsys, *arguments)  # what the demo has saved, it replaces
    assert code == 0
    assert "test picture 0" in text


def test_a_hub_out_of_reach_is_one_sentence(capsys: pytest.CaptureFixture[str], hub: HubServer, tmp_path: Path) -> None:
    for down in (True, False):  # no answer; an answer that there are no such pictures
        hub.down = down
        code, _, error = run(capsys, "demo", "--hub", *SMALL, "-o", tmp_path / "demo")
        assert code == 1
        assert error.startswith("Error: The Hub cannot be reached or does not give")
        assert "without --hub" in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "demo").exists()


def test_the_hub_has_its_own_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--task", "food"], ["--all"]):
        assert run(capsys, "demo", "--hub", *more)[0] == 2
