"""TaskRes: our recipes, the published one, and TaskRes* on an enhanced base."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F

from ..embedding.features import ImageFeatures
from ..encoders import family_of
from ..residual import TaskResClassifier
from ..training.arguments import RecipeName, TaskResTrainingArguments
from ..training.enhanced_base import enhance
from ..training.recipes import recipe_for
from ..training.steps import fit
from ..training.whitened import fit_whitened
from .inputs import constant_bias
from .method import Fitted, Linear, Method, register_method
from .selection import CROSS_VALIDATION, NOTHING


class TaskRes(Method):
    """TaskRes with recipe `auto`: the residual fitted at once in the whitened metric of the shots, and a bias a class.

    See `training.whitened`. Share of the class means, what is kept against zero-shot and temperature follow from
    held-out shots.
    """

    name = "taskres"
    title = "TaskRes, our recipe"
    source = "Yu et al. 2023, arXiv 2211.10277; recipe ours"

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        embeds, views = features.image_embeds, features.image_embeds.shape[0]
        fitted = fit_whitened(
            embeds.flatten(0, 1), features.labels.repeat(views), classifier.base, classifier.logit_scale, views
        )
        weight = fitted.weight.to(embeds)
        bias = fitted.bias.to(embeds) + classifier.logit_bias
        several = bool((features.labels.bincount() > 1).any())
        return Fitted.of(
            Linear(weight, bias), weight.numel() + bias.numel(), selected=fitted.chosen,
            selected_on=CROSS_VALIDATION if several else NOTHING,
        )  # fmt: skip


class TaskResByEpochs(TaskRes):
    """logits = s f . w_k / |w_k|, w_k = t_k + alpha x_k: the residual x is trained by epochs. Nothing is selected."""

    recipe: ClassVar[RecipeName]

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        base = classifier.base.detach().to(features.image_embeds.device)
        head = TaskResClassifier(base, classifier.alpha, classifier.logit_scale, classifier.logit_bias).to(base.device)
        more = self._prepare(head, features, seed, model)
        recipe = recipe_for(TaskResTrainingArguments(recipe=self.recipe), head, features.labels, fit_buffer=False)
        fit(head, features, recipe, seed)
        weight = head.logit_scale * F.normalize(head.weight().detach(), dim=-1)
        return Fitted.of(Linear(weight, constant_bias(classifier, weight)), head.residual.numel() + more)

    def _prepare(self, head: TaskResClassifier, features: ImageFeatures, seed: int, model: Any) -> int:
        """What comes before the residual; how many numbers it fits."""
        return 0


class TaskResAutoV1(TaskResByEpochs):
    """TaskRes with the first version of recipe `auto`."""

    name = "taskres-auto-v1"
    title = "TaskRes, our first recipe"
    recipe = "auto-v1"


class TaskResPaper(TaskResByEpochs):
    """TaskRes as published: Adam, learning rate 2e-3, weight decay 5e-4, 100 or 200 epochs (section 4.1).

    Augmented as published only as far as the embeddings are: an epoch takes a random one of a picture's V views.
    """

    name = "taskres-paper"
    title = "TaskRes, as published"
    source = "Yu et al. 2023, arXiv 2211.10277, section 4.1"
    recipe = "paper"


class TaskResEnhanced(TaskResPaper):
    """TaskRes*: the text projection is tuned on the shots first, then the residual as published on top."""

    name = "taskres-enhanced"
    title = "TaskRes*"
    source = "Yu et al. 2023, arXiv 2211.10277, section 4.1; tuning of the projection ours"
    needs = frozenset({"text tower"})

    def _prepare(self, head: TaskResClassifier, features: ImageFeatures, seed: int, model: Any) -> int:
        enhance(model, head, features, seed)
        return int(model.clip.get_submodule(family_of(model.clip).text_projection).weight.numel())


for method in (TaskRes, TaskResAutoV1, TaskResPaper, TaskResEnhanced):
    register_method(method.name, method)
