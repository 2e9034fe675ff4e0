"""Many linear classifiers as the rows of one matrix: a picture's embedding meets all of them in one product.

    logits of all = norm(f) @ A.T + b      A [sum K, D], b [sum K]: what `TaskResClassifier.fused` gives, stacked

What was made is never changed: rows of another version go behind those that are there, and a `PoolView` knows which are
its own. So who holds a view gets answers of one version of each classifier, whatever is exchanged meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..rejection import Rejection
from ..residual import TaskResClassifier, label_threshold
from ..storage import digest_of
from ..tables import visible

_ROOM = 1.5  # a matrix that is full is followed by one so much larger
_MOST_WASTE = 0.25  # share of rows that nothing names any more, from which on the others are put together anew
_ALL = 0.5  # share of rows asked for, from which on multiplying all costs less than copying those


@dataclass(frozen=True)
class PooledClassifier:
    """What a pool keeps of a classifier beside its rows.

    Attributes:
        class_names: in label order. several_labels: whether a picture may have several, or none.
        threshold: the score from which on one of several labels is given.
        rejection: below which score a picture is one of no class; None where none was chosen.
        offset: [1, D], added to embeddings (a residual on the image side), or None.
        checksum: of the artifact's tensors, which tells versions apart; None of a model that was not loaded from one.
        about: `base_model`, `base_revision`, `recipe`, `shots` and `strength`, as far as they were recorded.
        start, stop: its rows.
    """

    class_names: tuple[str, ...]
    several_labels: bool
    threshold: float
    rejection: Rejection | None
    offset: Tensor | None
    checksum: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int = 0


def folded(head: TaskResClassifier) -> tuple[Tensor, Tensor, PooledClassifier]:
    """A head as it is now: rows [K, D], bias [K], and what else there is to it.

    Raises:
        ConfigurationError: it gives several labels per picture, and is not trained or has a strength other than 1; or
            its rows are not finite.
    """
    if head.several_labels and head.strength != 1.0:
        raise ConfigurationError(
            "A classifier of several labels per picture is served as trained, at strength 1; it is "
            f"{head.strength:g}. Set it to 1."
        )
    head.check_can_say_no()
    rows, bias, offset = head.fused()
    if not bool(torch.isfinite(rows).all()) or not bool(torch.isfinite(bias).all()):
        raise ConfigurationError("The rows of the classifier are NaN or infinite: its residual is damaged.")
    return rows, bias, entry_of(head, offset)


def entry_of(head: TaskResClassifier, offset: Tensor | None = None) -> PooledClassifier:
    """What is known of a head beside its rows, as it is now."""
    config, facts = head.config, head.facts
    stored, training = facts.get("rejection"), facts.get("training") or {}
    return PooledClassifier(
        class_names=tuple(config.class_names),
        several_labels=head.several_labels,
        threshold=label_threshold(facts),
        rejection=None if stored is None else Rejection.from_dict(stored, head.base.shape[1]),
        offset=offset,
        checksum=getattr(config, "residual_sha256", None),
        about={
            "base_model": str(config.base_model_name_or_path or ""),
            "base_revision": config.base_model_revision,
            "recipe": training.get("recipe") or training.get("method"),
            "shots": (facts.get("few_shot") or {}).get("shots"),
            "strength": float(head.strength),
        },
    )


class PoolView(Mapping[str, PooledClassifier]):
    """The classifiers of a pool at one moment, by name. Nothing changes in it, so threads may share it.

    Attributes:
        weight: [R, D] fp32 and `bias` [R]: rows of all of them, and of some that are no longer there.
    """

    def __init__(self, weight: Tensor, bias: Tensor, classifiers: Mapping[str, PooledClassifier]) -> None:
        self.weight, self.bias, self._classifiers = weight, bias, classifiers

    def __iter__(self) -> Iterator[str]:
        return iter(self._classifiers)

    def __len__(self) -> int:
        return len(self._classifiers)

    def __getitem__(self, name: str) -> PooledClassifier:
        """What is known of a classifier.

        Raises:
            KeyError: there is none of that name.
        """
        return self._classifiers[name]

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._classifiers)

    def find(self, name: str) -> PooledClassifier:
        """A classifier.

        Raises:
            ConfigurationError: there is none of that name; says which there are.
        """
        if name not in self._classifiers:
            known = ", ".join(self.names[:20]) + (", ..." if len(self) > 20 else "")
            raise ConfigurationError(
                f"There is no classifier {visible(str(name)[:100])!r} in the pool. "
                + (f"There are: {known}." if known else "It is empty: add(name, folder).")
            )
        return self._classifiers[name]

    def chosen(self, names: Sequence[str] | None) -> dict[str, PooledClassifier]:
        """Classifiers by name; None for all.

        Raises:
            ConfigurationError: there is none of a name.
        """
        if isinstance(names, str):
            raise ConfigurationError(f"`names` must be a list of names; got the text {visible(names[:100])!r}.")
        return {name: self.find(name) for name in (self._classifiers if names is None else names)}

    @torch.no_grad()
    def logits(self, image_embeds: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every picture by every classifier: logits [N, K] by name, fp32, each those of its own model.

        Args:
            image_embeds: [N, D] from the base, normalised or not. names: some of the classifiers; all by default.

        Raises:
            ConfigurationError: no such classifier, or embeddings of another size or not finite.
        """
        chosen, embeds = self.chosen(names), self._checked(image_embeds)
        if not chosen:
            return {}
        images = F.normalize(embeds, dim=-1)
        wanted = sum(one.stop - one.start for one in chosen.values())
        if len(chosen) == 1 or wanted < _ALL * len(self.weight):
            parts = [slice(one.start, one.stop) for one in chosen.values()]
            weight, bias = ([rows[part] for part in parts] for rows in (self.weight, self.bias))
            whole = torch.addmm(_joined(bias), images, _joined(weight).T)
            found = dict(zip(chosen, whole.split([len(part) for part in weight], dim=1), strict=True))
        else:
            whole = torch.addmm(self.bias, images, self.weight.T)
            found = {name: whole[:, one.start : one.stop] for name, one in chosen.items()}
        for name, one in chosen.items():
            if one.offset is not None:
                found[name] = self._apart(one, embeds)
        return found

    @torch.no_grad()
    def logits_of_each(self, image_embeds: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Every picture by its own classifier: N tensors of logits [K].

        Args:
            image_embeds: [N, D]. names: N names, of which several may be the same.

        Raises:
            ConfigurationError: as in `logits`, or another number of names than of pictures.
        """
        chosen, embeds = self.chosen(names), self._checked(image_embeds)
        if len(names) != len(embeds):
            raise ConfigurationError(f"Give a name for each picture: got {len(names)} for {len(embeds)}.")
        images, places = F.normalize(embeds, dim=-1), _places(names)
        found: list[Tensor] = [images] * len(images)
        for name, one in chosen.items():  # views of the matrix: gathering its rows for one product takes longer
            own = places[name]
            if one.offset is None:
                weight, bias = self.weight[one.start : one.stop], self.bias[one.start : one.stop]
                logits = torch.addmm(bias, images[own] if len(own) < len(images) else images, weight.T)
            else:
                logits = self._apart(one, embeds[own])
            for place, row in zip(own, logits.unbind(), strict=True):
                found[place] = row
        return found

    def predictions(self, name: str, logits: Tensor, top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """Labels and scores of each picture, the likeliest first, as `pipeline` gives them.

        Args:
            logits: [N, K] of that classifier.
            top_k: how many, at most K; by default one or, of several labels per picture, each whose score is at least
                the classifier's threshold.
        """
        one = self.find(name)
        shares = logits.sigmoid() if one.several_labels or len(one.class_names) == 1 else logits.softmax(dim=-1)
        every = one.several_labels and top_k is None
        count = len(one.class_names) if every else min(top_k or 1, len(one.class_names))
        values, labels = (found.tolist() for found in shares.cpu().topk(count, dim=-1))
        least = one.threshold if every else -1.0
        return [
            [{"label": one.class_names[label], "score": score} for label, score in pairs if score >= least]
            for pairs in (zip(*row, strict=True) for row in zip(labels, values, strict=True))
        ]

    def rejects(self, image_embeds: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Whether each picture is one of no class, bool [N] by name, as `rejects` of each model; on the CPU.

        Args:
            image_embeds: [N, D]. names: by default all that have a threshold.

        Raises:
            ConfigurationError: as in `logits`, or a classifier that was named has no threshold.
        """
        chosen, embeds = self.chosen(names), self._checked(image_embeds)
        lacking = [name for name, one in chosen.items() if one.rejection is None or one.several_labels]
        if names is not None and lacking:
            raise ConfigurationError(
                f"The classifier {lacking[0]!r} has no threshold for rejecting pictures: choose one with "
                "trainer.choose_rejection(rate=0.05), save it and add it again."
            )
        kept = {name: one.rejection for name, one in chosen.items() if name not in lacking}
        return {name: rejection.rejects(embeds) for name, rejection in kept.items() if rejection is not None}

    def digest(self, names: Sequence[str] | None = None) -> str:
        """What tells these classifiers from others: names, classes, rows, thresholds.

        Raises:
            ConfigurationError: there is none of a name.
        """
        parts: list[bytes] = []
        for name, one in self.chosen(names).items():
            parts.append(json.dumps([name, one.class_names, one.several_labels, one.threshold]).encode())
            numbers = [self.weight[one.start : one.stop], self.bias[one.start : one.stop], one.offset]
            parts += [tensor.cpu().numpy().tobytes() for tensor in numbers if tensor is not None]
        return digest_of(parts)

    def _apart(self, one: PooledClassifier, embeds: Tensor) -> Tensor:
        """Logits of a residual on the image side, which other embeddings meet than the rest."""
        assert one.offset is not None
        images = F.normalize(embeds + one.offset.to(embeds.device), dim=-1)
        return torch.addmm(self.bias[one.start : one.stop], images, self.weight[one.start : one.stop].T)

    def _checked(self, image_embeds: Tensor) -> Tensor:
        dim = self.weight.shape[1]
        if image_embeds.ndim != 2 or (len(self) and image_embeds.shape[1] != dim):
            raise ConfigurationError(
                f"image_embeds must be [N, {dim}], the base's projection size; got {tuple(image_embeds.shape)}."
            )
        embeds = image_embeds.detach().to(device=self.weight.device, dtype=torch.float32)
        if not bool(torch.isfinite(embeds.sum())) and not bool((finite := torch.isfinite(embeds).all(dim=1)).all()):
            raise ConfigurationError(
                f"{int((~finite).sum())} of {len(embeds)} embeddings hold NaN or infinite values: check the pictures "
                "with another base, or the base with other pictures."
            )
        return embeds


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each name stands."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


class Stack:
    """The matrix that views look at; one thread at a time changes it.

    Args:
        dim: D. device: where the rows lie.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._weight = torch.empty(0, dim, device=device)
        self._bias = torch.empty(0, device=device)
        self.view = PoolView(self._weight, self._bias, {})

    @torch.no_grad()
    def change(self, new: Mapping[str, tuple[Tensor, Tensor, PooledClassifier]], gone: Sequence[str] = ()) -> None:
        """Put classifiers in, or in the place of others, and take some out; the view that shows it comes at once."""
        kept = {name: one for name, one in self.view.items() if name not in gone}
        staying = {name: one for name, one in kept.items() if name not in new}
        used, fresh = len(self.view.weight), sum(len(rows) for rows, _, _ in new.values())
        living = sum(one.stop - one.start for one in staying.values())
        if used + fresh > len(self._weight) or used - living > _MOST_WASTE * (used + fresh):
            staying, used = self._moved(staying, living, fresh), living
            kept = {name: staying.get(name, one) for name, one in kept.items()}
        for name, (rows, bias, one) in new.items():
            stop = used + len(rows)
            self._weight[used:stop], self._bias[used:stop] = rows, bias
            kept[name] = _at(one, used, stop)
            used = stop
        self.view = PoolView(self._weight[:used], self._bias[:used], kept)

    def _moved(self, staying: Mapping[str, PooledClassifier], living: int, fresh: int) -> dict[str, PooledClassifier]:
        """Copy what stays to the beginning of another matrix; views of the old one keep it alive."""
        total = living + fresh
        room = total if not living else max(total, int(_ROOM * living))
        weight, bias = self._weight.new_empty(room, self._weight.shape[1]), self._bias.new_empty(room)
        moved, start = {}, 0
        for name, one in staying.items():
            stop = start + one.stop - one.start
            weight[start:stop] = self._weight[one.start : one.stop]
            bias[start:stop] = self._bias[one.start : one.stop]
            moved[name] = _at(one, start, stop)
            start = stop
        self._weight, self._bias = weight, bias
        return moved


def _at(one: PooledClassifier, start: int, stop: int) -> PooledClassifier:
    return replace(one, start=start, stop=stop)
