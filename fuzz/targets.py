"""The files that the library writes and proves on reading: what is read, from which seeds, and what counts as right."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.artifact import CONFIG, PROCESSOR, WEIGHTS, read_checked, rewrite
from taskres_hf.base_classifier import read_table, write_table
from taskres_hf.embedding.cache import KeptRows
from taskres_hf.embedding.engines import choose
from taskres_hf.paper.cells import read_cell
from taskres_hf.paper.checkpoints import read_checkpoint as read_published
from taskres_hf.predicting import PredictionWriter
from taskres_hf.storage import SEAL, json_bytes, sealed, with_metadata, write_sealed
from taskres_hf.training.run import read_checkpoint, write_checkpoint

from .harness import MADE_AGAIN, Target
from .material import base, classifier, folder_files
from .mutation import split_safetensors

Files = dict[str, bytes]
_GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def written(write: Callable[[Path], Any]) -> Files:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return folder_files(Path(folder))


# ---------------------------------------------------------------------- artifacts


def _artifacts() -> list[Files]:
    plain, image, rich = classifier(1), classifier(2, residual_side="image"), classifier(3, ["a cat", "dög"])
    rich.classifier.class_bias = torch.tensor([0.25, -1.5])
    rich.classifier.shift = 0.01 * torch.ones_like(rich.classifier.base)
    rich.strength = 0.75
    seeds = [written(plain.save_pretrained), written(image.save_pretrained), written(rich.save_pretrained)]
    seeds.append(written(lambda folder: plain.save_pretrained(folder, residual_dtype=torch.float16)))
    return [{name: data for name, data in files.items() if name != "README.md"} for files in seeds]


def _read_artifact(folder: Path) -> Any:
    return read_checked(folder / CONFIG, folder / WEIGHTS)


def _load_artifact(folder: Path) -> Any:
    model = TaskResCLIPForImageClassification.from_pretrained(folder, base_model=base())
    embeds = torch.randn(4, model.config.projection_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(image_embeds=embeds).logits
    return model.class_names, logits.numpy().tobytes(), model.image_processor.to_json_string()


def _resign_artifact(files: Files) -> Files | None:
    """An artifact with all checksums made right, where its files can be read at all."""
    try:
        config, processor = json.loads(files[CONFIG]), json.loads(files[PROCESSOR])
        return written(lambda folder: rewrite(folder, files[WEIGHTS], config, processor))
    except Exception:  # of whatever is too damaged
        return None


def _reseal(files: Files) -> Files | None:
    """Any other files with the checksums inside them made right."""
    try:
        return {name: _resealed(name, content) for name, content in files.items()}
    except Exception:
        return None


def _resealed(name: str, content: bytes) -> bytes:
    if name.endswith(".json"):
        return json_bytes(sealed(json.loads(content)))
    header = split_safetensors(content)[0]
    return with_metadata(content, {key: text for key, text in header.get("__metadata__", {}).items() if key != SEAL})


def artifact() -> Target:
    """Saved classifiers; every 50th is loaded as a user does, with its image processor, and classifies."""
    return Target("artifact", _artifacts(), _read_artifact, thorough=_load_artifact, resign=_resign_artifact)


def old_artifact() -> Target:
    """Artifacts of earlier formats, whose checksum covers the tensors alone: an edited config is another answer."""
    seeds = [folder_files(folder) for folder in sorted(_GOLDEN.iterdir()) if (folder / WEIGHTS).is_file()]
    return Target("old-artifact", seeds, _read_artifact, check=lambda answer: "")


# ---------------------------------------------------------------------- caches

_TABLE = torch.arange(48, dtype=torch.float32).reshape(6, 8).sin()
_KEYS = [hashlib.sha256(bytes([row])).digest() for row in range(6)]


def add_rows(folder: Path, each: int) -> KeptRows:
    """The table, written `each` rows at a time."""
    cache = KeptRows(folder / "table")
    for start in range(0, 6, each):
        cache.add(_KEYS[start : start + each], _TABLE[start : start + each])
        cache.flush()
    return cache


def _embeddings() -> list[Files]:
    return [written(lambda folder: add_rows(folder, 6)), written(lambda folder: add_rows(folder, 2))]


def _read_embeddings(folder: Path) -> Any:
    found = list(KeptRows(folder / "table").take(_KEYS))
    if any(not torch.equal(rows, _TABLE[positions]) for positions, rows in found):
        return [(positions, rows.tolist()) for positions, rows in found]
    return "whole" if sum(len(positions) for positions, _ in found) == 6 else MADE_AGAIN


def embeddings() -> Target:
    """The cache of embeddings: one shard, and several of an unfinished run."""
    return Target("embeddings", _embeddings(), _read_embeddings, changes_folder=True, resign=_reseal)


def _read_base_classifier(folder: Path) -> Any:
    table = read_table(folder / "t.safetensors")
    return MADE_AGAIN if table is None else (str(table.dtype), list(table.shape), table.numpy().tobytes())


def base_classifier() -> Target:
    """The cache of base classifiers."""
    seed = written(lambda folder: write_table(folder / "t.safetensors", _TABLE))
    return Target("base-classifier", [seed], _read_base_classifier, resign=_reseal)


_TOWER = {"tower.xml": b"<net>" + bytes(range(32, 127)) * 3 + b"</net>", "tower.bin": _TABLE.numpy().tobytes()}


def _read_tower(folder: Path) -> Any:
    made = []

    def convert(file: Path) -> None:
        made.append(file)
        for name, content in _TOWER.items():
            (file.parent / name).write_bytes(content)

    digest = mock.patch.object(choose, "image_weights_digest", return_value="0" * 64)  # of a base that stays the same
    with digest, mock.patch.dict(os.environ, {"TASKRES_CACHE": str(folder)}):
        file = choose.converted_tower("openvino", "tower.xml", base(), convert)
    found = {name: (file.parent / name).read_bytes() for name in _TOWER}
    return found if found != _TOWER else MADE_AGAIN if made else "whole"


def tower() -> Target:
    """Converted image towers, kept in the cache folder."""
    return Target("tower", [written(_read_tower)], _read_tower, changes_folder=True)


# ---------------------------------------------------------------------- runs


def _state(epoch: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names = ("residual", "exp_avg", "exp_avg_sq", "best_residual")
    tensors = {name: torch.full((3, 4), float(epoch + place)) for place, name in enumerate(names)}
    run = {"recipe": {"name": "paper", "learning_rate": 0.002}, "data": "0" * 64, "seed": 1, "templates": None}
    state = {
        "epoch": epoch, "global_step": 3 * epoch, "run": run, "best": {"score": 0.5, "epoch": 1, "waited": 0},
        "log_history": [{"epoch": number, "loss": 1 / number} for number in range(1, epoch + 1)], "callbacks": {},
    }  # fmt: skip
    return {**tensors, "step": torch.tensor(float(epoch))}, state


def _checkpoints(folder: Path) -> None:
    for epoch in (2, 4):
        write_checkpoint(classifier(epoch), str(folder), epoch, *_state(epoch), None)


def _is_of(epoch: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bool:
    expected, described = _state(epoch)
    same = set(tensors) == set(expected) and all(torch.equal(tensors[name], expected[name]) for name in expected)
    return same and {key: state.get(key) for key in described} == described


def _read_newest(folder: Path) -> Any:
    """What resuming finds: the newest checkpoint, or the one before it."""
    path, state, tensors = read_checkpoint(True, str(folder))
    for epoch in (4, 2):
        if path.name == f"checkpoint-{epoch}" and _is_of(epoch, state, tensors):
            return "whole" if epoch == 4 else MADE_AGAIN
    return path.name, state, {name: tensor.tolist() for name, tensor in tensors.items()}


def _read_named(folder: Path) -> Any:
    _, state, tensors = read_checkpoint(folder / "checkpoint-4", str(folder))
    return "whole" if _is_of(4, state, tensors) else (state, tensors)


def checkpoint() -> Target:
    """Checkpoints of training, as resuming reads them: where the newest is damaged, the one before it counts."""
    seed = {name: data for name, data in written(_checkpoints).items() if not name.endswith((CONFIG, PROCESSOR, ".md"))}
    return Target("checkpoint", [seed], _read_newest, thorough=_read_named, keep=(WEIGHTS,), resign=_reseal)


_RUN = {"files": "a" * 64, "classifier": "b" * 64, "top_k": 2, "batch_size": 4}
_ROWS = [
    {
        "file": f"pictures/{number}.png",
        "predictions": [{"label": f"class {(number + k) % 3}", "score": 0.7} for k in range(2 * (number != 5))],
        "error": "'pictures/5.png' cannot be read" if number == 5 else None,
    }
    for number in range(12)
]  # fmt: skip


def _begin_predictions(folder: Path, rows: int, output: str) -> None:
    with PredictionWriter(folder / output, _RUN, batch_size=4) as writer:
        for row in _ROWS[:rows]:
            writer.write(row)


@cache
def _answers(output: str) -> bytes:
    def whole(folder: Path) -> None:
        with PredictionWriter(folder / output, _RUN, batch_size=4) as writer:
            for row in _ROWS:
                writer.write(row)
            writer.finish(2)

    return written(whole)[output]


def _read_predictions(folder: Path) -> Any:
    """Go on with a stopped prediction; what was done is kept, the file is that of an uninterrupted run."""
    output = next(name for name in ("a.csv", "a.jsonl") if (folder / f"{name}.partial").exists())
    with PredictionWriter(folder / output, _RUN, resume=True, batch_size=4) as writer:
        done = writer.rows
        for row in _ROWS[done:]:
            writer.write(row)
        writer.finish(2)
    found = (folder / output).read_bytes()
    return found if found != _answers(output) else "whole" if done == 8 else MADE_AGAIN


def predictions() -> Target:
    """The rows of an unfinished prediction."""
    seeds = [written(lambda folder, name=name: _begin_predictions(folder, 9, name)) for name in ("a.csv", "a.jsonl")]
    return Target("predictions", seeds, _read_predictions, changes_folder=True)


_CELL = {
    "dataset": "pets", "shots": 16, "seed": 1, "recipe": "paper", "zero_shot_accuracy": 0.5, "accuracy": 0.75,
    "num_images": 8, "train_images": 16, "seen_in_training": 0, "pictures": {"drawn": "0" * 64, "pets": "1" * 64},
    "settings": {"views": 10, "arguments": {}}, "notes": [], "targets": {}, "base": {"sketch": [0.5, -0.25]},
    "engine": "torch-fp32",
}  # fmt: skip


def _read_cell(folder: Path) -> Any:
    found = read_cell(folder / "cell.json")
    return MADE_AGAIN if found is None else found


def cells() -> Target:
    """Finished runs of the benchmark and of the comparison of methods."""
    return Target(
        "cells", [written(lambda folder: write_sealed(folder / "cell.json", _CELL))], _read_cell, resign=_reseal
    )


# ---------------------------------------------------------------------- foreign checkpoints


def _published(folder: Path) -> None:
    parameter = torch.nn.Parameter(_TABLE.clone())
    optimizer = torch.optim.Adam([parameter], lr=2e-3, weight_decay=5e-4)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200.0)
    state = {"text_feature_residuals": parameter.detach(), "base_text_features": _TABLE}
    content = {"state_dict": state, "epoch": 200, "optimizer": optimizer.state_dict(), "scheduler": scheduler}
    torch.save({**content, "val_result": None}, folder / "model.pth")


def _half(folder: Path) -> None:
    torch.save({"state_dict": {"text_feature_residuals": _TABLE.half().t()[:, :4]}, "epoch": 1}, folder / "model.pth")


def _read_published(folder: Path) -> Any:
    residual, table = read_published(folder / "model.pth")
    return [None if part is None else (list(part.shape), part.numpy().tobytes()) for part in (residual, table)]


def foreign() -> Target:
    """Checkpoints of the published code, which are pickles in a zip."""
    return Target("foreign", [written(_published), written(_half)], _read_published)


OWN: dict[str, Callable[[], Target]] = {
    "artifact": artifact, "old-artifact": old_artifact,
    "embeddings": embeddings, "base-classifier": base_classifier, "tower": tower,
    "checkpoint": checkpoint, "predictions": predictions, "cells": cells, "foreign": foreign,
}  # fmt: skip
