"""A classifier that was trained, and its pictures, under names that somebody chose in bad faith."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data import load_training_data

SCRIPT = "<script>alert(1)</script>"
NAMES = ["cat", "=cmd() \"quoted' $x^2$ & co", "plain"]
MARKUP = '"><img src=http:x onerror=alert(1)>'  # in the name of a file


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, splits: Any) -> Path:
    """A folder with a training and a test split; one test picture is also trained on, one cannot be read."""
    top = tmp_path_factory.mktemp("hostile") / "data"
    for split, count in (("train", 4), ("test", 3)):
        for label, name in enumerate(NAMES):
            folder = top / split / name
            folder.mkdir(parents=True)
            rows = [row["image"] for row in splits[split] if row["label"] == label][:count]
            for number, image in enumerate(rows):
                picture = image.convert("RGB")
                picture.save(folder / f"{MARKUP.replace('/', '')}{number}.png", comment="secret")
    copy = next((top / "train" / "cat").iterdir())
    (top / "test" / "cat" / "copy.png").write_bytes(copy.read_bytes())
    (top / "test" / "cat" / "broken \x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return top


@pytest.fixture(scope="session")
def classifier(base: str, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on that folder, with another class called as a script is; do not change it."""
    folder = tmp_path_factory.mktemp("report") / "artifact"
    names = {NAMES[0]: SCRIPT, NAMES[1]: NAMES[1], NAMES[2]: NAMES[2]}
    data = load_training_data(hostile, class_names=names)
    model = TaskResCLIPForImageClassification.from_base(base, data.train.class_names)
    arguments = TaskResTrainingArguments(disable_tqdm=True, on_error="skip")
    trainer = TaskResTrainer(model, arguments, data.train, data.held_out)
    trainer.train()
    trainer.measure()
    model.save_pretrained(folder)
    return folder
