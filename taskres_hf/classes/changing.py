"""Other classes for a classifier without training it again: add, remove, rename, reorder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_classifier import make_base_classifier, text_tolerance
from ..errors import BaseMismatchError, ClassNamesError, ConfigurationError
from ..prompts import check_class_names, class_prompts
from ..residual import AS_PUBLISHED, TaskResClassifier
from . import merging
from .rows import (
    check_straight,
    empty_like,
    exchange,
    is_published,
    listed,
    number_within,
    places_of,
    rows_of,
    set_names,
    with_prompts,
    with_rows,
)


class ChangesClasses:
    """The methods of a model that change its classes, in place; each returns the model.

    Label ids follow (`id2label`); what was measured before is no longer claimed (`config.metrics`), and
    `config.training["changes"]` says what was done. The model is as before where an error is raised.
    """

    config: Any
    classifier: TaskResClassifier
    clip: Any
    _config: Any
    _tokenizer: Any
    _base_source: Any

    def add_classes(
        self,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        dataset: Any = None,
        *,
        class_descriptions: Mapping[str, Sequence[str] | str] | None = None,
        prompt_names: Mapping[str, str] | None = None,
        class_bias: float | None = None,
        args: Any = None,
    ) -> Any:
        """Add classes behind the others: from text at once, better with pictures.

        The rows and the answers among the old classes stay as they are, unless `dataset` has pictures of every class.

        Args:
            class_names: names of the new classes.
            templates, class_descriptions, prompt_names: of the new classes' prompts, as in `from_base`; by default the
                classifier's own templates.
            dataset: labelled pictures, as for `TaskResTrainer`. Of the new classes only: recipe `auto` is fitted to
                them among each other, and joined with the old rows as `unite` does. Of all classes: all is trained
                anew, without `args` by the recipe and settings that the classifier was trained by.
            class_bias: added to the logits of classes from text, in place of the calibrated gain; higher gives them
                more pictures.
            args: `TaskResTrainingArguments` for `dataset`: shots, seed, engine and so on; their recipe trains all.

        Raises:
            ClassNamesError: a name is there already, twice (after NFC), or empty.
            ConfigurationError: prompts that cannot be made, a classifier whose rows have nothing of the text's, or one
                of several labels per picture, whose biases per class pictures alone can give;
                or a strength between 0 and 1 at which the old rows could not be kept.
            BaseMismatchError: the base gives other text embeddings for the old classes than the classifier has.
            DataError: the pictures cannot be used.
        """
        self.classifier.check_has_text("Adding classes", or_texts=True)
        self.classifier.check_one_label("Adding classes")
        before = self.config, self.classifier
        new = check_class_names(class_names, minimum=1)
        config, head = _with_text_rows(
            self, new, templates, class_descriptions, prompt_names, class_bias, from_pictures=dataset is not None
        )
        if dataset is None:
            return exchange(self, config, head)
        from ..training.new_classes import learn_new_classes

        try:
            return learn_new_classes(exchange(self, config, head), before, dataset, args)
        except BaseException:
            exchange(self, *before)
            raise

    def remove_classes(self, class_names: Sequence[str]) -> Any:
        """Take classes away; the others keep their order, rows and logits.

        Raises:
            ClassNamesError: an unknown name, one given twice, or fewer than two classes left.
        """
        places = places_of(self.config.class_names, class_names)
        left = sorted(set(range(len(self.config.class_names))) - set(places))
        if len(left) < 2:
            raise ClassNamesError(
                f"A classifier needs at least 2 classes; without {listed(class_names)} it has {len(left)}. Keep more."
            )
        config, head = with_rows(self, left)
        names = self.config.class_names
        return exchange(self, _told(config, "removed", classes=[names[place] for place in places]), head)

    def reorder_classes(self, class_names: Sequence[str]) -> Any:
        """Another order of the same classes, and so other label ids.

        Args:
            class_names: all classes, each once, in the new order.

        Raises:
            ClassNamesError: one is missing, unknown or given twice.
        """
        places = places_of(self.config.class_names, class_names)
        names, named = self.config.class_names, set(places)
        missing = [name for place, name in enumerate(names) if place not in named]
        if missing:
            raise ClassNamesError(f"The new order lacks {listed(missing)}: name every class once.")
        config, head = with_rows(self, places)
        return exchange(self, _told(config, "reordered", classes=config.class_names), head)

    def rename_classes(self, names: Mapping[str, str], reembed: bool = False) -> Any:
        """Other names for classes; answers stay the same unless `reembed`.

        Args:
            names: old name to new name.
            reembed: make prompts and text embeddings of the new names: the text in each renamed row is exchanged,
                what was learned stays. False: prompts go on with the old words (`prompt_names`), so that nothing but
                the label changes.

        Raises:
            ClassNamesError: an old name is unknown, or names are no longer different.
            ConfigurationError: `reembed` where prompts are sentences without a place for the name, or of a classifier
                of several labels per picture, whose biases were fitted to the old text.
        """
        if reembed:
            self.classifier.check_has_text("Renaming with new text embeddings (reembed)", or_texts=True)
            self.classifier.check_one_label("Renaming with new text embeddings (reembed)")
        if not isinstance(names, Mapping) or not names:
            raise ClassNamesError(f"Names to change must be a mapping {{old: new}}; got {names!r:.80}.")
        old = self.config.class_names
        places = places_of(old, list(names))
        after = list(old)
        for place, name in zip(places, names.values(), strict=True):
            after[place] = name
        after = check_class_names(after)
        config = _renamed(self.config, after, places, reembed)
        head = _reembedded(self, config, places) if reembed else _same(self.classifier)
        pairs = {"classes": [old[place] for place in places], "to": [after[place] for place in places]}
        return exchange(self, _told(config, "renamed", reembedded=reembed, **pairs), head)

    def base_rows(self, config: Any) -> tuple[Tensor, dict[str, Any]]:
        """The base classifier `t` [K, D] of a config's classes by this model's base, and its fingerprint."""
        source = self._base_source
        return make_base_classifier(self.clip, source, config.class_prompts(), config.prompt_average, self._tokenizer)

    @classmethod
    def merge_residuals(cls, models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        """See `merging.merge_residuals`."""
        return merging.merge_residuals(models, weights)

    @classmethod
    def unite(cls, models: Sequence[Any]) -> Any:
        """See `merging.unite`."""
        return merging.unite(models)

    @classmethod
    def interpolate(cls, a: Any, b: Any, t: float) -> Any:
        """See `merging.interpolate`."""
        return merging.interpolate(a, b, t)


def _with_text_rows(
    model: Any, new: list[str], templates: Any, descriptions: Any, prompt_names: Any, bias: float | None,
    *, from_pictures: bool,
) -> tuple[Any, TaskResClassifier]:  # fmt: skip
    """Config and head with more classes, which answer by their text."""
    config, head = model.config, model.classifier
    names = check_class_names([*config.class_names, *new])
    if templates is None and descriptions is None:
        templates = config.templates or None
        if templates is None:
            raise ConfigurationError(
                "The classifier's prompts are sentences a class: give class_descriptions= or templates= for the new "
                "classes."
            )
    if bias is not None and (number_within(bias, -1e5, 1e5) is None or head.side == "image"):
        raise ConfigurationError(f"`class_bias` must be a number, for a residual on the text side; got {bias!r}.")
    groups = class_prompts(
        new, templates, underscores=config.underscores, descriptions=descriptions, prompt_names=prompt_names
    )
    changed = with_prompts(config, names, [*config.class_prompts(), *groups])
    old, count = head.base.cpu(), len(head.base)
    table = _text_rows(model, changed, list(range(count)))
    wider = empty_like(head, torch.cat([old, table[count:]]))
    wider.facts = changed.facts
    details: dict[str, Any] = {"classes": new, "from": "pictures" if from_pictures else "text"}
    if head.side == "text":
        details |= fill_from_text(wider, head, None if bias is None else float(bias))
    else:
        with torch.no_grad():
            wider.residual.copy_(head.residual)
    return _told(changed, "added", **details), wider


def _text_rows(model: Any, config: Any, kept: list[int]) -> Tensor:
    """`t` of a changed config, whose fingerprint is filled in.

    Args:
        kept: places of rows that are there already.

    Raises:
        BaseMismatchError: the base gives others for those.
    """
    table: Tensor
    table, config.base_fingerprint = model.base_rows(config)
    old = model.classifier.base.cpu()[kept]
    gap = float((table[kept] - old).norm() / old.norm().clamp_min(1e-12))
    if gap > text_tolerance(config.base_fingerprint, model.config.base_fingerprint or {}):
        raise BaseMismatchError(
            "The base gives other text embeddings for the old classes than the classifier was made with (relative "
            f"difference {gap:.2g}). Load it on the base it was made for."
        )
    return table


@torch.no_grad()
def fill_from_text(wider: TaskResClassifier, head: TaskResClassifier, bias: float | None) -> dict[str, float]:
    """The old rows to the last bit, and new ones from text; returns the scale and the bias that the new ones have."""
    count, rows = len(head.base), rows_of(head)
    wider.residual[:count] = head.residual.cpu()
    if head.shift is not None:
        wider.shift = torch.cat([head.shift.cpu(), torch.zeros_like(wider.base[count:])])
    scale, offset = 1.0, 0.0
    if not is_published(head):
        if rows.text <= 0:
            raise ConfigurationError(
                "The trained rows hold nothing of their classes' text embeddings (as of a linear probe), so that a row "
                "from text has no scale beside them: train on pictures of all classes."
            )
        scale, offset = rows.text, float(rows.bias.mean()) + rows.gain
    offset = offset if bias is None else bias
    biases = torch.cat([rows.bias, torch.full((len(wider.base) - count,), offset).double()])
    if is_published(head):
        wider.class_bias = biases.float() if offset else None
    elif head.normalize_weight:  # lengths that differ from now on
        check_straight([head])
        facts, strength = dict(wider.facts), wider.strength
        new = F.normalize(wider.base[count:].double(), dim=1)
        wider.set_weight(torch.cat([rows.weight, scale * new]), class_bias=biases, normalize_weight=False)
        wider.facts.update({key: value for key, value in facts.items() if key not in AS_PUBLISHED})
        wider.strength = strength
    else:
        if head.alpha:
            wider.residual[count:] = (scale / head.logit_scale_factor - 1.0) / head.alpha * wider.base[count:]
        wider.class_bias = biases.float()
    return {"text_scale": scale, "class_bias": offset}


def _renamed(config: Any, names: list[str], places: list[int], reembed: bool) -> Any:
    """A config of other names, whose prompts stay the same or are made of the new names."""
    prompts = config.class_prompts()
    if not reembed:
        return with_prompts(config, names, prompts)
    if not config.templates:
        raise ConfigurationError(
            "The prompts are sentences without a place for the name, so new names change nothing in them: rename "
            "without reembed, or make a model with from_base."
        )
    changed, old = copy.deepcopy(config), config.class_names
    moved = {old[place] for place in places}
    kept = dict(zip(old, names, strict=True))
    changed.prompt_names = {kept[k]: v for k, v in (config.prompt_names or {}).items() if k not in moved} or None
    if config.class_descriptions is not None:
        count = len(config.templates)
        changed.class_descriptions = {name: group[count:] for name, group in zip(names, prompts, strict=True)}
    set_names(changed, names)
    changed.class_prompts()
    return changed


def _same(head: TaskResClassifier) -> TaskResClassifier:
    """A copy, to go with another config."""
    config, head.config = head.config, None
    try:
        return copy.deepcopy(head)
    finally:
        head.config = config


def _reembedded(model: Any, config: Any, places: list[int]) -> TaskResClassifier:
    """The head with the text of some rows exchanged."""
    head = model.classifier
    kept = sorted(set(range(len(head.base))) - set(places))
    table = _text_rows(model, config, kept)
    base = head.base.cpu().clone()
    base[places] = table[places]
    changed = empty_like(head, base)
    rows = rows_of(head)
    with torch.no_grad():
        changed.residual.copy_(head.residual.cpu())
        if not head.normalize_weight and head.side == "text" and head.alpha:
            # What was learned is in units of |t|, and the text in it goes with the text.
            old, new = (F.normalize(one.double(), dim=1)[places] for one in (head.base.cpu(), base))
            row = (rows.weight[places] + rows.text * (new - old)) / head.logit_scale_factor
            length = base[places].double().norm(dim=1, keepdim=True)
            changed.residual[places] = ((row - new) * length / head.alpha).float()
    changed.shift = None if head.shift is None else head.shift.cpu().clone()
    changed.class_bias = None if head.class_bias is None else head.class_bias.cpu().clone()
    changed.facts = config.facts
    return changed


def _told(config: Any, change: str, **details: Any) -> Any:
    """The config with a line about what was done, without what was measured before; of zero-shot nothing is claimed."""
    config.metrics = None
    if change not in ("renamed", "reordered"):
        config.rejection = None  # its class means are of other classes
    if config.training is not None or config.few_shot is not None:
        training = config.training or {}
        config.training = {**training, "changes": [*(training.get("changes") or []), {"change": change, **details}]}
    return config
