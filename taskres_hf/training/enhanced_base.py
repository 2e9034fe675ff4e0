"""The enhanced base classifier (TaskRes*, arXiv 2211.10277, section 4.1): tune the text projection, then the residual.

The paper tunes CLIP's text projection on the few-shot data and trains the residual on the new base; that training code
was never published, only its projections for one backbone. Ours: the projection `P` [D, width] starts at the
pretrained one and is trained on cached image embeddings with a penalty that holds it near there, without a validation
set. Only what it adds to each class's row, `shift_k = (P' - P) h_k`, is kept, so an artifact still needs nothing but
the public base model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_model import has_text_tower
from ..embedding import ImageFeatures, StoredFeatures
from ..encoders import encode_texts, family_of
from ..errors import BaseModelError, ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import TaskResClassifier

EPOCHS = 50  # as the paper is reported to use


def enhance(
    model: TaskResCLIPForImageClassification, head: TaskResClassifier, data: ImageFeatures | StoredFeatures, seed: int
) -> None:
    """Put the enhanced base under a head's residual; the same data and seed give the same base on every process.

    Args:
        model: whose text tower and prompts are used. head: its classifier, or one of the same classes.
        data: few-shot embeddings.

    Raises:
        ConfigurationError: embeddings on disk.
    """
    if isinstance(data, StoredFeatures):
        raise ConfigurationError("enhanced_base needs embeddings in memory; these are on disk.")
    inputs, projection = projection_inputs(model.clip, model.tokenizer, model.class_prompts())
    shift = tune_projection(
        inputs, projection, head.base.cpu(), data, logit_scale=head.logit_scale, logit_bias=head.logit_bias,
        shots=len(data) / len(head.base), seed=seed,
    )  # fmt: skip
    head.shift = shift.to(head.base)


def projection_inputs(base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """What enters the text projection, averaged over each class's prompts, and the projection itself.

    Returns:
        `h` [K, width] and `P` [D, width], fp32, with `t = h @ P.T` (plus a bias where the projection has one).

    Raises:
        BaseModelError: the base has no single linear text projection.
    """
    projection = dict(base.named_modules()).get(family_of(base).text_projection)
    if not isinstance(projection, nn.Linear):
        raise BaseModelError(
            f"{type(base).__name__} has no linear text projection to enhance. Train without enhanced_base."
        )
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float().cpu()))
    try:
        encode_texts(base, tokenizer, [prompt for group in prompts for prompt in group])
    finally:
        handle.remove()
    inputs = torch.cat(seen)
    if inputs.ndim != 2:
        raise BaseModelError(f"The text projection of {type(base).__name__} works on tokens, not on the pooled text.")
    means = torch.stack([group.mean(dim=0) for group in inputs.split([len(group) for group in prompts])])
    return means, projection.weight.detach().float().cpu()


def tune_projection(
    inputs: Tensor,
    projection: Tensor,
    base: Tensor,
    data: ImageFeatures,
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    shots: float,
    epochs: int = EPOCHS,
    step: float = 0.03,
    penalty: float = 3.0,
    seed: int = 1,
) -> Tensor:
    """The shift [K, D] of the enhanced base: what the tuned projection adds to `t`.

    Adam with a cosine from `step * rms(P)`; loss is the cross-entropy plus
    `penalty / shots * |shift|^2 / mean |t_k|^2`.

    Args:
        inputs: `h` [K, width]. projection: `P` [D, width]. base: `t` [K, D].
        data: few-shot embeddings; a random view of each picture an epoch.
        shots: mean training pictures per class.
        epochs: passes over the pictures.
        step, penalty: chosen on pictures outside the shots over many tasks, see the documentation on recipes.
    """
    delta = torch.zeros_like(projection, requires_grad=True)
    # Relative to the projection's own size, so that it does not depend on the backbone's scale.
    rate = step * float(projection.pow(2).mean().sqrt())
    optimizer = torch.optim.Adam([delta], lr=rate)
    embeds = F.normalize(data.image_embeds.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    factor = penalty / max(shots, 1.0) / float(base.pow(2).sum(dim=1).mean())
    rows = torch.arange(len(data))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
        views = torch.randint(len(embeds), (len(data),), generator=generator)
        shift = inputs @ delta.T
        logits = logit_scale * embeds[views, rows] @ F.normalize(base + shift, dim=-1).T + logit_bias
        loss = F.cross_entropy(logits, data.labels) + factor * shift.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (inputs @ delta.detach().T).contiguous()


def published_base(model: TaskResCLIPForImageClassification) -> tuple[Tensor, dict[str, Any] | None] | None:
    """`t` [K, D] with the underscores of class names kept, and its fingerprint; None where nothing differs."""
    config = model.config
    if (
        config.underscores == "keep"
        or config.text_encoding is not None
        or not any("_" in name for name in model.class_names)
    ):
        return None
    # Made by the one function that makes base classifiers; from the name where this base lacks a text tower or fp32.
    reusable = has_text_tower(model.clip) and model.clip.dtype == torch.float32
    source: Any = model.clip if reusable else config.base_model_name_or_path
    options = {"tokenizer": model.tokenizer} if reusable else {"revision": config.base_model_revision}
    made = type(model).from_base(
        source, model.class_names, config.templates or None, class_descriptions=config.class_descriptions,
        prompt_names=config.prompt_names, underscores="keep", prompt_average=config.prompt_average, **options,
    )  # fmt: skip
    return made.classifier.base, made.config.base_fingerprint
