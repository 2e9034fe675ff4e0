"""Which form of an image tower is right and fastest on this machine: tried on probe pictures, and remembered.

What a processor does fast is not looked up: each form gets the tower ready, passes probe pictures beside the tower as
it is, and those that give the same embeddings are timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import TaskResError
from ...machine import keep, recalled
from .choose import ImageEngine

STOCK = "stock"  # the name of the tower as it is
SECONDS_TO_PREPARE = {"torch": 0.0, "openvino": 10.0, "onnxruntime": 30.0}  # once a base; then files are kept
CENTRED = 0.999  # least cosine, between what two pictures' embeddings differ by, of a form that is chosen automatically
CENTRED_ASKED = 0.9  # of one that was asked for: it tells another tower from rounding, no more
# Largest error relative to an embedding's length, to the same end.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.15}
_ROUNDS = 2


@dataclass(frozen=True)
class Proof:
    """One form of an image tower, tried on this machine.

    Attributes:
        reason: why it cannot be chosen automatically; None where it can.
        seconds: a picture takes, as embedding runs it, decoding left out; None where it was not timed.
        cosine: between what the embeddings of two probe pictures differ by, with it and with the tower as it is; None
            where the tower does not tell them apart, or gave none.
        seconds_to_prepare: what getting the tower ready took.
    """

    reason: str | None = None
    seconds: float | None = None
    cosine: float | None = None
    seconds_to_prepare: float = 0.0


def probe_pictures(height: int = 256, width: int = 320) -> list[PIL.Image.Image]:
    """Two pictures that have little in common."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (4, 5, 3), dtype=np.uint8), generator.integers(0, 120, (40, 50, 3), np.uint8)]
    return [PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC) for pixels in coarse]


def agrees(embeds: Tensor, expected: Tensor, precision: str, centred: float = CENTRED_ASKED) -> bool:
    """Whether embeddings [2, D] of the probe pictures are those of the tower as it is, but for rounding.

    What most embeddings have in common would hide an error, so what the two differ by is compared too (`centred` is the
    least cosine), where a tower tells them apart at all (one with random weights may not).
    """
    if embeds.shape != expected.shape or not bool(embeds.isfinite().all()):
        return not bool(expected.isfinite().all()) and embeds.shape == expected.shape
    tolerance = _TOLERANCE[precision]
    if bool(((embeds - expected).norm(dim=1) > tolerance * expected.norm(dim=1)).any()):
        return False
    cosine = centred_cosine(embeds, expected, precision)
    return cosine is None or cosine >= centred


def centred_cosine(embeds: Tensor, expected: Tensor, precision: str) -> float | None:
    """Cosine between what two embeddings [2, D] differ by and what those of the tower as it is do; None: by nothing."""
    if embeds.shape != expected.shape:
        return None
    difference, wanted = embeds[0] - embeds[1], expected[0] - expected[1]
    told_apart = bool(wanted.norm() > _TOLERANCE[precision] * expected.norm(dim=1).mean())
    return float(torch.cosine_similarity(difference, wanted, dim=0)) if told_apart else None


def prove(
    engines: Mapping[str, Callable[[], ImageEngine]],
    embed: Callable[[ImageEngine], Tensor],
    pace: Callable[[ImageEngine], float],
) -> dict[str, Proof]:
    """Try forms of one tower, and time those that are right in turn.

    Args:
        engines: by name; `"stock"`, the tower as it is, is among them. embed: the probe pictures' embeddings [2, D].
        pace: seconds a picture takes.
    """
    proofs: dict[str, Proof] = {}
    ready: dict[str, ImageEngine] = {}
    expected: Tensor | None = None
    for name in sorted(engines, key=lambda name: name != STOCK):
        start = time.perf_counter()
        try:
            engine = engines[name]()
            engine.get_ready()
            seconds = time.perf_counter() - start
            embeds = embed(engine)
        except MemoryError:
            raise
        except Exception as error:  # whatever a library that converts towers raises at one it does not know
            if name == STOCK:
                raise
            text = str(error) if isinstance(error, TaskResError) else f"{type(error).__name__}: {error}"
            proofs[name] = Proof(text.partition("\n")[0])
            continue
        expected = embeds if expected is None else expected
        right = engine.is_stock or agrees(embeds, expected, engine.precision, CENTRED)
        cosine = centred_cosine(embeds, expected, engine.precision)
        reason = None if right else "gives other embeddings"
        if engine.precision == "int8" and agrees(embeds, expected, "int8"):
            reason, right = "rounds more: on request only", True
        proofs[name] = Proof(reason, None, cosine, round(seconds, 3))
        if right:
            ready[name] = engine
    best: dict[str, float] = {}
    for number in range(_ROUNDS + 1):
        for name, engine in ready.items():
            seconds = pace(engine)
            if number:  # the first round warms up
                best[name] = min(best.get(name, seconds), seconds)
    return {name: Proof(**{**asdict(proof), "seconds": best.get(name)}) for name, proof in proofs.items()}


def fastest(proofs: Mapping[str, Proof], names: Collection[str]) -> str | None:
    """The fastest right form among these and the tower as it is; None where that was not timed."""
    right = {name: proof.seconds for name, proof in proofs.items() if proof.reason is None and proof.seconds}
    allowed = {name: seconds for name, seconds in right.items() if name == STOCK or name in names}
    return min(allowed, key=lambda name: allowed[name]) if STOCK in allowed else None


def remembered(base: PreTrainedModel) -> dict[str, Proof]:
    """What was found out about towers of this shape on this machine, with these libraries; empty if nothing."""
    known = recalled(_shape(base))
    if not isinstance(known, Mapping) or STOCK not in known:
        return {}
    with suppress(TypeError):
        proofs = {name: Proof(**proof) for name, proof in known.items()}
        if all(isinstance(proof.seconds, (float, type(None))) for proof in proofs.values()):
            return proofs
    return {}


def remember(base: PreTrainedModel, proofs: Mapping[str, Proof]) -> None:
    """Keep them for the next time; what cannot be kept is found out again."""
    keep(_shape(base), {name: asdict(proof) for name, proof in proofs.items()})


def _shape(base: PreTrainedModel) -> list[Any]:
    """What of a tower its speed depends on."""
    vision = getattr(base.config, "vision_config", base.config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return [base.config.model_type, *(getattr(vision, name, None) for name in names)]
