"""None of these: below which score a picture counts as one of no class, chosen without a picture of anything else.

    score = max_k cos(image, mean_k)        rejected where score < threshold

`mean_k` is the mean direction of the training pictures of class k. The threshold comes from scores of training pictures
by means that were made without them: of n, the floor(rate (n + 1))-th smallest, as in split-conformal prediction
(Papadopoulos et al. 2002; Vovk et al. 2005). Neither depends on the classifier's weights or `strength`.
`docs/none-of-these.md` says what that promises, and how other scores did.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigurationError, FewShotError

Head = Any  # a `residual.TaskResClassifier`
UNKNOWN = "unknown"  # what a picture of no class is called


@dataclass(frozen=True)
class Rejection:
    """When a picture counts as one of no class.

    Attributes:
        rate: share of pictures of the classes that may be rejected, above 0 and below 1.
        threshold: cosine below which a picture is rejected.
        pictures: n, how many held-out scores it was chosen on.
        means: [K, D] fp16 of unit length, see `class_means`.
    """

    rate: float
    threshold: float
    pictures: int
    means: Tensor

    def scores(self, image_embeds: Tensor) -> Tensor:
        """Scores [N] from -1 to 1, fp64 on the CPU, of embeddings [N, D]; a higher one is more like a class."""
        return nearest_mean(image_embeds, self.means)

    def rejects(self, image_embeds: Tensor) -> Tensor:
        """Whether each picture is one of no class, bool [N], from its embedding [N, D], of any length."""
        return self.scores(image_embeds) < self.threshold

    def as_dict(self) -> dict[str, Any]:
        """As it lies in config.json: numbers, and the means as base64 of fp16, row after row."""
        means = base64.b64encode(self.means.numpy().astype("<f2").tobytes()).decode("ascii")
        return {"rate": self.rate, "threshold": self.threshold, "pictures": self.pictures, "means": means}

    @classmethod
    def from_dict(cls, values: dict[str, Any], dim: int) -> Rejection:
        """What `as_dict` gave, for embeddings of D = `dim` numbers."""
        means = torch.frombuffer(bytearray(base64.b64decode(values["means"])), dtype=torch.float16)
        return cls(values["rate"], values["threshold"], values["pictures"], means.reshape(-1, dim))


def class_means(image_embeds: Tensor, labels: Tensor) -> Tensor:
    """Mean direction [K, D] fp16 of the embeddings [N, D] of each class that occurs, each counted with unit length.

    Args:
        labels: [N] class ids.
    """
    images, labels = F.normalize(image_embeds.detach().to("cpu", torch.float64), dim=-1), labels.cpu()
    _, place = torch.unique(labels, return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, images.shape[1], dtype=images.dtype).index_add_(0, place, images)
    return F.normalize(sums, dim=-1).half()


def nearest_mean(image_embeds: Tensor, means: Tensor) -> Tensor:
    """Largest cosine [N], fp64 on the CPU, of embeddings [N, D] of any length to means [K, D] of unit length."""
    images = F.normalize(image_embeds.detach().to("cpu", torch.float64), dim=-1)
    return (images @ means.double().T).max(dim=-1)[0]


def checked_rate(rate: Any) -> float:
    """A rate as a float.

    Raises:
        ConfigurationError: it is not a number above 0 and below 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 < rate < 1.0:
        raise ConfigurationError(
            f"The rate is the share of pictures of the classes that may be rejected, above 0 and below 1, such as "
            f"0.05; got {rate!r}."
        )
    return float(rate)


def check_enough(pictures: int, rate: float) -> int:
    """Which of the smallest held-out scores the threshold is, from 1: floor(rate (n + 1)).

    Args:
        pictures: n, the number of held-out scores.

    Raises:
        FewShotError: n pictures allow no level as fine as the rate.
    """
    place = math.floor(rate * (pictures + 1) * (1.0 + 1e-12))
    if place < 1:
        needed = math.ceil(1.0 / rate * (1.0 - 1e-12)) - 1
        raise FewShotError(
            f"A threshold that rejects at most {100 * rate:g} % needs {needed} training pictures that can be held out "
            f"(of classes with two or more); there are {pictures}. Add pictures, or ask for a rate of "
            f"{math.ceil(1000 / (pictures + 1)) / 1000:g} or more."
        )
    return place


def choose(held_out: Tensor, means: Tensor, rate: float) -> Rejection:
    """The rejection from scores [n] of pictures that took no part in the means they were compared with.

    Args:
        means: [K, D] of all training pictures. rate: see `Rejection`.

    Raises:
        FewShotError: too few pictures for the rate.
    """
    place = check_enough(len(held_out), rate)
    return Rejection(rate, float(held_out.sort()[0][place - 1]), len(held_out), means)


def usable_rejection(head: Head) -> Rejection:
    """The rejection that is stored with a head.

    Raises:
        ConfigurationError: there is none, or pictures may have several labels.
    """
    head.check_one_label("Rejection of pictures of no class")
    stored = head.facts.get("rejection")
    if stored is None:
        raise ConfigurationError(
            "This classifier has no threshold for rejecting pictures: it gives each one of its classes. Choose one "
            "with trainer.choose_rejection(rate=0.05), or train with `taskres train --reject 0.05`."
        )
    return Rejection.from_dict(stored, head.base.shape[1])


@dataclass(frozen=True)
class Rejecting:
    """A head, how pictures of no class are told from its classes, and what they are called."""

    head: Head
    rejection: Rejection
    unknown: str

    def said_of(self, row: dict[str, Any], rejected: bool | None) -> dict[str, Any]:
        """A row with `rejected` in it; the classes of a rejected picture follow the name for none."""
        predictions = row["predictions"]
        if rejected and not row["error"]:
            predictions = [{"label": self.unknown, "score": None}, *predictions][: len(predictions)]
        return {**row, "predictions": predictions, "rejected": None if row["error"] else rejected}


class RejectsPictures:
    """`rejects` of a model whose head may have a threshold."""

    @torch.no_grad()
    def rejects(
        self: Any, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Whether each picture is one of no class, bool [N] on the CPU, by the threshold stored with the classifier.

        Args:
            pixel_values, image_embeds, **kwargs: as in `forward`.

        Raises:
            ConfigurationError: no threshold was chosen, or both or neither input is given, or of another size.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ConfigurationError("Pass either pixel_values or image_embeds; got both or neither.")
        rejection = usable_rejection(self.classifier)
        embeds = self.get_image_features(pixel_values, **kwargs) if image_embeds is None else image_embeds
        if embeds.shape[-1] != rejection.means.shape[1]:
            raise ConfigurationError(
                f"image_embeds must have {rejection.means.shape[1]} columns, the base's projection size; got "
                f"{tuple(embeds.shape)}."
            )
        return rejection.rejects(embeds)

    def rejecting(self: Any, unknown: str = UNKNOWN) -> Rejecting:
        """What `predicting` needs to tell pictures of no class, for the head that serves now.

        Raises:
            ConfigurationError: no threshold was chosen, or `unknown` is no text or one of its classes.
        """
        head = self.classifier
        if not isinstance(unknown, str) or not unknown.strip() or unknown in head.config.class_names:
            raise ConfigurationError(
                f"The label of pictures of no class must be text and no class of the classifier; got {unknown!r:.60}."
            )
        return Rejecting(head, usable_rejection(head), unknown)
