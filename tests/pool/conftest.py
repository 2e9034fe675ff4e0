"""One classifier for each thing that a head may have, over one base; two that do not belong to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual, tagger
from transformers import CLIPModel

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.rejection import choose, class_means

Model = TaskResCLIPForImageClassification


def _enhanced(model: Model) -> None:
    random_residual(model, 3)
    model.classifier.shift = 0.1 * torch.randn(model.classifier.base.shape, generator=torch.Generator().manual_seed(4))
    model.config.enhanced_base = {"epochs": 1}


def _linear(model: Model) -> None:
    shape = model.classifier.base.shape
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * torch.arange(1, shape[0] + 1)[:, None]
    bias = torch.linspace(-2, 2, shape[0])
    model.classifier.set_weight(rows / 14, class_bias=bias, normalize_weight=False, logit_scale_factor=0.75)
    model.strength = 0.6


def _rejecting(model: Model) -> None:
    random_residual(model, 6)
    embeds = torch.randn(40, 192, generator=torch.Generator().manual_seed(7))
    means = class_means(embeds, torch.arange(40) % len(model.class_names))
    model.config.rejection = choose(torch.linspace(-0.1, 0.3, 40), means, 0.5).as_dict()


# How each is made, and how many classes it has.
KINDS: dict[str, tuple[int, Callable[[Model], Any]]] = {
    "zero-shot": (5, lambda model: None),
    "residual": (2, lambda model: random_residual(model, 1)),
    "half": (9, lambda model: setattr(random_residual(model, 2), "strength", 0.5)),
    "enhanced": (4, _enhanced),
    "linear": (7, _linear),
    "tags": (6, lambda model: tagger(random_residual(model, 8))),
    "image-side": (3, lambda model: random_residual(model, 9)),
    "rejecting": (11, _rejecting),
    "pair": (2, lambda model: random_residual(model, 10)),
    "many": (61, lambda model: random_residual(model, 11)),
}


@pytest.fixture(scope="session")
def folders(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts, one of each kind."""
    root = tmp_path_factory.mktemp("pool") / "classifiers"
    clip: Any = base
    for name, (count, prepare) in KINDS.items():
        side = "image" if name == "image-side" else "text"
        names = [f"{name} thing {number}" for number in range(count)]
        model = Model.from_base(clip, names, residual_side=side)
        prepare(model)
        model.save_pretrained(root / name)
        clip = model.clip
    return root


@pytest.fixture(scope="session")
def models(folders: Path) -> dict[str, Model]:
    """Each loaded alone, as a user does."""
    clip = Model.from_pretrained(folders / "residual", text_tower=True).clip
    return {name: Model.from_pretrained(folders / name, base_model=clip) for name in KINDS}


@pytest.fixture(scope="session")
def embeds() -> torch.Tensor:
    """Embeddings [20, 192] of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 192, generator=generator) * torch.logspace(-2, 2, 20)[:, None]


@pytest.fixture(scope="session")
def stranger(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier over a base whose image tower alone is another."""
    root = tmp_path_factory.mktemp("stranger")
    clip = CLIPModel.from_pretrained(base)
    with torch.no_grad():
        clip.visual_projection.weight.mul_(1.5)
    shutil.copytree(base, root / "clip")
    clip.save_pretrained(root / "clip")
    Model.from_base(str(root / "clip"), ["red", "green"]).save_pretrained(root / "colours")
    return root / "colours"
