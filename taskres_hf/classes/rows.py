"""A classifier as rows that compete with those of another; its config and head for other rows, in other order.

A row of an untrained class stands beside trained ones, whose logits training has changed: in scale (recipe `auto` has a
temperature), and in what all of them together claim of any picture (training raises the largest). So a class that is
added from text answers `g * zero_shot + gain`: `g` is the share of text in the trained rows, `gain` the rise of the
log of their summed claims, which recipe `auto` measures on shots that it holds out. Residuals trained by epochs keep
both as they were, `g = 1` and `gain = 0`: there the row is `t_k`, its residual zero. `docs/classes.md` measures it.
"""

from __future__ import annotations

import copy
import difflib
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_classifier import checked_tokens, fingerprint
from ..errors import ClassNamesError, ConfigurationError
from ..residual import AS_PUBLISHED, TaskResClassifier
from ..serving import forget_answer

# Without a recorded gain: of the usual spread of a picture's logits under rows whose directions have nothing in common.
_UNKNOWN_GAIN = 2.0


class Rows(NamedTuple):
    """A classifier at full strength: logits = logit_scale * norm(image) @ weight.T + bias, in fp64 on the CPU.

    Attributes:
        weight: [K, D]; the rows of zero-shot have length 1. bias: [K].
        text: `g`, how much of zero-shot the logits hold. gain: of the log of their summed claims, over `g` zero-shot.
    """

    weight: Tensor
    bias: Tensor
    text: float
    gain: float


@torch.no_grad()
def rows_of(head: TaskResClassifier) -> Rows:
    """A text-side classifier at full strength, with its calibration; of the image side, zero-shot's rows."""
    base = head.base.cpu().double()
    unit = F.normalize(base, dim=1)
    if head.side == "image":
        return Rows(unit, base.new_zeros(len(base)), 1.0, 0.0)
    frozen = base if head.shift is None else base + head.shift.cpu().double()
    weight = frozen + head.alpha * head.residual.cpu().double()
    if head.normalize_weight:
        weight = F.normalize(weight, dim=1)
    else:
        weight = weight / frozen.norm(dim=1, keepdim=True).clamp_min(1e-12)
    weight = head.logit_scale_factor * weight
    bias = base.new_zeros(len(base)) if head.class_bias is None else head.class_bias.cpu().double()
    return Rows(weight, bias, *_text_and_gain(head, weight, unit))


def _text_and_gain(head: TaskResClassifier, weight: Tensor, unit: Tensor) -> tuple[float, float]:
    published = is_published(head)
    recorded = head.facts.get("training") or {}
    text = 1.0 if published else number_within(recorded.get("temperature"), 1e-3, 1e3)
    if text is None:  # by least squares, whatever the rows have in common
        own, ours = unit - unit.mean(0), weight - weight.mean(0)
        text = float((own * ours).sum() / own.pow(2).sum().clamp_min(1e-12))
    gain = 0.0 if published else number_within(recorded.get("gain"), -1e3, 1e3)
    if gain is None:
        learned = weight - text * unit
        spread = float((learned - learned.mean(0)).norm(dim=1).mean()) / math.sqrt(unit.shape[1])
        gain = _UNKNOWN_GAIN * head.logit_scale * spread
    return text, gain


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Several classifiers of different classes as one that competes fairly; the first's rows and bias stay.

    Raises:
        ConfigurationError: one has nothing of the text's, so that its scale says nothing.
    """
    if any(part.text <= 0 for part in parts):
        raise ConfigurationError(
            "The rows of a classifier hold nothing of their classes' text embeddings, so that nothing says how its "
            "logits compare with those of other classes: train on pictures of all classes."
        )
    first = parts[0]
    weights, biases = [], []
    for part in parts:
        scale = first.text / part.text
        weights.append(scale * part.weight)
        biases.append(scale * (part.bias - part.bias.mean() - part.gain) + first.gain + first.bias.mean())
    weights[0], biases[0] = first.weight, first.bias
    return Rows(torch.cat(weights), torch.cat(biases), first.text, first.gain)


def is_published(head: TaskResClassifier) -> bool:
    """Whether nothing but residual, shift and strength is used: logits are of zero-shot's scale."""
    return head.class_bias is None and not {"logit_scale_factor", "normalize_weight"} & set(head.facts)


def check_straight(heads: Sequence[TaskResClassifier]) -> None:
    """Refuse to write rows anew that answer otherwise afterwards: between zero-shot and trained they would go straight.

    Raises:
        ConfigurationError: a strength between 0 and 1, and rows that count by direction alone or have a factor.
    """
    for head in heads:
        straight = not head.normalize_weight and head.logit_scale_factor == 1.0
        if head.strength < 1.0 and not straight and not head.is_zero_shot:
            raise ConfigurationError(
                f"At strength {head.strength:g} these rows cannot be kept: between zero-shot and trained they go "
                "another way than rows with lengths of their own. Set strength = 1.0 before (on all classifiers), and "
                "the one you want afterwards."
            )


@torch.no_grad()
def write_published(head: TaskResClassifier, learned: Tensor) -> None:
    """`alpha x` [K, D] into a head of its own alpha.

    Raises:
        ConfigurationError: its alpha is 0, and there is something to hold.
    """
    if head.alpha == 0.0 and bool(learned.any()):
        raise ConfigurationError("The first classifier has alpha 0 and cannot hold a residual: set its alpha.")
    head.residual.copy_(learned / (head.alpha or 1.0))


def number_within(value: Any, low: float, high: float) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    return float(value) if good else None


def with_rows(model: Any, places: list[int]) -> tuple[Any, TaskResClassifier]:
    """Config and head with some classes, in that order."""
    config, head = model.config, model.classifier
    names, prompts = config.class_names, config.class_prompts()
    changed = with_prompts(config, [names[place] for place in places], [prompts[place] for place in places])
    part = empty_like(head, head.base.cpu()[places])
    with torch.no_grad():
        part.residual.copy_(head.residual.cpu()[places] if head.side == "text" else head.residual)
    part.shift = None if head.shift is None else head.shift.cpu()[places]
    part.class_bias = None if head.class_bias is None else head.class_bias.cpu()[places]
    part.base_bias = None if head.base_bias is None else head.base_bias.cpu()[places]
    changed.base_fingerprint = fingerprint_of(model, changed, part.base)
    part.facts = changed.facts
    return changed, part


def with_prompts(config: Any, names: list[str], prompts: list[list[str]], sources: Sequence[Any] = ()) -> Any:
    """A config of these classes and exactly these prompts: by the templates that all share, else sentence by sentence.

    Args:
        sources: configs that the classes come from besides.
    """
    changed = copy.deepcopy(config)
    set_names(changed, names)
    words = {}
    if config.templates and all(source.templates == config.templates for source in sources):
        words = _words(names, prompts, config.templates[0])
    count = len(config.templates)
    described = config.class_descriptions is not None
    changed.prompt_names = {name: word for name, word in words.items() if _spaced(name, config) != word} or None
    changed.class_descriptions = (
        {name: group[count:] for name, group in zip(names, prompts, strict=True)} if described else None
    )
    try:
        same = bool(words) and changed.class_prompts() == prompts
    except ConfigurationError:
        same = False
    if not same:
        changed.templates, changed.prompt_names = [], None
        changed.class_descriptions = dict(zip(names, prompts, strict=True))
    return changed


def _words(names: list[str], prompts: list[list[str]], template: str) -> dict[str, str]:
    """What stands in each class's first prompt in place of `{}`; empty where one is not of the template."""
    start, end = template.split("{}")
    words = {}
    for name, group in zip(names, prompts, strict=True):
        first = group[0]
        if not first.startswith(start) or not first.endswith(end) or len(first) <= len(start) + len(end):
            return {}
        words[name] = first[len(start) : len(first) - len(end)]
    return words


def _spaced(name: str, config: Any) -> str:
    return name.replace("_", " ") if config.underscores == "replace" else name


def set_names(config: Any, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def fingerprint_of(model: Any, config: Any, table: Tensor) -> dict[str, Any]:
    """The fingerprint of rows that are there already, of a base that did not change."""
    stored = model.config.base_fingerprint or {}
    tokens = None
    if stored.get("tokens_sha256"):
        try:
            tokens = checked_tokens(model.clip, model.tokenizer, config.class_prompts())
        except (OSError, ValueError, AttributeError):  # the base is not at hand; its text side tells it all the same
            tokens = None
    score = stored.get("score")
    return fingerprint(
        table.cpu(), config.class_prompts(), config.prompt_average, stored.get("image"),
        None if score is None else (score[0], score[1]), str(stored.get("dtype", "float32")), tokens,
    )  # fmt: skip


def empty_like(head: TaskResClassifier, base: Tensor) -> TaskResClassifier:
    """A zero-shot head of other rows with the settings of one."""
    made = head.like(base)
    made.facts.update({key: head.facts[key] for key in AS_PUBLISHED if key in head.facts})
    made.residual.requires_grad_(head.residual.requires_grad)
    return made


def exchange(model: Any, config: Any, head: TaskResClassifier) -> Any:
    """Config and head of a model in one step, as `use_classifier` does."""
    head.facts, head.config = config.facts, config
    head.to(model.classifier.residual.device).train(model.training)
    forget_answer()
    model._config, model.classifier = config, head
    return model


def places_of(names: Sequence[str], wanted: Any) -> list[int]:
    """Positions of classes by name.

    Raises:
        ClassNamesError: not a list of names, none, an unknown one, or one twice.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise ClassNamesError(f"Classes must be given as a list of names; got {wanted!r:.80}.")
    if not wanted:
        raise ClassNamesError("No class is named: give the names of classes in a list.")
    cleaned = [unicodedata.normalize("NFC", name).strip() for name in wanted]
    place = {name: number for number, name in enumerate(names)}
    unknown = [name for name in cleaned if name not in place]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f": the classifier knows {listed(names)}."
        raise ClassNamesError(f"There is no class {unknown[0]!r}{hint}")
    twice = [name for name, count in Counter(cleaned).items() if count > 1]
    if twice:
        raise ClassNamesError(f"The class {twice[0]!r} is named twice: name each once.")
    return [place[name] for name in cleaned]


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
