"""One classifier from several over one base: averages of the same classes, unions of different ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..base_classifier import check_same_bases, text_tolerance
from ..errors import BaseMismatchError, ClassNamesError, ConfigurationError
from ..prompts import check_class_names
from ..residual import TaskResClassifier
from .rows import (
    Rows,
    check_straight,
    empty_like,
    exchange,
    fingerprint_of,
    is_published,
    join_rows,
    listed,
    number_within,
    places_of,
    rows_of,
    with_prompts,
    with_rows,
    write_published,
)


def merge_residuals(models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """One classifier from several of the same base and classes: their weighted average (a soup over one base).

    Residuals trained by epochs are averaged as such, `sum_i w_i alpha_i x_i`. Where one has a class bias, a scale or
    rows of lengths of its own, as of recipe `auto`, the logits of all are averaged. Classes may be in another order:
    the first model's counts.

    Args:
        models: at least two. weights: one each, 0 or more, of any sum; equal by default.

    Returns:
        A new model over the base of the first. Nothing is changed in those given.

    Raises:
        ClassNamesError: other classes, with those that only one has: see `unite`.
        ConfigurationError: other bases by name or image tower, prompts, sides or strengths; says which. A strength
            between 0 and 1 where logits are averaged whose rows it moves in another way.
        BaseMismatchError: other text embeddings of the same prompts.
    """
    models = _several(models)
    shares = _shares(weights, len(models))
    heads = [models[0].classifier]
    for other in models[1:]:
        check_mergeable(models[0], other)
        heads.append(with_rows(other, places_of(other.config.class_names, models[0].config.class_names))[1])
    first, config = heads[0], copy.deepcopy(models[0].config)
    rows = [rows_of(head) for head in heads]
    head = empty_like(first, first.base)
    if all(is_published(other) for other in heads):
        parts = [w * other.alpha * other.residual.detach().cpu() for w, other in zip(shares, heads, strict=True)]
        write_published(head, torch.stack(parts).sum(0))
        if any(other.shift is not None for other in heads):
            shifts = [w * other.shift.cpu() for w, other in zip(shares, heads, strict=True) if other.shift is not None]
            head.shift = torch.stack(shifts).sum(0)
    else:
        check_straight(heads)
        weight, bias = (sum(w * r[part] for w, r in zip(shares, rows, strict=True)) for part in (0, 1))
        head.set_weight(weight, class_bias=bias, normalize_weight=False)
    told = {"method": "average of residuals", "weights": shares, **_calibration(rows, shares)}
    return _new_model(models, config, head, told)


def interpolate(a: Any, b: Any, t: float) -> Any:
    """A classifier between two of the same base and classes: `a` at t = 0, `b` at t = 1; see `merge_residuals`.

    Raises:
        ConfigurationError: `t` is not a number from 0 to 1; or as `merge_residuals`.
    """
    if number_within(t, 0.0, 1.0) is None:
        raise ConfigurationError(f"`t` must be a number from 0 (the first classifier) to 1 (the second); got {t!r}.")
    return merge_residuals([a, b], [1.0 - float(t), float(t)])


def unite(models: Sequence[Any]) -> Any:
    """One classifier for the classes of several over one base; no class may be in two of them.

    Each keeps its rows. Text counts as much in all as in the first, whose logits stay the same, and what training
    raised is taken off, so that none of them swamps another. Better is to train on all pictures.

    Returns:
        A new model over the base of the first.

    Raises:
        ClassNamesError: a class is in two. ConfigurationError: other bases, sides, averages of prompts or strengths; a
            strength between 0 and 1 where only some have a bias or lengths of their own.
    """
    models = _several(models)
    first = models[0]
    names: list[str] = []
    known: set[str] = set()
    for other in models:
        both = [name for name in other.config.class_names if name in known]
        if both:
            raise ClassNamesError(f"Several classifiers have {listed(both)}: remove or rename there first.")
        _check_joint(first, other)
        names += other.config.class_names
        known.update(other.config.class_names)
    config = with_prompts(
        first.config, check_class_names(names), [group for other in models for group in other.class_prompts()],
        [other.config for other in models],
    )  # fmt: skip
    table = torch.cat([other.classifier.base.cpu() for other in models])
    config.base_fingerprint = fingerprint_of(first, config, table)
    head = empty_like(first.classifier, table)
    heads = [other.classifier for other in models]
    rows = [rows_of(one) for one in heads]
    if first.classifier.side == "image":
        if any(bool(one.residual.any()) for one in heads):
            raise ConfigurationError("Residuals on the image side are one for all classes: they cannot be united.")
    elif all(is_published(one) for one in heads):
        write_published(head, torch.cat([one.alpha * one.residual.detach().cpu() for one in heads]))
        if any(one.shift is not None for one in heads):
            shifts = [torch.zeros_like(one.base) if one.shift is None else one.shift for one in heads]
            head.shift = torch.cat([shift.cpu() for shift in shifts])
    else:
        check_straight(heads)
        joined = join_rows(rows)
        head.set_weight(joined.weight, class_bias=joined.bias, normalize_weight=False)
    return _new_model(models, config, head, {"method": "union of classifiers", **_calibration(rows[:1], [1.0])})


def check_mergeable(ours: Any, theirs: Any) -> None:
    """Refuse to average two classifiers unless base, classes and prompts are the same.

    Raises:
        ClassNamesError, ConfigurationError, BaseMismatchError: says which differs.
    """
    _check_joint(ours, theirs)
    names, others = ours.config.class_names, theirs.config.class_names
    only = [[name for name in one if name not in two] for one, two in ((names, set(others)), (others, set(names)))]
    if any(only):
        told = " and ".join(
            f"{listed(part)} only the {which}" for part, which in zip(only, ("first", "second"), strict=True) if part
        )
        raise ClassNamesError(
            f"The classifiers have different classes: {told} has. Averages need the same ones; unite (--union) brings "
            "different ones together."
        )
    places = places_of(others, names)
    prompts, groups = ours.class_prompts(), theirs.class_prompts()
    different = [name for name, group, place in zip(names, prompts, places, strict=True) if group != groups[place]]
    if different:
        raise ConfigurationError(
            f"The classifiers have different prompts for {listed(different)}, so their rows mean other things: "
            f"{prompts[names.index(different[0])][0]!r:.80} here. Train them on the same templates."
        )
    gap = float(
        (ours.classifier.base.cpu() - theirs.classifier.base.cpu()[places]).norm() / ours.classifier.base.cpu().norm()
    )
    allowed = text_tolerance(*(model.config.base_fingerprint or {} for model in (ours, theirs)))
    if gap > allowed:
        raise BaseMismatchError(
            f"The bases give other text embeddings of the same prompts (relative difference {gap:.2g}, allowed "
            f"{allowed:g}): the classifiers were made for different revisions of the base."
        )


def _check_joint(ours: Any, theirs: Any) -> None:
    """What averages and unions need alike."""
    check_same_bases(ours.config, theirs.config)
    for name in ("residual_side", "prompt_average", "strength"):
        values = [getattr(model.config, name) for model in (ours, theirs)]
        if values[0] != values[1]:
            raise ConfigurationError(f"The classifiers differ in {name}: {values[0]!r} here and {values[1]!r} there.")
    scales = [model.classifier.logit_scale for model in (ours, theirs)]
    if abs(scales[0] - scales[1]) > 0.05 * scales[0]:
        raise BaseMismatchError(f"The bases have different logit scales: {scales[0]:g} here and {scales[1]:g} there.")


def _new_model(models: Sequence[Any], config: Any, head: TaskResClassifier, told: dict[str, Any]) -> Any:
    """A model over the first one's base, with all that is known of where the others came from."""
    from ..training.measuring import remember_together

    first = models[0]
    settings = {key: head.facts[key] for key in ("logit_scale_factor", "normalize_weight") if key in head.facts}
    config.facts = {"alpha": head.alpha, **settings}
    config.strength = first.strength
    of = [dict(model.config.training or {}) for model in models]
    recipes = [str(one.get("recipe") or one.get("method") or "unknown") for one in of]
    config.training = {**told, "merged": recipes, "num_classifiers": len(models)}
    counts = [int((model.config.few_shot or {}).get("num_images") or 0) for model in models]
    config.few_shot = {"num_images": sum(counts)} if any(counts) else None
    config.data = remember_together([model.config.data for model in models])
    if head.shift is not None:
        config.enhanced_base = {"merged": len(models)}
    made = type(first)(config, first.clip, head.base)
    for name in ("_image_processor", "_tokenizer", "_base_source", "_processor_source", "_processor_values"):
        setattr(made, name, getattr(first, name))
    made.classifier.to(first.classifier.residual.device)
    made.train(False)
    exchange(made, config, head)
    return made


def _calibration(rows: Sequence[Rows], shares: Sequence[float]) -> dict[str, float]:
    return {
        name: sum(share * getattr(part, key) for share, part in zip(shares, rows, strict=True))
        for name, key in (("temperature", "text"), ("gain", "gain"))
    }


def _several(models: Any) -> list[Any]:
    found: list[Any] = list(models) if isinstance(models, Sequence) else []
    if len(found) < 2 or not all(isinstance(getattr(model, "classifier", None), TaskResClassifier) for model in found):
        raise ConfigurationError("Give at least two loaded classifiers in a list.")
    for model in found:
        model.classifier.check_has_text("An average or a union")
        model.classifier.check_one_label("An average or a union")  # biases and thresholds hold for one classifier
    return found


def _shares(weights: Any, count: int) -> list[float]:
    """Weights of sum 1."""
    values = [1.0] * count if weights is None else list(weights) if isinstance(weights, Iterable) else [weights]
    good = all(number_within(value, 0.0, 1e9) is not None for value in values)
    if len(values) != count or not good or not sum(values):
        raise ConfigurationError(f"`weights` must be {count} numbers, 0 or more and not all 0; got {values!r:.80}.")
    return [float(value) / sum(values) for value in values]
