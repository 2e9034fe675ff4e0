"""The classifier of Task Residual tuning (TaskRes, CVPR 2023, arXiv 2211.10277, section 3.2).

    weight_k = t_k + alpha * x_k
    logits   = scale * norm(image) @ norm(weight).T + bias

What recipe `auto` and other methods fit is written as a residual too (`set_weight`), and `strength` s goes from the
zero-shot classifier (0) to the trained one (1) without training again:

    weight_k = t_k + s * alpha * x_k
    logits   = scale * factor^s * norm(image) @ W.T + bias + s * class_bias
    W_k      = weight_k / |weight_k|, or weight_k / |t_k| where `normalize_weight` is off

On the image side instead (TaskRes-Image, an ablation of the paper) one shared `x` [1, D] is added to every image
embedding: logits = scale * norm(image + alpha * x) @ norm(t).T + bias.

`t` [K, D] is the base classifier: the text embedding of each class's prompts, not normalised, frozen.
`x` [K, D] is the task residual: zero at the start, the only thing trained. Normalisation comes after the
addition, so the same `alpha` and learning rate mean a smaller turn where the raw text embedding is longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigurationError, DataError

# What the head adds to the published classifier, as it is where nothing of it is used.
AS_PUBLISHED: dict[str, Any] = {"strength": 1.0, "logit_scale_factor": 1.0, "normalize_weight": True}
MULTI_LABEL = "multi_label_classification"  # transformers' name
_RANGES = {"strength": (0.0, 1.0), "logit_scale_factor": (1e-6, 1e6)}
_SAME = 1e-6  # of a row's length: what rounding alone makes of a row that was not changed
LARGEST_ALPHA, SMALLEST_ALPHA = 1e4, 1e-4  # beyond them fp32 overflows, or Adam cannot move the residual
_LARGEST_LOGIT = 1e5


def checked_alpha(alpha: Any) -> float:
    """`alpha` as a float: 0, or 1e-4 to 1e4 in size.

    Raises:
        ConfigurationError: it is something else.
    """
    number = type(alpha) is not bool and isinstance(alpha, Real) and math.isfinite(alpha)
    if not number or (alpha != 0 and not SMALLEST_ALPHA <= abs(alpha) <= LARGEST_ALPHA):
        raise ConfigurationError(
            f"`alpha` must be a finite number, 0 or from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g} in size (the paper's "
            f"is 0.5); got {alpha!r}."
        )
    return float(alpha)


def checked_setting(name: str, value: Any) -> Any:
    """`strength` (0 to 1) or `logit_scale_factor` (1e-6 to 1e6) as a float, `normalize_weight` as a bool.

    Raises:
        ConfigurationError: it is something else.
    """
    if name == "normalize_weight":
        if not isinstance(value, bool):
            raise ConfigurationError(f"`normalize_weight` must be True or False; got {value!r}.")
        return value
    low, high = _RANGES[name]
    if type(value) is bool or not isinstance(value, Real) or not low <= float(value) <= high:
        raise ConfigurationError(f"`{name}` must be a number from {low:g} to {high:g}; got {value!r}.")
    return float(value)


def label_threshold(facts: Mapping[str, Any]) -> float:
    """The score from which on a classifier of several labels per picture gives a label; 0.5 unless its recipe chose."""
    return float((facts.get("training") or {}).get("threshold") or 0.5)


def setting(name: str) -> Any:
    """A property over one entry of `facts` that is not there where the value is as published."""

    def read(owner: Any) -> Any:
        return owner.facts.get(name, AS_PUBLISHED[name])

    def write(owner: Any, value: Any) -> None:
        checked = checked_setting(name, value)
        owner.facts.pop(name, None)
        if checked != AS_PUBLISHED[name]:
            owner.facts[name] = checked

    return property(read, write)


class TaskResClassifier(nn.Module):
    """A linear classifier over image embeddings: a frozen base plus a scaled, trainable residual.

    Args:
        base: `t` [K, D], raw (not normalised) text embeddings, one row per class.
        alpha: scale of the residual, 0 or 1e-4 to 1e4 in size (paper: 0.5, 1.0 for Flowers102).
        logit_scale: factor on the cosine, already exponentiated (100.0 for OpenAI's CLIP); above 0, at most 1e5.
        logit_bias: constant added to every logit (0 for CLIP, learned in SigLIP).
        side: `"text"` (published TaskRes) or `"image"` (TaskRes-Image).

    Attributes:
        base: buffer [K, D] fp32, not part of the state dict (it is recomputed from the base model).
        shift: buffer [K, D] fp32 or None: what the enhanced base (TaskRes*) adds to `base`; frozen.
        class_bias: buffer [K] fp32 or None: added to the logits; frozen.
        residual: parameter [K, D] ([1, D] on the image side) fp32, same units as `base`, zeros at the start.
        strength: from 0 (the zero-shot classifier, bit for bit) to 1 (as trained); can be set at any time, see
            `training.suggest_strength` for pictures unlike the shots.
        logit_scale_factor: factor on `logit_scale` (1e-6 to 1e6). normalize_weight: see above. Both by `set_weight`.
        facts: the alpha, those three where they are not as published, and how the residual came to be (`few_shot`,
            `training`, `metrics`, `data`, `enhanced_base`).
            A model's config reads and writes this very dict, so that the two never differ.

    Raises:
        ConfigurationError: `base` is not a finite matrix, or `alpha`, the scale or the bias is out of range.
    """

    base: Tensor
    shift: Tensor | None
    class_bias: Tensor | None
    facts: dict[str, Any]
    config: Any = None  # of the model that it serves in
    base_bias: Tensor | None  # of a pretrained head, see `alone.linear_head`
    takes_raw_embeddings = False  # of their own length, which then counts

    def __init__(
        self,
        base: Tensor,
        alpha: float = 0.5,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        side: str = "text",
    ) -> None:
        super().__init__()
        if side not in ("text", "image"):
            raise ConfigurationError(f"`side` must be 'text' or 'image'; got {side!r}.")
        if base.ndim != 2 or base.shape[0] < 1:
            raise ConfigurationError(
                f"The base classifier must be a matrix [K, D] with K >= 1; got shape {tuple(base.shape)}."
            )
        if base.numel() and not all(map(math.isfinite, map(float, base.aminmax()))):  # both are NaN where one number is
            raise ConfigurationError(
                "The base classifier holds NaN or infinite values: check the base model's text tower."
            )
        if not 0.0 < logit_scale <= _LARGEST_LOGIT or not abs(logit_bias) <= _LARGEST_LOGIT:
            raise ConfigurationError(
                f"`logit_scale` must be above 0 and at most {_LARGEST_LOGIT:g}, `logit_bias` at most that in size; got "
                f"{logit_scale!r} and {logit_bias!r}: check the base model's logit scale."
            )
        self.facts = {"alpha": checked_alpha(alpha)}
        self.logit_scale = float(logit_scale)
        self.logit_bias = float(logit_bias)
        self.register_buffer("base", base.detach().to(torch.float32).clone(), persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.register_buffer("class_bias", None, persistent=False)
        self.register_buffer("base_bias", None, persistent=False)
        self.side = side
        self.residual = nn.Parameter(torch.zeros_like(self.base if side == "text" else self.base[:1]))

    @property
    def alpha(self) -> float:
        """Scale of the residual."""
        return float(self.facts["alpha"])

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.facts["alpha"] = checked_alpha(value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in torch, but fp32 stays: `model.half()` and `.to(torch.bfloat16)` are for the base."""

        def kept(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
            return tensor.to(moved.device) if narrower and tensor.device.type != "meta" else moved

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]

    strength = setting("strength")
    logit_scale_factor = setting("logit_scale_factor")
    normalize_weight = setting("normalize_weight")

    def frozen_weight(self) -> Tensor:
        """What the residual is added to [K, D]: the base classifier, and `strength` of its shift if it was enhanced."""
        return self.base if self.shift is None else self.base + self.strength * self.shift

    def weight(self) -> Tensor:
        """The classifier's rows before normalisation [K, D]: `t + strength * alpha * x` on the text side."""
        frozen = self.frozen_weight()
        return frozen + self.strength * self.alpha * self.residual if self.side == "text" else frozen

    @property
    def is_zero_shot(self) -> bool:
        """Whether every answer is the base classifier's."""
        plain = self.shift is None and self.class_bias is None and self.logit_scale_factor == 1.0
        return self.strength == 0.0 or (plain and (self.alpha == 0.0 or not bool(self.residual.any())))

    @property
    def several_labels(self) -> bool:
        """Whether a picture may have several labels, or none: `problem_type` of the model that it serves in."""
        return getattr(self.config, "problem_type", None) == MULTI_LABEL

    def check_labels(self, several: bool) -> None:
        """Refuse data whose pictures have several labels each for a classifier of one, and the other way round.

        Raises:
            DataError: says what to do.
        """
        if several and not self.several_labels:
            raise DataError(
                "These pictures have several labels each, and the model gives one: make it with from_base(..., "
                f"problem_type='{MULTI_LABEL}')."
            )
        if self.several_labels and not several:
            raise DataError(
                f"The model gives several labels per picture (problem_type '{MULTI_LABEL}'), and these pictures have "
                "one each: give lists of labels, see load_training_data(..., multi_label=True)."
            )

    def check_one_label(self, what: str) -> None:
        """Refuse what would read a classifier of several labels per picture as one of a single label.

        Args:
            what: begins the message, such as "The report".

        Raises:
            ConfigurationError: pictures have several labels each.
        """
        if self.several_labels:
            raise ConfigurationError(
                f"{what} is for classifiers that give each picture one label; this one gives several, or none "
                f"(problem_type '{MULTI_LABEL}')."
            )

    def check_has_text(self, what: str, or_texts: bool = False) -> None:
        """Raise a ConfigurationError that begins with `what`: over one tower alone, or of texts unless `or_texts`."""
        if not or_texts and getattr(self.config, "text_encoding", None) is not None:
            raise ConfigurationError(f"{what} is for classifiers of pictures; this one is of texts.")

    def mean_square(self) -> float:
        """Of the length of the base classifier's rows: what steps and penalties are relative to."""
        return float(self.base.pow(2).sum(dim=1).mean())

    def like(self, base: Tensor) -> TaskResClassifier:
        """An untrained head of this kind with other rows `base` [K, D]."""
        return TaskResClassifier(base.cpu(), self.alpha, self.logit_scale, self.logit_bias, self.side)

    def check_can_say_no(self) -> None:
        """Refuse to answer yes or no for each class by cosines alone.

        Raises:
            ConfigurationError: pictures may have several labels, and it was never trained.
        """
        if self.several_labels and self.is_zero_shot and not self.logit_bias:
            raise ConfigurationError(
                "This classifier of several labels per picture is not trained: cosines alone do not say yes or no, so "
                "it would give every label to every picture. Train it on a few pictures first."
            )

    def loss(self, logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
        """`cross_entropy`, or `multi_label_loss` where a picture may have several labels."""
        return (multi_label_loss if self.several_labels else cross_entropy)(logits, labels, num_items)

    def check_trainable(self) -> None:
        """Refuse to train what is not the published classifier at full strength: recipes and gradients are its own.

        Raises:
            ConfigurationError: says what differs.
        """
        biased = self.class_bias is not None and not self.several_labels  # of which training by epochs makes one itself
        used = [name for name in AS_PUBLISHED if name in self.facts] + ["class_bias"] * biased
        if used:
            raise ConfigurationError(
                f"Training is for the published classifier; this one has another {', '.join(used)}. Start from "
                "zero-shot with classifier.reset(), or, where it is the strength alone, set classifier.strength = 1.0."
            )

    @torch.no_grad()
    def set_weight(
        self,
        weight: Any,
        *,
        class_bias: Any = None,
        normalize_weight: bool = True,
        logit_scale_factor: float = 1.0,
    ) -> None:
        """Write a linear classifier over unit-length image embeddings as the residual of the base classifier:

            logits = logit_scale * logit_scale_factor * norm(image) @ weight.T + logit_bias + class_bias

        Whatever was there before goes, what was recorded about it included; the strength becomes 1. Rows equal to the
        base classifier's up to rounding (1e-6 of their length) get a residual of exactly zero.

        Args:
            weight: [K, D], tensor or array. Rows about as long as 1 lose nothing to rounding: put what is common to
                their lengths into `logit_scale_factor`.
            class_bias: [K] or None.
            normalize_weight: rows count by their direction, as published; False keeps their lengths.
            logit_scale_factor: 1e-6 to 1e6.

        Raises:
            ConfigurationError: of another shape, not finite, a row of length zero where directions count, a factor out
                of range, `alpha` 0 or a residual on the image side. Nothing is changed then.
        """
        classes, dim = self.base.shape
        base, rows = self.base.cpu().double(), finite(weight, (classes, dim), "weight")
        bias = None if class_bias is None else finite(class_bias, (classes,), "class_bias")
        normalize_weight = checked_setting("normalize_weight", normalize_weight)
        factor = checked_setting("logit_scale_factor", logit_scale_factor)
        if self.side != "text" or self.alpha == 0.0:
            raise ConfigurationError(
                f"A classifier can be written only where the residual is on the text side with an alpha other than 0; "
                f"here it is on the {self.side} side with alpha {self.alpha:g}."
            )
        own = base.norm(dim=1, keepdim=True)
        lengths = rows.norm(dim=1, keepdim=True) if normalize_weight else torch.ones_like(own)
        if not bool(lengths.all()) or not bool(own.all()):
            advice = "pass normalize_weight=False" if bool(own.all()) else "it is one of the base classifier's"
            raise ConfigurationError(f"A row of length zero has no direction: {advice}.")
        difference = own * rows / lengths - base
        difference[(difference.abs() <= _SAME * own).all(dim=1)] = 0.0
        residual = finite(difference.float() / self.alpha, (classes, dim), "weight")
        self.reset()
        self.residual.copy_(residual)
        self.class_bias = None if bias is None else bias.to(self.base)
        self.normalize_weight, self.logit_scale_factor = normalize_weight, factor

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the zero-shot classifier: a zero residual on the regular base, and nothing recorded about it."""
        self.residual.zero_()
        self.shift = self.class_bias = None
        alpha = self.alpha
        self.facts.clear()
        self.alpha = alpha

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] for image embeddings [N, D]: any length on the text side, raw on the image side.

        Raises:
            ConfigurationError: a logit is NaN or infinite (not checked while torch traces or compiles), or a classifier
                of several labels per picture has a strength other than 1.
        """
        if self.strength != 1.0 and self.several_labels:
            raise ConfigurationError(
                "A classifier of several labels per picture is served as trained, at strength 1: below it, cosines "
                f"without a bias of their own would give every label. It is {self.strength:g}; set it to 1."
            )
        if self.side == "image":
            image_embeds = image_embeds.to(self.residual) + self.strength * self.alpha * self.residual
        weight, scale = self.weight(), self.logit_scale * self.logit_scale_factor**self.strength
        if self.normalize_weight:
            rows = F.normalize(weight, dim=-1)
        else:  # the very arithmetic of F.normalize, so that a zero residual is zero-shot to the last bit
            rows = weight / self.frozen_weight().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        bias = None if self.class_bias is None else self.strength * self.class_bias
        return self._logits(image_embeds, rows, scale, bias)

    @torch.no_grad()
    def fused(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """All of it as one linear classifier, `logits = norm(f + o) @ A.T + b`: A [K, D], b [K] and o [1, D], fp32.

        `o` is the shared row of a residual on the image side; None on the text side. They lie on the CPU.
        """
        frozen, weight = self.frozen_weight().double().cpu(), self.weight().double().cpu()
        lengths = (weight if self.normalize_weight else frozen).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scale = self.logit_scale * self.logit_scale_factor**self.strength
        bias = torch.full((len(weight),), self.logit_bias, dtype=torch.float64)
        if self.class_bias is not None:
            bias += self.strength * self.class_bias.double().cpu()
        offset = self.strength * self.alpha * self.residual.double().cpu() if self.side == "image" else None
        return (scale * weight / lengths).float(), bias.float(), None if offset is None else offset.float()

    def zero_shot_logits(self, image_embeds: Tensor) -> Tensor:
        """Logits [N, K] of the base classifier alone, as if the residual were zero."""
        return self._logits(image_embeds, F.normalize(self.base, dim=-1), self.logit_scale)

    def _logits(self, image_embeds: Tensor, rows: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
        # fp32 throughout: a bf16 tower must not round the classifier.
        images = F.normalize(image_embeds.to(device=rows.device, dtype=rows.dtype), dim=-1)
        logits = scale * images @ rows.T + self.logit_bias
        logits = logits if bias is None else logits + bias
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            check_finite(logits)
        return logits

    def extra_repr(self) -> str:
        classes, dim = self.base.shape
        used = {name: self.facts[name] for name in AS_PUBLISHED if name in self.facts}
        more = "".join(f", {name}={value}" for name, value in used.items())
        return f"classes={classes}, dim={dim}, alpha={self.alpha}, logit_scale={self.logit_scale:.4g}{more}"


def finite(values: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Numbers of a shape, in fp64 on the CPU.

    Raises:
        ConfigurationError: another shape, or not finite.
    """
    try:
        numbers = torch.as_tensor(values).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"`{name}` must be numbers of shape {list(shape)}: {error}.") from error
    finite = bool(torch.isfinite(numbers.float()).all())  # as they will be stored
    if tuple(numbers.shape) != shape or not finite:
        raise ConfigurationError(
            f"`{name}` must be finite numbers of shape {list(shape)}; got shape {list(numbers.shape)}"
            f"{'' if finite else ' with NaN or infinite values'}."
        )
    return numbers


def check_finite(logits: Tensor) -> None:
    """An answer is never NaN."""
    if logits.device.type == "meta" or bool(torch.isfinite(logits.sum())):
        return
    bad = int((~torch.isfinite(logits)).any(dim=-1).sum())
    raise ConfigurationError(
        f"The logits of {bad} of {len(logits)} pictures are NaN or infinite: the pictures, the base model's weights or "
        "the residual hold values that are not finite. Check the pictures with another base, the base with other "
        "pictures (in fp32: dtype=torch.float32), or call classifier.reset()."
    )


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """Mean cross-entropy of logits [N, K] with class ids [N] or probabilities [N, K].

    Args:
        num_items: divide the sum by this instead of N (`num_items_in_batch` of `transformers.Trainer`).

    Raises:
        ConfigurationError: labels of another shape, outside the classes, or no probabilities.
    """
    labels = _checked_labels(labels.to(logits.device), logits)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    total: Tensor = F.cross_entropy(logits, labels, reduction="sum") / num_items
    return total


def multi_label_loss(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """Mean binary cross-entropy of logits [N, K] with labels [N, K], as transformers' `BCEWithLogitsLoss`.

    Args:
        labels: numbers from 0 (does not show the class) to 1 (shows it).
        num_items: divide the sum of each picture's mean by this instead of N.

    Raises:
        ConfigurationError: labels of another shape, or not from 0 to 1.
    """
    labels = labels.to(logits.device)
    if labels.shape != logits.shape:
        raise ConfigurationError(
            f"With several labels per picture (problem_type 'multi_label_classification') labels are floats of shape "
            f"{list(logits.shape)}, 1 for each class that the picture shows; got {labels.dtype} {list(labels.shape)}."
        )
    labels = labels.to(logits.dtype)
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ConfigurationError("Labels of several classes per picture must be from 0 to 1; some are not, or are NaN.")
    if num_items is None:
        return F.binary_cross_entropy_with_logits(logits, labels)
    total: Tensor = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / logits.shape[1] / num_items
    return total


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Class ids [N] or probabilities [N, K] as cross-entropy takes them.

    Raises:
        ConfigurationError: neither.
    """
    rows, classes = logits.shape
    hard = not labels.is_floating_point() and labels.dtype != torch.bool
    if tuple(labels.shape) != ((rows,) if hard else (rows, classes)):
        raise ConfigurationError(
            f"Labels must be {rows} class ids (integers), or probabilities (floats) of shape [{rows}, {classes}]; got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    if labels.device.type != "cpu" or not labels.numel():
        return labels.long() if hard else labels.to(logits.dtype)
    if not hard:
        labels = labels.to(logits.dtype)
        sums = labels.sum(dim=1)
        if not bool(((labels >= 0).all(dim=1) & ((sums - 1).abs() <= 1e-2)).all()):
            raise ConfigurationError(
                "Labels given as floats must be probabilities: 0 or more, and each row with the sum 1. For several "
                "classes per picture make the model with problem_type='multi_label_classification'."
            )
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ConfigurationError(
            f"Labels must be class ids from 0 to {classes - 1}; got {low if low < 0 else high}. "
            "Check that the dataset has the model's classes in the model's order."
        )
    return labels.long()
