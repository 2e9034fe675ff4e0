"""CLIP-LoRA: low-rank updates of the queries, keys and values of both towers, trained with `peft`.

Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR workshops 2024, arXiv 2405.18541,
section 4; constants of section 5 and of the published code, one setting for all tasks, nothing selected. Each step goes
through both towers. The model stays as it is: what is tuned is a copy that shares all weights but those with an update.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.labelled import LabelledImages
from ..embedding.embedder import Embedder
from ..embedding.features import ImageFeatures, embed_images
from ..embedding.preprocessing import Preprocessor, augment, crop_size
from ..encoders import image_features, pooled, tokenize
from ..errors import BaseModelError, ConfigurationError, MissingExtraError
from ..residual import TaskResClassifier
from .method import Fitted, Linear, Method, register_method
from .towers import attention_projections, in_parts, text_base, text_rows

_DECODED = 1 << 28  # bytes of decoded pictures that are kept for the next epoch


class CLIPLoRA(Method):
    """CLIP-LoRA.

    Each class has one prompt, the first of its own where the model has several. Pictures are augmented anew whenever
    they are seen (random resized crop and flip), unless the processor gives no fixed size. A tower without separate
    layers for queries, keys and values is left as it is, with a warning; where that is the image tower, training runs
    over the embeddings that are there, and the result is linear.

    Args:
        rank: of an update (published: 2). alpha: the update is scaled by `alpha / sqrt(rank)`, as the published code
            does (alpha 1). dropout: on an update's input (0.25).
        learning_rate, final_learning_rate: of AdamW, from the one to the other along a cosine, stepped each step.
        weight_decay: 0.01. batch_size: 32, the last batch of an epoch included though smaller.
        steps: by default 500 times the most shots a class has. 0 trains nothing.

    Raises:
        ConfigurationError: a rank below 1 or a negative number of steps.
    """

    name = "clip-lora"
    title = "CLIP-LoRA"
    source = "Zanella and Ben Ayed, CVPR workshops 2024, arXiv 2405.18541"
    needs = frozenset({"text tower", "pictures"})

    def __init__(
        self,
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        learning_rate: float = 2e-4,
        final_learning_rate: float = 1e-6,
        weight_decay: float = 1e-2,
        batch_size: int = 32,
        steps: int | None = None,
    ) -> None:
        if rank < 1 or (steps is not None and steps < 0):
            raise ConfigurationError(f"`rank` must be 1 or more and `steps` 0 or more; got {rank} and {steps}.")
        self.rank, self.alpha, self.dropout, self.batch_size, self.steps = rank, alpha, dropout, batch_size, steps
        self.learning_rate, self.final_learning_rate = learning_rate, final_learning_rate
        self.weight_decay = weight_decay

    def _fit(
        self,
        features: ImageFeatures,
        classifier: TaskResClassifier,
        seed: int,
        model: Any,
        images: LabelledImages | None = None,
    ) -> Fitted:
        """Raises MissingExtraError without `peft`, BaseModelError where neither tower can be tuned."""
        if importlib.util.find_spec("peft") is None:
            raise MissingExtraError('clip-lora needs the package peft: pip install "taskres_hf[lora]".')
        assert images is not None
        base = text_base(model, classifier)
        tokens = tokenize(base, model.tokenizer, [group[0] for group in model.class_prompts()])
        shots = _Shots(images, model.image_processor, base, seed)
        text, image = self._targets(base, tokens, shots)
        devices = [base.device.index or 0] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tuned, lora = self._tuned(base, text + image)
            trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
            cached = None if image else F.normalize(features.image_embeds.float(), dim=-1)
            self._train(tuned, trained, tokens, shots, cached, classifier.logit_scale, seed)
        tuned = lora.merge_and_unload().eval().requires_grad_(False)
        with torch.no_grad():
            rows = _rows(tuned, tokens) if text else F.normalize(classifier.base, dim=-1)
        weight = classifier.logit_scale * rows.to(classifier.base.device)
        bias = torch.full((len(weight),), classifier.logit_bias).to(weight) if classifier.logit_bias else None
        linear, count = Linear(weight, bias), sum(parameter.numel() for parameter in trained)
        if not image:
            return Fitted.of(linear, count)
        return Fitted(
            linear.logits,
            count,
            not_linear="It changes the image tower: its embeddings are others than those of the base.",
            embed=_TunedTower(tuned, model.image_processor),
        )

    def _targets(self, base: Any, tokens: dict[str, Tensor], shots: _Shots) -> tuple[list[str], list[str]]:
        """Names of the layers of the text and the image tower that get an update."""
        one = {name: value[:1] for name, value in tokens.items()}
        found = {
            "text": attention_projections(base, lambda: text_rows(base, one)),
            "image": attention_projections(base, lambda: image_features(base, shots.inputs([0], 0))),
        }
        kinds = [name for name, layers in found.items() if not layers]
        if len(kinds) == 2:
            raise BaseModelError(
                "Neither tower of the base has separate linear layers for queries, keys and values, which clip-lora "
                "updates: take another method, or another base."
            )
        if kinds:
            warnings.warn(
                f"The {kinds[0]} tower has no separate linear layers for queries, keys and values: clip-lora leaves it "
                "as it is and tunes the other.",
                stacklevel=4,
            )
        return found["text"], found["image"]

    def _tuned(self, base: Any, targets: list[str]) -> tuple[Any, Any]:
        """A copy of the base with an update, zero as yet, on every target; and what merges them."""
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        config: Any = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_rslora=True, target_modules=targets
        )
        lora = LoraModel(_copy(base, targets), {"default": config}, "default")
        return lora.model, lora

    def _train(
        self, tuned: Any, trained: list[Any], tokens: dict[str, Tensor], shots: _Shots, cached: Tensor | None,
        scale: float, seed: int,
    ) -> None:  # fmt: skip
        labels = torch.tensor(shots.images.labels)
        steps = 500 * int(torch.bincount(labels).max()) if self.steps is None else self.steps
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay)
        batches = self._batches(len(labels), 1 if cached is None else len(cached), seed)
        for step in range(steps):
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            lowest = self.final_learning_rate
            optimizer.param_groups[0]["lr"] = lowest + (self.learning_rate - lowest) * cosine
            epoch, chosen, views = next(batches)
            if cached is None:
                inputs = shots.inputs(chosen.tolist(), epoch)
                embeds = F.normalize(pooled(image_features(tuned, inputs)).float(), dim=-1)
            else:
                embeds = cached[views, chosen]
            rows = _rows(tuned, tokens)
            logits = scale * embeds.to(rows.device) @ rows.T
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen].to(rows.device)).backward()
            optimizer.step()

    def _batches(self, count: int, views: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Epoch, positions [B] and views [B], without end; a smaller batch at an epoch's end is not dropped."""
        generator = torch.Generator().manual_seed(seed)
        epoch = 0
        while True:
            order = torch.randperm(count, generator=generator)
            chosen = torch.randint(views, (count,), generator=generator)
            for start in range(0, count, self.batch_size):
                yield epoch, order[start : start + self.batch_size], chosen[start : start + self.batch_size]
            epoch += 1


def _rows(base: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Text embeddings [K, D] of unit length."""
    count = len(tokens["input_ids"])
    return in_parts(lambda part: text_rows(base, {name: value[part] for name, value in tokens.items()}), count)


def _copy(base: Any, targets: Sequence[str]) -> Any:
    """A copy of a base in fp32 that shares all tensors but the targets' weights, which merging will change."""
    parameters = list(base.parameters())
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return copy.deepcopy(base).float()
    own = {id(base.get_submodule(name).weight) for name in targets}
    shared = {id(tensor): tensor for tensor in [*parameters, *base.buffers()] if id(tensor) not in own}
    return copy.deepcopy(base, shared)


class _Shots:
    """The shots' pictures as the image tower takes them."""

    def __init__(self, images: LabelledImages, image_processor: Any, base: Any, seed: int) -> None:
        self.images, self.base, self.seed = images, base, seed
        self.preprocess = Preprocessor(image_processor)
        self.size: tuple[int, int] | None
        try:
            self.size = crop_size(image_processor)
        except ConfigurationError:  # no fixed size to crop to
            self.size = None
        self._decoded: dict[int, PIL.Image.Image] = {}
        self._bytes = 0

    def inputs(self, rows: Sequence[int], epoch: int) -> dict[str, Tensor]:
        """Inputs of the tower for pictures, augmented in a way that epoch and row decide."""
        pictures = [self._picture(row) for row in rows]
        if self.size is not None:
            pictures = [
                augment(picture, self.size, random.Random(f"{self.seed} {epoch} {row}"))
                for row, picture in zip(rows, pictures, strict=True)
            ]
        device = next(getattr(self.base, "vision_model", self.base).parameters()).device
        inputs = self.preprocess(pictures, augmented=self.size is not None)
        return {name: value.to(device) for name, value in inputs.items()}

    def _picture(self, row: int) -> PIL.Image.Image:
        if row not in self._decoded:
            picture = self.images.image(row)
            self._bytes += 3 * picture.width * picture.height
            if self._bytes > _DECODED:
                return picture
            self._decoded[row] = picture
        return self._decoded[row]


class _TunedTower:
    """Pictures to embeddings [N, D] with the tuned image tower, prepared as for the base."""

    def __init__(self, tuned: nn.Module, image_processor: Any) -> None:
        self._tuned, self._image_processor = tuned, image_processor
        self._embedder: Embedder | None = None

    def __call__(self, pictures: LabelledImages | Sequence[Any]) -> Tensor:
        if self._embedder is None:
            self._embedder = Embedder(self._tuned, self._image_processor)  # type: ignore[arg-type]
        if isinstance(pictures, LabelledImages):
            return embed_images(self._embedder, pictures, progress=False).image_embeds[0]
        size = self._embedder.batch_size
        parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        return torch.cat([self._embedder(part) for part in parts])


register_method(CLIPLoRA.name, CLIPLoRA)
