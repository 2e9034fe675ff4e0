"""Recipe `auto` beside a pretrained head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taskres_hf.training.beside_head import fit_whitened_beside
from taskres_hf.training.whitened import fit_whitened

GENERATOR = torch.Generator().manual_seed(0)
TEXT = F.normalize(torch.randn(5, 12, generator=GENERATOR), dim=1)
LABELS = torch.arange(30) % 5
IMAGES = F.normalize(TEXT[LABELS] + 0.4 * torch.randn(30, 12, generator=GENERATOR), dim=1)


def test_beside_rows_of_cosines_it_is_recipe_auto() -> None:
    """CLIP's own classifier, written as a head over embeddings of length 1, is learned beside in the same way."""
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
