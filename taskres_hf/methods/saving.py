"""A fitted linear classifier as the residual of a model, to be saved and served like any other."""

from __future__ import annotations

import torch

from ..embedding.features import ImageFeatures
from ..errors import ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..training.measuring import remember
from .method import Fitted

_EQUAL = 1e-5  # relative: lengths and biases closer than that are the same up to fp32


def write_to_model(
    fitted: Fitted,
    model: TaskResCLIPForImageClassification,
    *,
    method: str = "",
    features: ImageFeatures | None = None,
) -> None:
    """Make a model answer with what was fitted; `model.save_pretrained(folder)` saves it. Logits agree to 1e-4 of them.

    Where all rows are equally long, as long as the model's logit scale, and nothing is added to the logits, earlier
    releases can read what is saved (format 2).

    Args:
        fitted: of a linear method. model: for the same base and classes; the residual it had is lost.
        method: its name, recorded for `taskres info` and the card. features: the shots it was fitted on, N of them,
            recorded so that measurements leave those pictures out.

    Raises:
        ConfigurationError: the model gives several labels per picture; what was fitted is not linear, or
            does not fit the model (`TaskResClassifier.set_weight`). The model is as before then.
    """
    if model.classifier.several_labels:
        raise ConfigurationError(
            "The methods give one label per picture, and the model several (problem_type "
            "'multi_label_classification'): make one without problem_type."
        )
    if fitted.linear is None:
        reason = fitted.not_linear or "Its logits are not linear in the image embeddings."
        raise ConfigurationError(f"{method or 'This classifier'} cannot be saved as a residual. {reason}")
    head = model.classifier
    weight = fitted.linear.weight.detach().cpu().double()
    offset = torch.zeros(len(weight)) if fitted.linear.bias is None else fitted.linear.bias.detach()
    bias = offset.cpu().double() - head.logit_bias
    lengths = weight.norm(dim=-1)
    usual = float(lengths.pow(2).mean().sqrt())
    equal = usual > 0 and bool(((lengths - usual).abs() <= _EQUAL * usual).all())
    factor = usual / head.logit_scale
    if usual == 0 or abs(factor - 1.0) <= _EQUAL:
        factor = 1.0
    head.set_weight(
        weight / (head.logit_scale * factor),
        class_bias=bias if bool((bias.abs() > _EQUAL * usual).any()) else None,
        normalize_weight=equal,
        logit_scale_factor=factor,
    )
    model.config.training = {
        "method": method or None, "trained_parameters": fitted.trained_parameters, "selected": dict(fitted.selected),
        "selected_on": fitted.selected_on, "fit_seconds": round(fitted.fit_seconds, 3),
    }  # fmt: skip
    if features is not None:
        _record(model, features)


def _record(model: TaskResCLIPForImageClassification, features: ImageFeatures) -> None:
    """Where the shots came from, as the trainer records it."""
    counts = torch.bincount(features.labels, minlength=len(features.class_names)).tolist()
    few_shot = {"num_images": len(features)}
    if len(set(counts)) == 1:
        few_shot["shots"] = counts[0]
    model.config.few_shot = few_shot
    model.config.data = {"train_digest": features.digest, "train_images": len(features)}
    if features.digests:
        model.config.data["train_pictures"] = remember(features.digests)
