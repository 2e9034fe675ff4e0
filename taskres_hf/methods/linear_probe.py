"""Linear probes: logistic regression on image embeddings, no text."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..data.reading import shorten
from ..embedding.features import ImageFeatures
from ..residual import TaskResClassifier
from .inputs import samples
from .method import Fitted, Linear, Method, register_method
from .selection import CROSS_VALIDATION, NOTHING, cross_validated

FIXED_C = 0.316  # CLIP's own example of a linear probe
GRID = tuple(10.0**power for power in range(-6, 7, 2))
ABSENT = -1e4  # the bias of a class without shots, for which the likelihood alone would say minus infinity
_ITERATIONS, _TOLERANCE, _ROUGH = 1000, 1e-6, 1e-4  # rough where only the best C is wanted


class LinearProbe(Method):
    """L2-regularised logistic regression: C * sum of cross-entropies + |w|^2 / 2, the bias free, by L-BFGS.

    A class without shots is never predicted, and a warning names it.
    """

    name = "linear-probe"
    title = "Linear probe"
    source = "Radford et al. 2021, arXiv 2103.00020, appendix A.3; C of its example code"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        classes = len(classifier.base)
        absent = sorted(set(range(classes)) - set(features.labels.tolist()))
        if absent:
            warnings.warn(
                f"{len(absent)} of {classes} classes have no shots: a linear probe cannot predict "
                f"{shorten([features.class_names[label] for label in absent])}.",
                stacklevel=3,
            )
        strength, selected_on = self._strength(features, classes)
        images, labels = samples(features)
        linear = _linear(_regression(strength, _TOLERANCE), images, labels, classes)
        trained = (classes - len(absent)) * (images.shape[1] + 1)
        return Fitted.of(linear, trained, selected={"C": strength}, selected_on=selected_on)

    def _strength(self, features: ImageFeatures, classes: int) -> tuple[float, str]:
        """C, and what it was chosen on."""
        return FIXED_C, ""


class LinearProbeCV(LinearProbe):
    """The linear probe with C chosen by cross-validation on the shots.

    As published a coarse grid comes first, 1e-6 to 1e6 in steps of 100, then a finer one around the best: a tenth to
    ten times that, in steps of the square root of 10.
    """

    name = "linear-probe-cv"
    title = "Linear probe, C by cross-validation"
    source = "Radford et al. 2021, arXiv 2103.00020, appendix A.3; grid as in Zhou et al. 2022 (CoOp), arXiv 2109.01134"

    def _strength(self, features: ImageFeatures, classes: int) -> tuple[float, str]:
        regressions: dict[tuple[int, ...], LogisticRegression] = {}

        def logits_of(strength: float, train_rows: Tensor, held_rows: Tensor) -> Tensor:
            # Of one fold, each C starts where the one before it ended.
            regression = regressions.setdefault(
                tuple(held_rows.tolist()), _regression(strength, _ROUGH, warm_start=True)
            )
            regression.set_params(C=strength)
            images, labels = samples(features.select(train_rows.tolist()))
            return _linear(regression, images, labels, classes).logits(features.image_embeds[0, held_rows])

        coarse = cross_validated(features.labels, GRID, logits_of)
        if coarse is None:
            return FIXED_C, NOTHING
        fine = cross_validated(features.labels, [coarse * 10 ** (step / 2) for step in range(-2, 3)], logits_of)
        return (coarse if fine is None else fine), CROSS_VALIDATION


def _regression(strength: float, tolerance: float, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=tolerance, warm_start=warm_start)


def _linear(regression: LogisticRegression, images: Tensor, labels: Tensor, classes: int) -> Linear:
    """The fit as a classifier of all classes; two classes, of which one row is fitted, get half of it each."""
    present = np.unique(labels.numpy())
    weight, bias = np.zeros((classes, images.shape[1])), np.full(classes, ABSENT)
    bias[present] = 0.0
    if len(present) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a large C on few shots has no optimum to reach
            regression.fit(images.double().numpy(), labels.numpy())
        rows, offsets = regression.coef_, regression.intercept_
        if len(present) == 2:
            rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
        weight[present], bias[present] = rows, offsets
    return Linear(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())


register_method(LinearProbe.name, LinearProbe)
register_method(LinearProbeCV.name, LinearProbeCV)
