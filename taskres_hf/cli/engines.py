"""`taskres engines`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .screen import console, emit, quiet_libraries, say
from .values import zero_shot_model

if TYPE_CHECKING:
    from ..embedding.engines.proving import Proof

_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        show_default=False,
        help=f"Hub id or folder of a CLIP-like model, or 'shipped' for the small one in this package. "
        f"Default: ${opt.BASE_VARIABLE}, else {opt.DEFAULT_BASE}.",
    ),
]
_SLOW = "bf16 products have {:.2g} times the speed of fp32 here"
_Int8 = Annotated[bool, typer.Option("--int8", help="Try int8 too, which is only used on request.")]


def engines(
    base_model: _Base = None,
    base_revision: opt.BaseRevision = None,
    int8: _Int8 = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Which form of an image tower is right and fastest on this machine; remembers it for `--engine auto`.

    Each form passes probe pictures beside the tower as it is, and the right ones are timed in turn, decoding left out.

    Example:  taskres engines --base-model openai/clip-vit-base-patch32
    """
    quiet_libraries(quiet or as_json, collect=as_json)
    import torch

    from ..embedding.embedder import Embedder
    from ..embedding.engines.proving import STOCK, fastest, remember
    from ..machine import abilities, is_faster, processor, speed_of

    name = base_model or opt.default_base_model()
    model = zero_shot_model(name, ["a", "b"], quiet or as_json, revision=base_revision)
    speed = speed_of(torch.bfloat16, anew=True)
    embedder = Embedder(model.clip, model.image_processor, "auto", "auto")
    pairs = embedder.candidates()
    wanted = {**pairs, "torch-int8": ("torch", "int8")} if int8 else pairs
    proofs = embedder.prove(wanted)
    remember(model.clip, proofs)
    chosen = fastest(proofs, pairs)
    found = {
        "processor": processor(),
        "abilities": abilities(),
        "engine": chosen,
        "engines": {name: _facts(proof, proofs[STOCK]) for name, proof in proofs.items()},
        "not_tried": {} if is_faster(torch.bfloat16) else {"torch-bf16": _SLOW.format(speed)},
        "not_installed": _not_installed(),
    }
    emit(as_json, found, lambda: _show(found))


def _facts(proof: Proof, stock: Proof) -> dict[str, Any]:
    seconds = proof.seconds
    return {
        "pictures_per_second": round(1 / seconds, 2) if seconds else None,
        "times_stock": round(stock.seconds / seconds, 3) if seconds and stock.seconds else None,
        "centred_cosine": None if proof.cosine is None else round(proof.cosine, 6),
        "seconds_to_prepare": proof.seconds_to_prepare,
        "not_used_because": proof.reason,
    }


def _not_installed() -> dict[str, str]:
    from importlib.util import find_spec

    extras = {"openvino": "openvino", "onnxruntime": "onnx"}
    return {name: f'pip install "taskres_hf[{extra}]"' for name, extra in extras.items() if find_spec(name) is None}


def _show(found: dict[str, Any]) -> None:
    from ..tables import Table

    say(f"{found['processor']}:\n{', '.join(found['abilities'])}")
    rows = []
    for name, facts in found["engines"].items():
        rate, times, cosine = facts["pictures_per_second"], facts["times_stock"], facts["centred_cosine"]
        rows.append(
            [
                "the tower as it is" if name == "stock" else name,
                "-" if rate is None else f"{rate:.1f}",
                "-" if times is None else f"{times:.2f}",
                "-" if cosine is None else f"{cosine:.4f}",
                facts["not_used_because"] or ("automatic" if name == found["engine"] else ""),
            ]
        )
    columns = ["engine", "pictures/s", "times as it is", "cosine", ""]
    console().print(Table(columns, rows).rich())
    for name, reason in found["not_tried"].items():
        say(f"{name} is not tried: {reason}.")
    for name, command in found["not_installed"].items():
        say(f"{name} is not installed: {command}")
