"""`suggest_strength`: full on pictures like the shots, little on pictures of another style."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.errors import ConfigurationError
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.training import strength, suggest_strength


@pytest.fixture(scope="module")
def embeds() -> dict[str, Tensor]:
    """8 shots a class of all-categories, 100 test pictures in their styles and 100 in another."""
    spec, splits = demo_tasks()["all-categories"], demo_dataset("all-categories")
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    shots = few_shot_indices(splits["train"]["label"], 8, 1, on_short="ignore")
    sources = {
        "shots": splits["train"].select(shots), "alike": splits["test"].shuffle(1).select(range(100)),
        "drawings": demo_dataset("dg")["emojione-monotone"].shuffle(1).select(range(100)),
    }  # fmt: skip
    return {name: trainer.embed(source).image_embeds[0] for name, source in sources.items()}


def test_it_is_high_in_the_style_of_the_shots_and_low_in_another(embeds: dict[str, Tensor]) -> None:
    assert suggest_strength(embeds["shots"], embeds["alike"]) > 0.8
    assert suggest_strength(embeds["shots"], embeds["drawings"]) < 0.3


def test_it_is_twice_the_share_of_pairs_in_which_the_shot_is_farther(
    embeds: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pair by pair; the length of embeddings and the pieces it works in change nothing."""
    shots, new = (torch.nn.functional.normalize(embeds[name].double(), dim=1) for name in ("shots", "drawings"))
    own = (shots @ shots.T).fill_diagonal_(-9.0).sort(dim=1, descending=True)[0][:, :5].mean(1)
    near = (new @ shots.T).sort(dim=1, descending=True)[0][:, :5].mean(1)
    expected = 2.0 * float((own[:, None] < near).double().mean())
    monkeypatch.setattr(strength, "_PIECE", 1000)
    assert suggest_strength(embeds["shots"] * 3.0, embeds["drawings"] * 0.1) == pytest.approx(expected, abs=1e-9)


def test_two_shots_and_one_picture_are_enough(embeds: dict[str, Tensor]) -> None:
    assert suggest_strength(embeds["shots"][:2], embeds["shots"][:1]) == 1.0
    assert suggest_strength(torch.eye(4)[:2], torch.eye(4)[2:3]) == 1.0  # as far as the shots are: a tie
    assert suggest_strength(torch.ones(2, 3), -torch.ones(1, 3)) == 0.0


@pytest.mark.parametrize(
    ("shots", "images", "says"),
    [
        (torch.ones(1, 3), torch.ones(1, 3), "2 or more pictures"),
        (torch.ones(2, 3), torch.ones(0, 3), "1 or more pictures"),
        (torch.ones(1, 2, 3), torch.ones(1, 3), "shape"),
        (torch.ones(2, 3), torch.ones(1, 4), "the same base model"),
        (torch.ones(2, 3), torch.full((1, 3), float("nan")), "NaN"),
    ],
)
def test_what_it_cannot_compare_is_refused(shots: Tensor, images: Tensor, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        suggest_strength(shots, images)
