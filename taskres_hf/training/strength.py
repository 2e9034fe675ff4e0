"""How far to trust a classifier on pictures unlike its shots: a rule that needs no labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError

_NEAREST = 5
_PIECE = 1 << 22  # similarities made at a time


@torch.no_grad()
def suggest_strength(shot_embeds: Tensor, image_embeds: Tensor) -> float:
    """A `strength` for pictures that may differ from the shots in style; `docs/shift-of-style.md` says how good it is.

    It compares how near the new pictures are to the shots with how near the shots are to each other: twice the
    probability that a shot, compared with the other shots, is farther away than a new picture, and at most 1. Near is
    the mean cosine to the five nearest shots.

    Args:
        shot_embeds: [N, D] image embeddings of the shots, one view each, of any length, at least 2; a few each class,
            and no copies, which make the shots look nearer to each other than they are.
        image_embeds: [M, D] those of the new pictures, at least 1 and better 50 or more, of all or most classes.

    Returns:
        0 (all new pictures are farther away than any shot) to 1 (no farther than shots), for `model.strength`.

    Raises:
        ConfigurationError: fewer embeddings than that, of another shape, or not finite.
    """
    shots, images = _unit(shot_embeds, "shot_embeds", 2), _unit(image_embeds, "image_embeds", 1)
    if shots.shape[1] != images.shape[1]:
        raise ConfigurationError(
            f"`shot_embeds` have {shots.shape[1]} numbers each and `image_embeds` {images.shape[1]}: take both from "
            "the same base model."
        )
    count = len(shots)
    near = min(_NEAREST, count - 1)
    # Of the shots one more, which is the shot itself.
    own = torch.cat([(part.topk(near + 1, dim=1)[0].sum(1) - 1.0) / near for part in _similarities(shots, shots)])
    new = torch.cat([part.topk(near, dim=1)[0].mean(1) for part in _similarities(images, shots)])
    own = own.sort()[0]
    farther = torch.searchsorted(own, new) + torch.searchsorted(own, new, right=True)  # a tie counts half
    return min(1.0, float(farther.double().mean()) / count)


def _similarities(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
    for part in rows.split(max(1, _PIECE // len(others))):
        yield part @ others.T


def _unit(embeds: Tensor, name: str, least: int) -> Tensor:
    """Embeddings of unit length, in fp64 on the CPU."""
    if embeds.ndim != 2 or len(embeds) < least:
        raise ConfigurationError(
            f"`{name}` must be embeddings [N, D] of {least} or more pictures; got shape {list(embeds.shape)}."
        )
    if not bool(torch.isfinite(embeds).all()):
        raise ConfigurationError(f"`{name}` hold NaN or infinite values: check the pictures and the base model.")
    return F.normalize(embeds.detach().to("cpu", torch.float64), dim=1)
