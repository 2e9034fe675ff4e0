"""What an artifact is and how it came about, from its two files alone: the base is not loaded, nor is torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifact import CLASS_BIAS, RESIDUAL, SHIFT, commit_of, find_artifact, read_checked

_SEVERAL_LABELS = (
    "map", "zero_shot_map", "micro_f1", "zero_shot_micro_f1", "macro_f1", "zero_shot_macro_f1", "unmeasured_classes",
)  # fmt: skip


def describe(name_or_path: str | os.PathLike[str], revision: str | None = None, **hub_kwargs: Any) -> dict[str, Any]:
    """What an artifact is, from its two files alone: the base is not loaded.

    Args:
        name_or_path: folder or Hub id. revision: branch, tag or commit of it.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only` and so on.

    Raises:
        ArtifactError: it is incomplete or damaged, or there is no such folder. HubError: no such repository.
    """
    name = os.fspath(name_or_path)
    paths = find_artifact(name_or_path, revision, **hub_kwargs)
    config, tensors, _ = read_checked(*paths)
    values, (rows, dim) = tensors[RESIDUAL].values(), tensors[RESIDUAL].shape
    assert values is not None
    names = {int(index): label for index, label in config["id2label"].items()}
    metrics, few_shot = config.get("metrics") or {}, config.get("few_shot") or {}
    training = config.get("training") or {}
    account = (config.get("data") or {}).get("account") or {}
    files = [file for file in Path(name).iterdir() if file.is_file()] if os.path.isdir(name) else map(Path, paths)
    return {
        "artifact": name,
        "commit": commit_of(paths[1]),
        "base_model": config["base_model_name_or_path"],
        "base_model_revision": config.get("base_model_revision"),
        "base_model_type": config.get("base_model_type"),
        "num_classes": len(names),
        "class_names": [names[index] for index in sorted(names)],
        "templates": config.get("templates"),
        "class_descriptions": len(config["class_descriptions"]) if config.get("class_descriptions") else None,
        "alpha": config["alpha"],
        "strength": config.get("strength", 1.0),
        "normalize_weight": config.get("normalize_weight", True),
        "logit_scale_factor": config.get("logit_scale_factor", 1.0),
        "class_bias": CLASS_BIAS in tensors,
        "residual": {
            "shape": [rows, dim],
            "side": config.get("residual_side", "text"),
            "mean_length": sum(math.hypot(*values[row * dim : (row + 1) * dim]) for row in range(rows)) / rows,
        },
        "enhanced_base": SHIFT in tensors and not config.get("base_classifier"),
        "base_classifier": config.get("base_classifier"),
        "text_encoding": config.get("text_encoding"),
        "shots": few_shot.get("shots"),
        "seed": few_shot.get("seed"),
        "train_images": few_shot.get("num_images"),
        "method": training.get("method"),
        "changes": told_changes(training) or None,
        "recipe": training.get("recipe"),
        "engine": training.get("engine"),
        "dataset": (config.get("data") or {}).get("name"),
        "read_as": account.get("kind"),
        "left_out": {row["reason"]: row["count"] for row in account.get("left_out") or []} or None,
        "data_digest": (config.get("data") or {}).get("train_digest"),
        "problem_type": config.get("problem_type"),
        "label_threshold": training.get("threshold"),
        **{key: metrics[key] for key in _SEVERAL_LABELS if "map" in metrics and metrics.get(key)},
        "accuracy": metrics.get("accuracy"),
        "zero_shot_accuracy": metrics.get("zero_shot_accuracy"),
        "accuracy_interval": metrics.get("accuracy_interval"),
        "measured_on": measured_on(metrics, config.get("strength", 1.0)) if metrics else None,
        "rejection": rejection_in_short(config.get("rejection")),
        "bytes": {file.name: file.stat().st_size for file in sorted(files)},
        "format_version": config.get("format_version", 1),
        "library_versions": config.get("library_versions"),
    }


def rejection_in_short(stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of the threshold for pictures of no class, what a person wants to know; None where there is none."""
    return {key: stored[key] for key in ("rate", "pictures")} if stored else None


def told_changes(training: Mapping[str, Any]) -> list[str]:
    """In words, what a classifier was made from besides its training, and what was done to its classes afterwards."""
    told = []
    if training.get("merged"):
        told.append(f"{training.get('method') or 'merged'}, of {', '.join(training['merged'])}")
    if start := training.get("continued_from"):
        told.append(
            f"went on from a classifier trained by {start.get('recipe')} on {start.get('train_images')} pictures"
        )
    for row in training.get("changes") or []:
        names, change = list(row.get("classes") or []), row["change"]
        if change == "reordered":
            told.append("classes in another order")
        elif change == "renamed":
            pairs = [f"{old} to {new}" for old, new in zip(names, row.get("to") or [], strict=False)]
            told.append(f"renamed {_some(pairs)}" + (", prompts too" if row.get("reembedded") else ""))
        else:
            source = f" from {row.get('num_images', '')} {row['from']}".replace("  ", " ") if row.get("from") else ""
            told.append(f"{change} {_some(names)}{source}, after training")
    return told


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def measured_on(metrics: Mapping[str, Any], strength: float = 1.0) -> str:
    """How an accuracy came about, in words: what it was measured on, on how many pictures, and at which strength where
    that is another than the classifier's own.
    """
    noun = f"{metrics.get('noun', 'picture')}s"
    count = f"{metrics.get('num_images', '?')} {noun}"
    if metrics.get("strength", 1.0) != strength:
        count += f", at strength {metrics.get('strength', 1.0)}"
    if metrics.get("method") == "cross-validation":
        return f"the training {noun}, {metrics.get('folds', '?')}-fold cross-validation ({count})"
    split = metrics.get("split") or "an evaluation set"
    chosen = ", which also chose the epoch" if metrics.get("method") == "validation" else ""
    return f"{split}{chosen} ({count})"
