"""What is shipped: a checkpoint and pictures that open without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from taskres_hf.demo import check_task, demo_dataset, demo_model, demo_styles, demo_tasks
from taskres_hf.errors import ConfigurationError


def test_the_checkpoint_is_a_small_clip() -> None:
    config = AutoConfig.from_pretrained(demo_model())
    assert (config.model_type, config.vision_config.image_size, config.projection_dim) == ("clip", 64, 192)
    assert Path(demo_model(), "model.safetensors").stat().st_size < 50_000_000


@pytest.mark.parametrize("task", list(demo_tasks()))
def test_tasks_are_what_they_say(task: str) -> None:
    spec, splits = demo_tasks()[task], demo_dataset(task)
    assert {name: len(part) for name, part in splits.items()} == spec["sizes"]
    assert splits["train"].features["label"].names == spec["classes"]
    assert "{}" in spec["template"]
    assert splits["test"][0]["image"].size[0] > 0


def test_other_styles_have_the_same_classes() -> None:
    styles = demo_dataset("dg")
    assert list(styles) == demo_styles() == ["emojione-monotone", "fluent-emoji-high-contrast", "fxemoji"]
    for part in styles.values():
        assert part.features["label"].names == demo_tasks()["all-categories"]["classes"]


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    for function in (check_task, demo_dataset):
        with pytest.raises(ConfigurationError, match=r"no task 'nope' .*animals-plants"):
            function("nope")
