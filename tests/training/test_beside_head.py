"""Recipe `auto` beside a pretrained head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taskres_hf.training import beside_head
from taskres_hf.training.beside_head import fit_whitened_beside
from taskres_hf.training.whitened import fit_whitened

GENERATOR = torch.Generator().manual_seed(0)
TEXT = F.normalize(torch.randn(5, 12, generator=GENERATOR), dim=1)
LABELS = torch.arange(30) % 5
IMAGES = F.normalize(TEXT[LABELS] + 0.4 * torch.randn(30, 12, generator=GENERATOR), dim=1)


def test_beside_rows_of_cosines_it_is_recipe_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's own classifier, written as a head over embeddings of length 1, is learned beside in the same way."""
    monkeypatch.setattr(beside_head, "_RELUCTANCE", 4.0)  # the one constant in which they differ
    text = fit_whitened(IMAGES, LABELS, TEXT, 100.0)
    head = fit_whitened_beside(IMAGES, LABELS, 100.0 * TEXT, None)
    torch.testing.assert_close(head.weight, text.weight, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(head.bias, text.bias, atol=1e-3, rtol=1e-4)


def test_the_unit_of_embeddings_does_not_matter() -> None:
    bias = torch.linspace(-1, 1, 5)
    one = fit_whitened_beside(IMAGES, LABELS, 20 * TEXT, bias)
    other = fit_whitened_beside(7 * IMAGES, LABELS, 20 / 7 * TEXT, bias)
    torch.testing.assert_close(7 * other.weight, one.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(other.bias, one.bias, atol=1e-3, rtol=1e-3)


def test_a_fit_that_is_too_sure_of_itself_is_tempered_not_thrown_away() -> None:
    """Shots of which some are not what they seem, beside a head of small logits."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(5, 200, generator=generator)
    labels, truth = torch.arange(20) % 5, torch.arange(300) % 5
    shots, pictures = ((centers[y] + torch.randn(len(y), 200, generator=generator)).relu() for y in (labels, truth))
    weight = 0.03 * (centers + 3.0 * torch.randn(5, 200, generator=generator))
    labels[::8] = (labels[::8] + 1) % 5
    fitted = fit_whitened_beside(shots, labels, weight, None)
    answers = (pictures.double() @ fitted.weight.T + fitted.bias).argmax(1)
    assert fitted.chosen["zero_shot"] < 0.5
    assert int((answers == truth).sum()) > int(((pictures @ weight.T).argmax(1) == truth).sum()) + 20
