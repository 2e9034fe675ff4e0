"""Zero-shot: the base classifier as it is."""

from __future__ import annotations

from typing import Any

from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import constant_bias, text_rows
from .method import Fitted, Linear, Method, register_method


class ZeroShot(Method):
    """logits = s f . u_k, with `s` the logit scale, `f` the image and `u` the text, both of unit length."""

    name = "zero-shot"
    title = "Zero-shot"
    source = "Radford et al. 2021, arXiv 2103.00020, section 3.1"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        weight = classifier.logit_scale * text_rows(classifier, features.image_embeds.float())
        return Fitted.of(Linear(weight, constant_bias(classifier, weight)), trained_parameters=0)


register_method(ZeroShot.name, ZeroShot)
