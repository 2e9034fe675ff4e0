"""Many processes and threads over one cache, one folder, one model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzz import races
from fuzz.material import classifier, picture_files
from taskres_hf.artifact import read_artifact
from taskres_hf.predicting import classify_files


@pytest.mark.parametrize("name", races.RACES)
def test_eight_processes_at_once(name: str) -> None:
    assert not races.race(name, 1).findings


def test_exchanged_classifiers_never_mix() -> None:
    answered, found = races.swaps(1.5)
    assert not found
    assert answered > 20


def _in_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_names_are_those_of_the_answer_that_a_thread_holds() -> None:
    served, other = classifier(1, ["a", "b", "c"]), classifier(2, ["x", "y"])
    answer = served(image_embeds=torch.ones(1, 192))
    _in_a_thread(lambda: served.use_classifier(other))
    assert served.class_names == ["a", "b", "c"]
    assert served.config.num_labels == answer.logits.shape[1] == 3
    assert _in_a_thread(lambda: served.class_names) == ["x", "y"]  # which holds no answer
    del answer
    assert served.class_names == ["x", "y"]
    answer = served(image_embeds=torch.ones(1, 192))
    served.use_classifier(classifier(1, ["a", "b", "c"]))  # by this thread: it sees it at once
    assert served.class_names == ["a", "b", "c"]
    assert answer.logits.shape[1] == 2


def test_what_is_saved_is_the_classifier_that_serves(tmp_path: Path) -> None:
    served, other = classifier(1, ["a", "b", "c"]), classifier(2, ["x", "y", "z"])
    answer = served(image_embeds=torch.ones(1, 192))
    _in_a_thread(lambda: served.use_classifier(other))
    assert served.class_names == ["a", "b", "c"]
    served.save_pretrained(tmp_path / "saved")
    config, tensors, _ = read_artifact(tmp_path / "saved" / "config.json", tmp_path / "saved" / "model.safetensors")
    assert list(config["id2label"].values()) == ["x", "y", "z"]
    assert torch.equal(tensors["residual"], other.classifier.residual)
    assert answer.logits.shape[1] == 3


def test_a_run_of_predictions_keeps_the_classifier_it_began_with(tmp_path: Path) -> None:
    served, files = classifier(1, ["a", "b", "c"]), picture_files(tmp_path, 12)
    rows = classify_files(served, files, top_k=5, batch_size=2)
    first = next(rows)
    served.use_classifier(classifier(2, ["x", "y"]))
    labels = [{top["label"] for top in row["predictions"]} for row in (first, *rows)]
    assert labels == [{"a", "b", "c"}] * 12
