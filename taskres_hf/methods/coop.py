"""CoOp: a prompt's words before or around the class name are replaced by vectors that are learned.

Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134, section 3.2; constants of
section 4.1 and of the published configuration files. The image tower is not touched, so training runs over cached image
embeddings; each step goes through the text tower once for every class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding.features import ImageFeatures
from ..encoders import family_of, text_device, text_length
from ..errors import ConfigurationError
from ..prompts import class_prompts
from ..residual import TaskResClassifier
from ..training.recipes import Recipe, epoch_batches, learning_rate
from .method import Fitted, Linear, Method, register_method
from .towers import in_parts, text_base, text_rows, token_embedding

_POSITIONS = ("front", "middle", "end")
_STD = 0.02  # of the normal distribution that context vectors start from
_MOMENTUM = 0.9


class ContextPrompts(NamedTuple):
    """Prompts `[context] name.` with room for context vectors.

    Attributes:
        tokens: tensors [K, L] of the text tower; what stands at `places` is of no importance.
        places: [K, M] positions of the context vectors, in their order.
    """

    tokens: dict[str, Tensor]
    places: Tensor


class CoOp(Method):
    """CoOp.

    Args:
        tokens: M, number of context vectors (published: 16, and 4).
        position: of the class name: `"end"` (published default), `"middle"` (half of the vectors, rounded down, stand
            before it) or `"front"`.
        class_specific: a context for every class that has a picture, instead of one for all; a class without a
            picture keeps its row of the base classifier.
        init: words to start from, such as `"a photo of a"`, whose tokens take the place of `tokens`; by default
            vectors are drawn from a normal distribution with standard deviation 0.02.
        epochs: by default 50 where a class has one shot, 100 up to 7, 200 from 8 on (published for 1, 2, 4, 8 and 16;
            ImageNet: 50 always). 0 trains nothing.
        learning_rate, weight_decay, batch_size: of SGD with momentum 0.9; the first epoch runs at 1e-5, then a cosine,
            stepped once an epoch.

    Raises:
        ConfigurationError: an unknown position, or no token.
    """

    name = "coop"
    title = "CoOp, 16 tokens"
    source = "Zhou et al., IJCV 2022, arXiv 2109.01134"
    needs = frozenset({"text tower"})

    def __init__(
        self,
        tokens: int = 16,
        position: str = "end",
        class_specific: bool = False,
        init: str | None = None,
        epochs: int | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 5e-4,
        batch_size: int = 32,
    ) -> None:
        if position not in _POSITIONS or tokens < 1:
            raise ConfigurationError(
                f"`position` must be one of {_POSITIONS} and `tokens` 1 or more; got {position!r} and {tokens}."
            )
        self.tokens, self.position, self.class_specific, self.init = tokens, position, class_specific, init
        self.epochs = epochs
        self.learning_rate, self.weight_decay, self.batch_size = learning_rate, weight_decay, batch_size

    def _fit(self, features: ImageFeatures, classifier: TaskResClassifier, seed: int, model: Any) -> Fitted:
        base, config, tokenizer = text_base(model, classifier), model.config, model.tokenizer
        names = class_prompts(
            model.class_names, "{}", underscores=config.underscores, prompt_names=config.prompt_names
        )  # fmt: skip
        words = tokenizer(self.init, add_special_tokens=False)["input_ids"] if self.init else []
        classes = len(names)
        learned = features.labels.unique() if self.class_specific else torch.arange(classes)
        prompts = context_prompts(
            base, tokenizer, [names[row][0] for row in learned.tolist()], len(words) or self.tokens, self.position
        )
        layer = token_embedding(base, prompts.tokens)
        context = nn.Parameter(self._start(layer, words, len(learned), seed))
        frozen = F.normalize(classifier.base.detach(), dim=-1).to(text_device(base))

        def rows() -> Tensor:
            made = prompt_rows(base, layer, prompts, context)
            return made if len(learned) == classes else frozen.index_copy(0, learned.to(made.device), made)

        self._train(context, rows, features, classifier.logit_scale, seed)
        with torch.no_grad():
            weight = classifier.logit_scale * rows().to(classifier.base.device)
        bias = torch.full((classes,), classifier.logit_bias).to(weight) if classifier.logit_bias else None
        return Fitted.of(Linear(weight, bias), context.numel())

    def _start(self, layer: nn.Embedding, words: list[int], classes: int, seed: int) -> Tensor:
        """Context vectors to start from: [M, width], or [classes, M, width] where each class has its own."""
        if words:
            start = layer.weight.detach()[torch.tensor(words)].float()
            return start.repeat(classes, 1, 1) if self.class_specific else start
        shape = (*([classes] if self.class_specific else []), self.tokens, layer.weight.shape[1])
        return (_STD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(layer.weight.device)

    def _train(
        self, context: nn.Parameter, rows: Callable[[], Tensor], features: ImageFeatures, scale: float, seed: int
    ) -> None:
        images = F.normalize(features.image_embeds.float(), dim=-1).to(context.device)
        labels = features.labels.to(context.device)
        epochs = published_epochs(features.labels) if self.epochs is None else self.epochs
        recipe = Recipe("coop", self.learning_rate, self.weight_decay, epochs, train_batch_size=self.batch_size)
        optimizer = torch.optim.SGD([context], self.learning_rate, _MOMENTUM, weight_decay=self.weight_decay)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, epoch)
            for chosen, views in epoch_batches(len(labels), len(images), self.batch_size, seed, epoch):
                logits = scale * images[views, chosen] @ rows().T
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[chosen]).backward()
                optimizer.step()


class CoOp4(CoOp):
    """CoOp with 4 context vectors."""

    name, title = "coop-4", "CoOp, 4 tokens"

    def __init__(self, tokens: int = 4, **options: Any) -> None:
        super().__init__(tokens, **options)


class CoOpMiddle(CoOp):
    """CoOp with the class name in the middle of the context."""

    name, title = "coop-middle", "CoOp, 16 tokens, class name in the middle"

    def __init__(self, tokens: int = 16, position: str = "middle", **options: Any) -> None:
        super().__init__(tokens, position, **options)


class CoOpClassSpecific(CoOp):
    """CoOp with a context for every class."""

    name, title = "coop-class-specific", "CoOp, 16 tokens for each class"

    def __init__(self, tokens: int = 16, class_specific: bool = True, **options: Any) -> None:
        super().__init__(tokens, class_specific=class_specific, **options)


def context_prompts(base: Any, tokenizer: Any, names: list[str], tokens: int, position: str) -> ContextPrompts:
    """Prompts of class names with room for `tokens` context vectors, and a full stop at the end.

    Raises:
        ConfigurationError: a prompt has more tokens than the text tower reads, or a name has none.
    """
    opening, closing = _special_tokens(tokenizer)
    rows, starts = [], []
    for name in names:
        ids = tokenizer(f"{name}.")["input_ids"]
        body = ids[len(opening) : len(ids) - len(closing)]
        words = tokenizer(name, add_special_tokens=False)["input_ids"]
        if not body or not words:
            raise ConfigurationError(f"The class name {name!r} has no tokens: give prompt_names= for it.")
        # Where the full stop has no token of its own it belongs to the name.
        end = len(words) if body[: len(words)] == words else len(body)
        before = {"front": 0, "middle": tokens // 2, "end": tokens}[position]
        room = [body[0]] * tokens  # any token that is neither padding nor where the tower reads its answer
        rows.append([*opening, *room[:before], *body[:end], *room[before:], *body[end:], *closing])
        first = len(opening)
        starts.append([*range(first, first + before), *range(first + before + end, first + tokens + end)])
    longest, limit = max(map(len, rows)), text_length(base, tokenizer)
    if longest > limit:
        name = max(zip(map(len, rows), names, strict=True))[1]
        raise ConfigurationError(
            f"With {tokens} context tokens the prompt of {name!r} has {longest} tokens; the text tower reads {limit}. "
            "Take fewer context tokens (coop-4 has 4), or shorter names (prompt_names=)."
        )
    family = family_of(base)
    length = limit if family.padding == "max_length" else longest
    ids, mask = torch.full((len(rows), length), tokenizer.pad_token_id), torch.zeros(len(rows), length).long()
    places = torch.tensor(starts)
    for number, row in enumerate(rows):
        shift = length - len(row) if tokenizer.padding_side == "left" else 0
        ids[number, shift : shift + len(row)] = torch.tensor(row)
        mask[number, shift : shift + len(row)] = 1
        places[number] += shift
    return ContextPrompts({"input_ids": ids, **({"attention_mask": mask} if family.attention_mask else {})}, places)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ConfigurationError("The base's tokenizer changes a text's own tokens: context vectors cannot be placed.")


def prompt_rows(base: Any, layer: nn.Embedding, prompts: ContextPrompts, context: Tensor) -> Tensor:
    """Text embeddings [K, D] of unit length, of prompts with context vectors [M, width] or [K, M, width] in them."""

    def part_of(part: slice) -> Tensor:
        places = prompts.places[part, :, None]
        vectors = context[part] if context.ndim == 3 else context.expand(len(places), -1, -1)

        def put(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            where = places.to(embedded.device).expand(-1, -1, embedded.shape[-1])
            return embedded.scatter(1, where, vectors.to(embedded))

        handle = layer.register_forward_hook(put)
        try:
            return text_rows(base, {name: value[part] for name, value in prompts.tokens.items()})
        finally:
            handle.remove()

    return in_parts(part_of, len(prompts.places))


def published_epochs(labels: Tensor) -> int:
    """Published for 1, 2, 4, 8 and 16 shots: 50, 100, 100, 200, 200."""
    shots = int(torch.bincount(labels).max())
    return 50 if shots < 2 else 100 if shots < 8 else 200


for _method in (CoOp, CoOp4, CoOpMiddle, CoOpClassSpecific):
    register_method(_method.name, _method)
