"""`taskres export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .screen import emit, percent, quiet_libraries, say, say_loading, when_interrupted
from .values import resolve_base


class FormatName(opt.Choice):
    ONNX = "onnx"
    OPENVINO = "openvino"
    TORCH = "torch"
    LINEAR = "linear"
    WEB = "web"
    HANDLER = "handler"


class ExportPrecision(opt.Choice):
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def export(
    model: opt.Artifact,
    format: Annotated[
        FormatName,
        typer.Option(
            metavar="FORMAT",
            help="onnx, openvino, torch (torch.export), linear (transformers and a linear layer), web (a static page) "
            "or handler (Inference Endpoints).",
        ),
    ] = FormatName.ONNX,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="FOLDER", help="Folder to write; MODEL-FORMAT by default."),
    ] = None,
    precision: Annotated[
        ExportPrecision, typer.Option(help="fp16 and int8 (not torch, linear, openvino) are smaller and round more.")
    ] = ExportPrecision.FP32,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="DATASET", help="Also measure the accuracy that the export keeps on it."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of it: test, else validation, else the only one.")
    ] = None,
    vendor: Annotated[
        bool, typer.Option("--vendor", help="web: put the JavaScript (by npm) beside the page, so it needs no CDN.")
    ] = False,
    strength: opt.Strength = None,
    revision: opt.Revision = None,
    base_model: opt.BaseModel = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a classifier in a form that runs without this library.

    What is written is compared with the classifier on real pictures, and kept only where the logits agree.

    Example:  taskres export my-classifier --format web --precision int8 --vendor
    """
    folder = output_dir or Path(f"{Path(model).name or 'classifier'}-{format.value}")
    when_interrupted(lambda: f"{folder} is as it was.")
    quiet_libraries(quiet or as_json, collect=as_json)
    import torch

    from ..export import export as write
    from ..modeling_taskres import TaskResCLIPForImageClassification

    say_loading(model, quiet or as_json)
    classifier = TaskResCLIPForImageClassification.from_pretrained(
        model, revision=revision, base_model=base_model and resolve_base(base_model), dtype=torch.float32,
        strength=strength,
    )  # fmt: skip
    facts = write(
        classifier, folder, format.value, precision=precision.value, dataset=dataset, split=split, vendor=vendor
    )
    emit(as_json, {"output_dir": str(folder), **facts}, lambda: _show(folder, facts))


def _show(folder: Path, facts: dict[str, Any]) -> None:
    check, measured = facts["check"], facts["accuracy"]
    say(f"Exported to {folder}: {facts['format']}, {facts['precision']}, {facts['bytes'] / 1e6:.1f} MB.")
    say(
        f"On {check['pictures']} pictures its logits differ by {check['largest_difference']:.2g} at most (allowed "
        f"{check['tolerance']:.2g}), and {percent(check['same_answer'])} of the answers are the same."
    )
    if measured is not None:
        say(
            f"Accuracy on {measured['pictures']} pictures: {percent(measured['exported'])}; of the classifier itself "
            f"{percent(measured['classifier'])}."
        )
    if facts["format"] == "web":
        say(f"To try it: python -m http.server --directory {folder}")
