"""Learning classes that were added to a trained classifier from pictures: of the new ones alone, or of all."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from ..classes.rows import check_straight, empty_like, join_rows, listed, rows_of
from ..embedding import ImageFeatures
from ..errors import ConfigurationError, DataError
from .arguments import TaskResTrainingArguments, recorded_arguments
from .measuring import remember, remember_together
from .recipes import make_recipe
from .steps import fit
from .trainer import TaskResTrainer


def learn_new_classes(model: Any, before: tuple[Any, Any], dataset: Any, args: TaskResTrainingArguments | None) -> Any:
    """Fit classes that answer by their text so far.

    Args:
        model: with the new classes behind the others. before: its config and head without them.
        dataset: pictures of the new classes, or of all. args: of `TaskResTrainer`.

    Returns:
        The model.

    Raises:
        DataError: a new class without a picture. ConfigurationError: a residual on the image side.
    """
    recorded = {"training": before[0].training, "enhanced_base": before[0].enhanced_base}
    anew, args = args, args or TaskResTrainingArguments(disable_tqdm=True)
    names, old = model.class_names, len(before[1].base)
    if model.classifier.side == "image":
        raise ConfigurationError("A residual on the image side has no rows to fit to new classes: train on all.")
    trainer = TaskResTrainer(model, replace(args, on_short="ignore"), dataset)
    data = trainer.training_embeddings()
    present = set(data.labels.tolist())
    lacking = [names[label] for label in range(old, len(names)) if label not in present]
    if lacking:
        raise DataError(
            f"Of these new classes there is no {data.noun}: {listed(lacking)}. Give some, "
            "or add what has none in a call without pictures."
        )
    if len(present) == len(names):
        model.classifier.reset()
        TaskResTrainer(model, anew or recorded_arguments(recorded, disable_tqdm=True), dataset).train()
        return model
    if min(present) < old:
        warnings.warn(
            f"The dataset has {data.noun}s of some of the old classes only: the old rows stay as they are, and those "
            f"{data.noun}s are not used. Give {data.noun}s of all classes to train all of them anew.",
            stacklevel=3,
        )
    rows = [row for row, label in enumerate(data.labels.tolist()) if label >= old]
    if len(names) - old == 1:
        warnings.warn(
            f"{data.noun.capitalize()}s of {names[old]!r} alone do not say what sets it apart from classes without "
            f"{data.noun}s: it was added from its name. Give {data.noun}s of all classes to train on.",
            stacklevel=3,
        )
        model.config.training["changes"][-1]["from"] = "text"
        return model
    _join(model, before, data.select(rows), args.seed)
    return model


def _join(model: Any, before: tuple[Any, Any], data: ImageFeatures, seed: int) -> None:
    """Recipe `auto` on the new classes among each other, beside the old rows."""
    config, head = model.config, model.classifier
    old = len(before[1].base)
    check_straight([before[1]])
    apart = empty_like(head, head.base[old:])
    apart.facts["training"] = {"recipe": "auto"}
    own = replace(data, labels=data.labels - old, class_names=data.class_names[old:])
    fit(apart, own, make_recipe("auto", apart, 0.0, len(own)), seed)
    joined = join_rows([rows_of(before[1]), rows_of(apart)])
    facts, strength = {**head.facts}, head.strength
    head.set_weight(joined.weight, class_bias=joined.bias, normalize_weight=False)
    head.facts.update(
        {key: value for key, value in facts.items() if key not in ("normalize_weight", "logit_scale_factor")}
    )
    head.strength = strength
    added = {"train_digest": data.digest, "train_images": len(data)}
    if data.digests:
        added["train_pictures"] = remember(data.digests)
    config.data = remember_together([before[0].data, added])
    config.few_shot = {"num_images": int((before[0].few_shot or {}).get("num_images") or 0) + len(data)}
    training = dict(config.training or {})
    calibration = {"temperature": joined.text, "gain": joined.gain}
    changes = [
        *(training.get("changes") or [{"change": "added", "classes": data.class_names[old:], "from": "pictures"}])
    ]
    config.training = {**training, **calibration, "changes": [*changes[:-1], {**changes[-1], "num_images": len(data)}]}
