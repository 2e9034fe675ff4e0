"""Three classes of shipped pictures as files, and one base for all sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.app.looking import Backbone
from taskres_hf.app.session import Session
from taskres_hf.demo import demo_dataset

NAMES = ["fruit", "vegetable", "prepared meal"]
EACH = 6


@pytest.fixture(scope="session")
def food(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fruit/0.png` and so on, six of each class, and as many others in `new/`; do not change it."""
    folder = tmp_path_factory.mktemp("food")
    rows = demo_dataset("food")["train"]
    names = rows.features["label"].names
    for name in NAMES:
        chosen = [row["image"] for row in rows if names[row["label"]] == name][: EACH + 2]
        for place, images in ((folder / "class" / name, chosen[:EACH]), (folder / "new" / name, chosen[EACH:])):
            place.mkdir(parents=True)
            for number, image in enumerate(images):
                image.convert("RGB").save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def backbone(base: str) -> Backbone:
    return Backbone(TaskResCLIPForImageClassification.from_base(base, ["a", "b"]))


@pytest.fixture
def session(backbone: Backbone, tmp_path: Path) -> Iterator[Session]:
    made = Session(backbone, tmp_path / "session")
    yield made
    made.close()


@pytest.fixture
def filled(session: Session, food: Path) -> Session:
    """A session with all pictures."""
    session.set_classes(NAMES, "a drawing of {}.")
    session.add_tree(food / "class")
    return session


@pytest.fixture(scope="session")
def ready(backbone: Backbone, food: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A trained session; do not change it."""
    made = Session(backbone, tmp_path_factory.mktemp("ready") / "session")
    made.set_classes(NAMES, "a drawing of {}.")
    made.add_tree(food / "class")
    made.train()
    yield made
    made.close()


@pytest.fixture
def embedded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pictures that pass the image tower from now on."""
    seen: list[Any] = []
    stream = backbone.embedder.stream

    def watched(batches: Any, load: Any, *values: Any, **options: Any) -> Any:
        batches = [list(batch) for batch in batches]
        seen.extend(item for batch in batches for item in batch)
        return stream(batches, load, *values, **options)

    monkeypatch.setattr(backbone.embedder, "stream", watched)
    return seen
