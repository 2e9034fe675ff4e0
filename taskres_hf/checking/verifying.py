"""Deriving again what an artifact claims: its checksums, base classifier, few-shot draw and measured accuracy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..artifact import commit_of, find_artifact, read_checked
from ..base_classifier import image_sides_differ, make_base_classifier, text_gap, text_tolerance
from ..data import LabelledImages, load_evaluation_data, load_training_data
from ..errors import ArtifactError, TaskResError
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..training import TaskResTrainer, TaskResTrainingArguments, recorded_arguments
from ..training.measuring import remember

Row = dict[str, Any]
MATCHES, DIFFERS, UNKNOWN = "matches", "differs", "not checked"


def verify(
    name_or_path: str | os.PathLike[str],
    dataset: Any = None,
    *,
    revision: str | None = None,
    base_model: Any = None,
    train_split: str | None = None,
    split: str | None = None,
    holdout: float | None = None,
    **data_options: Any,
) -> list[Row]:
    """Derive again what an artifact claims, from the artifact, its base model and its dataset.

    Args:
        name_or_path: folder or Hub id of the artifact. revision: branch, tag or commit of it.
        dataset: what it was trained and measured on, as for `load_training_data`; without it neither the draw nor the
            accuracy is checked.
        base_model: another place to load the base from, or one already loaded.
        train_split: the split it was drawn from. split: the one it was measured on; both by default as recorded.
        holdout: the share of the training pictures that was held out, where it was measured on those.
        **data_options: `config_name`, `image_column` and so on, of `load_training_data`.

    Returns:
        A row for each claim: `what`, `result` (`"matches"`, `"differs"` or `"not checked"`), `recorded`, `found`, and
        a `note` that says why where that is not plain.

    Raises:
        OSError: no such repository. DataError: the dataset cannot be read.
    """
    try:
        paths = find_artifact(name_or_path, revision)
        config, tensors, processor = read_checked(*paths)
    except ArtifactError as error:
        return [_row("checksums", False, note=str(error))]
    parts = f"{len(tensors)} tensors, config" + (", image processor" if processor is not None else "")
    rows = [_row("checksums", True, note=parts)]
    try:
        model = TaskResCLIPForImageClassification.from_pretrained(
            name_or_path,
            revision=commit_of(paths[0]) or revision,
            base_model=base_model,
            text_tower=True,
            accept_base_mismatch=True,
        )
        rows += _base_rows(model)
    except (TaskResError, OSError) as error:
        return [*rows, _row("base model", False, note=str(error))]
    if dataset is None:
        note = "give the dataset (--dataset) to check it"
        return [
            *rows,
            *(_row(what, None, note=note) for what in ("few-shot draw", "accuracy") if _claims(config, what)),
        ]
    provenance, options = config.get("data") or {}, {**data_options}
    if config.get("text_encoding") is not None:
        options["texts"] = True
    if model.classifier.several_labels:
        written = provenance.get("labels") or {}
        options |= {"multi_label": True, "label_separator": written.get("separator")}
        options["label_columns"] = written.get("columns")
    read = load_training_data(
        dataset, train_split=train_split or _named_split(provenance), eval_split=None if holdout else "none",
        holdout=holdout, seed=_seed(config), **options,
    )  # fmt: skip
    rows += _draw_rows(config, read.train)
    metrics = config.get("metrics") or {}
    if not metrics:
        return [*rows, _row("accuracy", None, note="none is recorded")]
    if metrics.get("method") == "cross-validation":
        return rows + _metric_rows(metrics, _cross_validated(model, config, read.train))
    held_out = read.held_out
    if held_out is None:
        held_out = load_evaluation_data(
            dataset, split or metrics.get("split"), default_names=model.class_names, **options
        )
    model.strength = metrics.get("strength", 1.0)
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    return rows + _metric_rows(metrics, trainer.evaluate(held_out))


def _row(what: str, same: bool | None, recorded: Any = None, found: Any = None, note: str = "") -> Row:
    result = UNKNOWN if same is None else MATCHES if same else DIFFERS
    return {"what": what, "result": result, "recorded": recorded, "found": found, "note": note}


def _claims(config: Mapping[str, Any], what: str) -> bool:
    return bool(config.get("metrics") if what == "accuracy" else (config.get("few_shot") or {}).get("shots"))


def _seed(config: Mapping[str, Any]) -> int:
    """The seed of the draw, which may be 0; 1 where none is recorded."""
    seed = (config.get("few_shot") or {}).get("seed")
    return 1 if seed is None else int(seed)


def _named_split(provenance: Mapping[str, Any]) -> str | None:
    split = provenance.get("split")
    return str(split) if split else None


# ---------------------------------------------------------------------- the base


def _base_rows(model: TaskResCLIPForImageClassification) -> list[Row]:
    """`t` made anew, beside the fingerprint of the one that the residual was trained on."""
    config, stored = model.config, model.config.base_fingerprint or {}
    source = model._base_source
    again: Any = model
    if config.base_classifier is not None:
        table, now = again.base_again()
    else:
        table, now = make_base_classifier(model.clip, source, config.class_prompts(), config.prompt_average)
    rows = [
        _row(f"base: {what}", now.get(key) == stored.get(key), stored.get(key), now.get(key))
        for what, key in (("prompts", "prompts_sha256"), ("tokens", "tokens_sha256"), ("shape of t", "shape"))
        if stored.get(key) is not None
    ]
    gap, allowed = text_gap(now, stored), text_tolerance(now, stored)
    rows.append(_row("base: t", gap <= allowed, note=f"relative difference {gap:.2g}, allowed {allowed:g}"))
    served = float((model.classifier.base.cpu() - table).abs().max())
    if served:
        rows.append(_row("base: t as served", served <= allowed * float(table.abs().max()), note=f"by {served:.2g}"))
    if stored.get("image"):
        rows.append(
            _row(
                "base: model" if config.text_encoding else "base: image tower",
                not image_sides_differ(now.get("image"), stored["image"]),
            )
        )
    else:
        rows.append(_row("base: image tower", None, note="the artifact holds nothing about it"))
    if stored.get("score"):
        close = all(abs(a - b) <= 0.05 * abs(b) + 1e-6 for a, b in zip(now["score"], stored["score"], strict=False))
        rows.append(_row("base: logit scale", close, stored["score"], now["score"]))
    return rows


# ---------------------------------------------------------------------- the pictures


def _draw_rows(config: Mapping[str, Any], train: LabelledImages) -> list[Row]:
    """The draw, and the content of the pictures drawn."""
    few_shot, provenance = config.get("few_shot") or {}, config.get("data") or {}
    shots, recorded = few_shot.get("shots"), few_shot.get("indices")
    drawn = list(range(len(train)))
    rows = []
    if shots:
        found = few_shot_indices(train.labels, shots, _seed(config), on_short="ignore")
        drawn = drawn if len(found) == len(drawn) else found
        at = [train.indices[place] for place in drawn]
        same: bool | None = recorded == at
        note = f"{len(at)} {train.noun}s, {shots} shots, seed {few_shot.get('seed')}"
        if not same and (few_shot.get("unreadable") or few_shot.get("replaced")):
            same, note = None, "pictures that could not be read were left out or replaced"
        rows.append(_row("few-shot draw", same, recorded, at, note))
    elif recorded:
        place = {row: position for position, row in enumerate(train.indices)}
        known = all(row in place for row in recorded)
        rows.append(_row("few-shot draw", None if known else False, note="the rows were given, not drawn"))
        drawn = [place[row] for row in recorded if row in place]
    stored, what = provenance.get("train_pictures"), f"training {train.noun}s"
    if stored is not None and _came_together(config):
        return [*rows, _row(what, None, note="they are of several trainings")]
    if stored is None:
        return [*rows, _row(what, None, note="none are recorded")]
    now = remember([train.digest(place) for place in drawn])
    return [*rows, _row(what, now == stored, stored.get("count"), now["count"], "by their content")]


def _came_together(config: Mapping[str, Any]) -> bool:
    """Whether more pictures went into a classifier than those of one draw."""
    training = config.get("training") or {}
    changes = training.get("changes") or []
    return bool(
        training.get("continued_from") or training.get("merged") or any(row.get("num_images") for row in changes)
    )


def _cross_validated(
    model: TaskResCLIPForImageClassification, config: Mapping[str, Any], train: LabelledImages
) -> dict[str, Any]:
    """What cross-validation by the recorded recipe gives."""
    arguments = recorded_arguments(config, on_short="ignore", disable_tqdm=True)
    return TaskResTrainer(model, arguments, train).cross_validate(int((config.get("metrics") or {}).get("folds") or 5))


def _metric_rows(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for key in ("num_images", "data_digest"):
        if recorded.get(key) is not None and key in found:
            what = f"{recorded.get('noun', 'picture')}s measured on" if key == "data_digest" else "their number"
            rows.append(_row(what, recorded[key] == found[key], recorded[key], found[key]))
    for key in ("map", "zero_shot_map", "micro_f1", "macro_f1") if "map" in recorded else ():
        same = key in found and abs(float(recorded[key]) - float(found[key])) < 1e-6
        rows.append(_row(key.replace("_", " "), same, recorded[key], found.get(key)))
    for key in ("accuracy", "zero_shot_accuracy"):
        if key in recorded:
            right = [round(float(side[key]) * int(side["num_images"])) for side in (recorded, found)]
            same = right[0] == right[1] and abs(float(recorded[key]) - float(found[key])) < 1e-6
            note = "" if same else "another processor or engine rounds otherwise, which can turn a close call"
            rows.append(_row(key.replace("_", " "), same, recorded[key], found[key], note))
    return rows
