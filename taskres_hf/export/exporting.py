"""Exports a classifier, compares what was written with the classifier itself, and keeps it only where both agree."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from ..embedding.engines.choose import file_sha256
from ..encoders import picture_size
from ..errors import ArtifactError, ConfigurationError, TaskResError
from ..hub import side_files
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import label_threshold
from ..storage import (
    check_can_write,
    is_path,
    json_bytes,
    read_sealed,
    staging_folder,
    umask,
    write_bytes,
    write_sealed,
)
from ..training.measuring import unseen_pictures
from . import formats, web

if TYPE_CHECKING:
    from ..data import LabelledImages

FORMATS: dict[str, Callable[[formats.FusedClassifier, Path, str], formats.Run]] = {
    "onnx": formats.to_onnx,
    "openvino": formats.to_openvino,
    "torch": formats.to_torch,
    "linear": formats.to_linear,
    "web": web.to_web,
    "handler": formats.to_handler,
}
PRECISIONS = ("fp32", "fp16", "int8")
# Largest difference of a logit, relative to the longest row of the fused classifier: 1 is a cosine's whole range.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 5e-2}
_INT8 = ("onnx", "web", "handler")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# Of safetensors, before and after 0.5, and of OpenVINO, whose errors have no number.
_FULL_IN_WORDS = ("IoError", "I/O error", "iostream error")
_KIND = "taskres_hf export"
_FACTS = "export.json"
_PICTURES = 8  # shipped ones that every export is compared on
_BATCH = 16


def export(
    model: TaskResCLIPForImageClassification | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    format: str = "onnx",
    *,
    precision: str = "fp32",
    dataset: Any = None,
    split: str | None = None,
    vendor: bool = False,
) -> dict[str, Any]:
    """Write a classifier in a form that runs without this library.

    What is written is read back and compared with the classifier on real pictures; where a logit differs by more than
    `TOLERANCES[precision]` of the longest row of the fused classifier (100 in zero-shot CLIP), nothing is kept.
    The folder appears whole or not at all.

    Args:
        model: the classifier, or its folder or Hub id. Its present strength, bias and all else count.
        output_dir: a new or empty folder, or an earlier export that nobody has changed, which is replaced.
        format: `"onnx"`, `"openvino"`, `"torch"` (`torch.export`), `"linear"` (a model of transformers and a linear
            layer), `"web"` (a static page) or `"handler"` (Inference Endpoints).
        precision: `"fp32"`; `"fp16"`, the tower in fp16; or `"int8"`, its products (onnx, web and handler).
        dataset: anything `load_evaluation_data` reads, or a `LabelledImages`: accuracy is measured on it too, before
            and after; pictures that it was trained on are left out. split: of it; test, else validation.
        vendor: for `"web"`: put the JavaScript into the folder too (fetched by npm), so that the page needs no CDN.

    Returns:
        What `export.json` in the folder holds: `format`, `precision`, `classes`, `size`, `base_model`, `check`
        (`pictures`, `largest_difference`, `tolerance`, `same_answer`, a share), `label_threshold` (of several labels
        per picture, whose probabilities are the sigmoid of each logit; else None), `accuracy` (`pictures`,
        `classifier`, `exported`; None without a dataset), `files` (SHA-256 by name) and `bytes` in all.

    Raises:
        ConfigurationError: an unknown format or precision, a combination that does not exist, a tower that cannot be
            exported, or a dataset for a classifier of several labels per picture.
        MissingExtraError: the format's package is not installed.
        ArtifactError: the folder holds something else or cannot be written, or the export does not agree.
    """
    _check_wish(format, precision, vendor)
    folder = Path(output_dir)
    _check_target(folder)
    classifier: Any = model
    if not isinstance(model, TaskResCLIPForImageClassification):
        classifier = TaskResCLIPForImageClassification.from_pretrained(model)
    if dataset is not None:
        classifier.classifier.check_one_label("The accuracy that an export keeps (dataset)")
    fused = formats.FusedClassifier(classifier, half=precision == "fp16" and format != "openvino")
    images = None if dataset is None else _unseen_pictures(classifier, dataset, split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = _in_words(format, precision, str(classifier.config.base_model_type))
    with staging_folder(folder.absolute().parent, folder.name) as staging, words:
        run = FORMATS[format](fused, staging, precision)
        for name, content in _side_files(classifier).items():
            write_bytes(staging / (web.MODEL if format == "web" else "") / name, content)
        if format == "web":
            web.add_page(staging, classifier.config, classifier.image_processor, precision, vendor)
        facts = _facts(classifier, format, precision)
        reference = fused if precision == "fp32" else formats.FusedClassifier(classifier)
        _compare(facts, run, reference, classifier, images)
        del run
        facts["files"] = {name: file_sha256(file) for name, file in _files(staging)}
        facts["bytes"] = sum(file.stat().st_size for _, file in _files(staging))
        write_sealed(staging / _FACTS, facts)
        _put_in_place(staging, folder)
    return facts


@contextmanager
def _in_words(format: str, precision: str, model_type: str) -> Iterator[None]:
    """Around what converts, and runs what was converted.

    Raises:
        ConfigurationError: instead of whatever a converter or runtime raises at an image tower it does not know.
        ArtifactError: instead of a writer's own error where the disk is full.
    """
    try:
        yield
    except (TaskResError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or any(words in reason for words in _FULL_IN_WORDS):
            raise ArtifactError(
                f"Cannot write the export: {reason}. Nothing was kept; make room on the disk."
            ) from error
        if isinstance(error, OSError):
            raise
        raise ConfigurationError(
            f"The image tower of {model_type!r} cannot be converted to {format} ({precision}): "
            f"{type(error).__name__}: {reason}. Nothing was kept; try another format or precision."
        ) from error


def _check_wish(format: str, precision: str, vendor: bool) -> None:
    if format not in FORMATS or precision not in PRECISIONS:
        raise ConfigurationError(
            f"`format` must be one of {', '.join(FORMATS)} and `precision` one of {', '.join(PRECISIONS)}; got "
            f"{format!r}, {precision!r}."
        )
    if precision == "int8" and format not in _INT8:
        advice = " For OpenVINO, compress the fp32 export with its own package NNCF." if format == "openvino" else ""
        raise ConfigurationError(f"precision='int8' is for {', '.join(_INT8)}; got format={format!r}.{advice}")
    if vendor and format != "web":
        raise ConfigurationError(f"vendor=True (--vendor) is for format='web'; got {format!r}.")


def _side_files(model: TaskResCLIPForImageClassification) -> dict[str, bytes]:
    """The image processor and the class names, in order."""
    return {**side_files(model.image_processor, False), "labels.json": json_bytes(model.class_names)}


def _facts(model: TaskResCLIPForImageClassification, format: str, precision: str) -> dict[str, Any]:
    config, name, head = model.config, str(model.config.base_model_name_or_path or ""), model.classifier
    threshold = label_threshold(head.facts) if head.several_labels else None
    return {
        "kind": _KIND, "format": format, "precision": precision, "classes": len(model.class_names),
        "size": list(picture_size(model.clip)), "strength": model.strength, "label_threshold": threshold,
        "base_model": Path(name).name if is_path(name) else name,  # never a path of this machine
        "base_model_revision": config.base_model_revision, "base_model_type": config.base_model_type,
        "torch": torch.__version__,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- agreement


def _compare(
    facts: dict[str, Any],
    run: formats.Run,
    reference: formats.FusedClassifier,
    model: Any,
    images: LabelledImages | None,
) -> None:
    """Adds `check` and `accuracy` to the facts.

    Raises:
        ArtifactError: a logit differs by more than the tolerance.
    """
    logits, exported = [], []
    for number, batch in enumerate(_batches(images)):
        pixels = model.image_processor(images=batch, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits.append(reference(pixels)[0])
            exported.append(run(pixels))
            if number == 0:
                _check_fusion(model, reference, pixels, logits[0])
                exported[0] = torch.cat(
                    [run(pixels[:1]), exported[0][1:]]
                )  # of another batch size than it was made with
    wanted, found = torch.cat(logits), torch.cat(exported)
    tolerance = TOLERANCES[facts["precision"]] * _longest(reference)
    difference = float((found - wanted).abs().max())
    same = float((reference.head.given(found) == reference.head.given(wanted)).all(dim=1).double().mean())
    if not difference <= tolerance:
        raise ArtifactError(
            f"The exported file gives other logits than the classifier: they differ by {difference:.3g} on "
            f"{len(wanted)} pictures, allowed is {tolerance:.3g} for {facts['precision']}. Nothing was kept; export "
            "with another precision (fp32), or in another format."
        )
    facts["check"] = {
        "pictures": len(wanted), "largest_difference": difference, "tolerance": tolerance, "same_answer": same,
    }  # fmt: skip
    facts["accuracy"] = None
    if images is not None:
        measured, truth = slice(_PICTURES, None), torch.tensor(images.labels)
        both = [float((rows[measured].argmax(dim=1) == truth).double().mean()) for rows in (wanted, found)]
        facts["accuracy"] = {"pictures": len(truth), "classifier": both[0], "exported": both[1]}


def _check_fusion(model: Any, reference: formats.FusedClassifier, pixels: Tensor, fused: Tensor) -> None:
    """In fp32, logits of the classifier itself must be those of the fused module.

    Raises:
        ArtifactError: they are not.
    """
    if model.clip.dtype != torch.float32:
        return
    own = model(pixels.to(model.device)).logits.cpu()
    difference = float((own - fused).abs().max())
    if not difference <= TOLERANCES["fp32"] * _longest(reference):
        raise ArtifactError(
            f"The classifier cannot be written as one linear layer: logits differ by {difference:.3g}. Nothing was "
            "kept. Please report this, with the classifier's config.json."
        )


def _longest(reference: formats.FusedClassifier) -> float:
    """Length of the longest row of the fused classifier; at least 1."""
    return max(float(reference.head.linear.weight.norm(dim=1).max()), 1.0)


def _batches(images: LabelledImages | None) -> Iterator[Sequence[PIL.Image.Image]]:
    """The shipped pictures, then those of the data set, RGB."""
    from ..demo import demo_dataset

    shipped = demo_dataset("all-categories")["test"]
    step = len(shipped) // _PICTURES
    yield [shipped[number * step]["image"].convert("RGB") for number in range(_PICTURES)]
    for start in range(0, 0 if images is None else len(images), _BATCH):
        assert images is not None
        yield [images.image(row) for row in range(start, min(start + _BATCH, len(images)))]


def _unseen_pictures(model: TaskResCLIPForImageClassification, dataset: Any, split: str | None) -> LabelledImages:
    """Labelled pictures in the classifier's order of classes, without those it was trained on."""
    from ..data import LabelledImages, load_evaluation_data

    images = dataset
    if not isinstance(dataset, LabelledImages):
        images = load_evaluation_data(dataset, split, default_names=model.class_names)
    return unseen_pictures(model.config.data, images.aligned(model.class_names))


# ---------------------------------------------------------------------------------------------------- the folder


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Files below a folder, by their name with `/`, but for the facts themselves."""
    found = sorted(file for file in folder.rglob("*") if not file.is_dir())
    return [(name, file) for file in found if (name := file.relative_to(folder).as_posix()) != _FACTS]


def _check_target(folder: Path) -> None:
    """Refuse a place that holds anything but an export as it was written, or that cannot be written.

    Raises:
        ArtifactError: says what is there.
    """
    if os.path.lexists(folder):
        reason = "it is no folder" if folder.is_symlink() or not folder.is_dir() else _other_content(folder)
        if reason:
            raise ArtifactError(f"{folder} is not replaced: {reason}. Choose another folder, or move it away.")
    check_can_write(folder.absolute().parent)


def _other_content(folder: Path) -> str:
    """What is in a folder besides an unchanged export; empty where nothing is."""
    names = sorted(os.listdir(folder))
    if not names:
        return ""
    with suppress(ArtifactError):
        facts = read_sealed(folder / _FACTS)
        sums = facts.get("files")
        if facts.get("kind") == _KIND and isinstance(sums, dict):
            files = dict(_files(folder))
            other = [name for name, file in files.items() if file.is_symlink() or sums.get(name) != file_sha256(file)]
            return f"{other[0]} there was added or changed since it was exported" if other else ""
    return f"it holds {names[0]!r}, which is no part of an earlier export"


def _put_in_place(staging: Path, folder: Path) -> None:
    """Give the folder its name; an earlier export is moved aside first, and back if that fails."""
    try:
        staging.chmod(0o777 & ~umask())
        if not folder.is_dir():
            os.rename(staging, folder)
            return
        _check_target(folder)  # again: the export took a while
        with staging_folder(folder.absolute().parent, folder.name) as aside:
            os.rename(folder, aside / "old")
            try:
                os.rename(staging, folder)
            except BaseException:
                os.rename(aside / "old", folder)
                raise
    except OSError as error:
        raise ArtifactError(f"Cannot write {folder}: {error.strerror or error}. Nothing was changed.") from error
