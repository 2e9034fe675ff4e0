"""What identifies a base: the prompts, a sketch of its text embeddings, and one of its image tower's weights.

Sketches are random projections, compared with a tolerance: rounding differs between machines and dtypes, another
checkpoint differs much more.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import BaseMismatchError
from .prompts import prompts_digest

_SKETCHES = 8
# Of t's sketch, relative to its norm, by the coarsest dtype its text tower was rounded to: above rounding, far below
# another checkpoint.
_TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
_COARSEST = 2e-2
# Of an image side's sketch, likewise.
_IMAGE_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
_BLOCKS, _BLOCK = 8, 8  # elements looked at in each weight: few, near each other, so that a mapped file is hardly read
_SMALL = 1e-4  # weights below are compared absolutely: fp16 has no finer ones
_NO_IMAGE_SIDE = ("text_", "logit_", "temperature")


def fingerprint(
    table: Tensor,
    prompts: Sequence[Sequence[str]],
    average: str,
    image: Mapping[str, Any] | None = None,
    score: tuple[float, float] | None = None,
    dtype: str = "float32",
    tokens: str | None = None,
) -> dict[str, Any]:
    """What a base classifier was made from, small enough for a config.

    Args:
        table: `t` [K, D]. prompts, average: what it was made of.
        image: `image_sketch` of the base, or None where it is not known.
        score: the base's logit scale and bias.
        dtype: what the text tower's weights were rounded to. tokens: `tokens_digest` of the prompts.
    """
    return {
        "prompts_sha256": prompts_digest(prompts, average),
        "tokens_sha256": tokens,
        "shape": list(table.shape),
        "norm": round(float(table.norm()), 4),
        "sketch": [round(value, 5) for value in _sketch(table)],
        "dtype": dtype,
        "score": None if score is None else list(score),
        "image": None if image is None else dict(image),
    }


def image_sketch(weights: Mapping[str, Tensor], dtype: str = "float32") -> dict[str, Any] | None:
    """Random projections of the image tower's weights: 64 elements of each, in units of their root mean square.

    Args:
        weights: by name, as in `state_dict`; those of the text side and the logit's scale are left out.
        dtype: what they were rounded to after they were stored.

    Returns:
        `{"sketch", "weights", "dtype"}`; None where they cannot be told: quantized, offloaded or not finite.
    """
    totals, count = torch.zeros(_SKETCHES, dtype=torch.float64), 0
    for name, weight in sorted(weights.items()):
        if name.startswith(_NO_IMAGE_SIDE) or name.endswith("position_ids"):
            continue
        if weight.is_meta or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            if weight.dtype == torch.int64:  # a counter, as of batch norm
                continue
            return None
        flat = weight.detach().reshape(-1)
        last = max(flat.numel() - _BLOCK, 0)
        starts = sorted({last * block // (_BLOCKS - 1) for block in range(_BLOCKS)})
        sample = torch.cat([flat[start : start + _BLOCK] for start in starts]).double().cpu()
        scale = max(float(sample.pow(2).mean().sqrt()), _SMALL)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        directions = torch.randn(_SKETCHES, len(sample) + 1, generator=generator, dtype=torch.float64)
        totals += directions[:, :-1] @ sample / (scale * math.sqrt(len(sample))) + directions[:, -1] * math.log(scale)
        count += 1
    if count == 0 or not bool(torch.isfinite(totals).all()):
        return None
    return {"sketch": [round(float(value), 6) for value in totals / math.sqrt(count)], "weights": count, "dtype": dtype}


def same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints (`config.base_fingerprint`) speak of one base under the same prompts.

    Rounding is tolerated. The image sides are compared where both fingerprints have one.
    """
    return _difference(first, second) is None


def check_fingerprint(now: Mapping[str, Any], stored: Mapping[str, Any], name: str) -> None:
    """Compare a base with the one the residual was trained on.

    Args:
        now, stored: fingerprints. name: the base's, for the message.

    Raises:
        BaseMismatchError: says whether the shape, the prompts (class order, names, templates), the text side (weights
            or tokenizer) or the image tower differ.
    """
    reason = _difference(now, stored)
    if reason is not None:
        accept = "Pass accept_base_mismatch=True to from_pretrained if you want the residual on this base all the same."
        raise BaseMismatchError(f"{reason.format(name=repr(name))} {'' if 'shape' in reason else accept}".rstrip())


def _difference(now: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """In what two fingerprints differ, as a sentence about `{name}`; None where they do not."""
    if list(now.get("shape") or []) != list(stored.get("shape") or []):
        return (
            f"The base {{name}} gives a base classifier of shape {now.get('shape')}; the residual was trained on "
            f"{stored.get('shape')}. Load it on the base model it was made for (base_model=, base_revision=)."
        )
    if now.get("prompts_sha256") != stored.get("prompts_sha256"):
        return (
            "The class names, their order or the templates in config.json are not those the residual was trained "
            "with, so its rows would meet other classes. Restore config.json."
        )
    gap = _gap(now, stored)
    allowed = max(_TOLERANCE.get(str(side.get("dtype", "float32")), _COARSEST) for side in (now, stored))
    if gap > allowed:
        tokens = (now.get("tokens_sha256"), stored.get("tokens_sha256"))
        cause = "its text tower's weights differ, as in another revision"
        if all(tokens) and tokens[0] != tokens[1]:
            cause = "its tokenizer makes other tokens of the prompts"
        elif not all(tokens):
            cause = "it is another revision, or its text tower's weights or tokenizer changed"
        return (
            f"The base {{name}} no longer gives the text embeddings the residual was trained on (relative difference "
            f"{gap:.2g}, allowed {allowed:g}): {cause}. Pin the right one with base_revision= or base_model=."
        )
    score, expected = now.get("score"), stored.get("score")
    if score and expected and any(abs(a - b) > 0.05 * abs(b) + 1e-6 for a, b in zip(score, expected, strict=False)):
        return (
            f"The base {{name}} has the logit scale and bias {list(score)}, the residual was trained with {expected}: "
            "it is another revision. Pin the right one with base_revision= or base_model=."
        )
    if image_sides_differ(now.get("image"), stored.get("image")):
        return (
            "The image tower of the base {name} is not the one the residual was trained on: its weights differ, as in "
            "another revision or a tower that was trained further (the text side is the same). Pin the right one with "
            "base_revision= or base_model=."
        )
    return None


def image_sides_differ(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two `image_sketch`es are of different weights; False where one is not known."""
    if not first or not second:
        return False
    sketches = first.get("sketch") or [], second.get("sketch") or []
    if first.get("weights") != second.get("weights") or len(sketches[0]) != len(sketches[1]):
        return True
    allowed = max(_IMAGE_TOLERANCE.get(str(side.get("dtype")), _COARSEST) for side in (first, second))
    return any(abs(one - other) > allowed for one, other in zip(*sketches, strict=True))


def _gap(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Largest relative difference of two text sides: sketches and norms."""
    sketches = first.get("sketch") or [], second.get("sketch") or []
    norms = [float(side.get("norm") or 0.0) for side in (first, second)]
    if len(sketches[0]) != len(sketches[1]) or not sketches[0] or not all(norms):
        return math.inf
    gap = max(abs(one - other) for one, other in zip(*sketches, strict=True))
    return float(max(gap, abs(norms[0] / norms[1] - 1.0)))


def _sketch(base: Tensor) -> list[float]:
    """`u_i . t . v_i / |t|` for fixed random unit-variance u and v: moves when any row moves or rows swap."""
    generator = torch.Generator().manual_seed(20221121)
    rows, dim = base.shape
    left = torch.randn(_SKETCHES, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(_SKETCHES, dim, generator=generator, dtype=torch.float64)
    table = base.double() / base.double().norm().clamp_min(1e-12)
    return [float(value) for value in torch.einsum("sk,kd,sd->s", left, table, right)]
