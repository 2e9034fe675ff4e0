"""The section of a report that says what the classifier learned: sentences, and pictures where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..analysis.learned import Learned, default_words, learned_classes, named_pair, separated_pairs, separated_rows
from ..errors import BaseModelError, HubError
from .gathering import Measured, Subject

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification

_MOST_CLASSES = 6  # told about in sentences
_MOST_PAIRS = 8
_PICTURES = 4  # beside a class or a pair
Row = dict[str, Any]
Shown = Callable[[Measured, list[int]], list[Row]]


class Learning:
    """What the section shows.

    Args:
        subject: whom the report is about.
        class_names: K names.
        measured: answers to pictures it was not trained on, or None.
        words: to tell it in; None for the default ones, an empty list for none.

    Attributes:
        side: of the residual. rows: every class, the most changed first. directions: whether the base could be loaded.
        words: what it is told in. notes: what a reader must know.
    """

    def __init__(
        self,
        subject: Subject,
        class_names: Sequence[str],
        measured: Measured | None,
        words: Sequence[str] | None = None,
    ) -> None:
        self.side: str = subject.config.get("residual_side", "text")
        self.head = subject.model.classifier if subject.model is not None else None
        self.class_names, self.measured, self.notes = list(class_names), measured, list[str]()
        self.directions = self.head is not None
        self.untrained = self.head is not None and self.head.is_zero_shot
        self.words = [] if self.untrained else default_words() if words is None else list(words)
        if subject.model is not None:
            self.rows: list[Row] = self._learned(subject.model)
        elif self.side == "image":
            self.rows = [{"name": "", "length": subject.lengths[0], "towards": []}]
        else:
            self.rows = [
                {"name": name, "length": one} for name, one in zip(self.class_names, subject.lengths, strict=True)
            ]
            self.rows.sort(key=lambda row: -row["length"])

    def _learned(self, model: TaskResCLIPForImageClassification) -> list[Row]:
        """Told in words where the text tower can be had; with a note where it cannot."""
        pictures: Row = {}
        if self.measured is not None and self.measured.metrics.get("method") != "cross-validation":
            pictures = {"image_embeds": self.measured.image_embeds, "labels": self.measured.labels}
        try:  # pictures of a cross-validation have shaped the rows, and are no witnesses
            return learned_classes(model, self.words, **pictures)
        except (BaseModelError, HubError, OSError) as error:
            self.notes.append(f"What was learned is not told in words, which need the base's text tower: {error}")
            return learned_classes(model, [], **pictures)

    @property
    def told(self) -> bool:
        """Whether it is told in words."""
        return any("words_towards" in row for row in self.rows)

    def classes(self, shown: Shown) -> list[Row]:
        """The most changed classes, each with the pictures that what was added to its row speaks for most."""
        if not self.directions or self.side == "image" or self.untrained:
            return []
        rows = [row for row in self.rows if row["kept"] < 1.0][:_MOST_CLASSES]
        answers = None
        if self.measured is not None and self.measured.image_embeds is not None and self.head is not None:
            answers = Learned(self.head).responses(self.measured.image_embeds)
        found: list[Row] = []
        for row in rows:
            pictures = []
            if answers is not None and self.measured is not None:
                order = answers[:, self.class_names.index(row["name"])].argsort(descending=True, stable=True)
                pictures = shown(self.measured, order[:_PICTURES].tolist())
            found.append({"words_towards": [], "words_away": []} | row | {"pictures": pictures})
        return found

    def pairs(self, shown: Shown) -> tuple[list[Row], list[Row]]:
        """Pairs of classes that training tells apart better, and those that it tells apart worse, with pictures."""
        if (measured := self.measured) is None:
            return [], []
        better = [pair for pair in self._separated if pair["after"] < pair["before"]][:_MOST_PAIRS]
        worse = [pair for pair in self._separated[::-1] if pair["after"] > pair["before"]][:_MOST_PAIRS]

        def told(pair: Row, which: str) -> Row:
            names = tuple(self.class_names[number] for number in pair["classes"])
            return pair | {"names": names, "pictures": shown(measured, pair[which][:_PICTURES])}

        return [told(pair, "mended") for pair in better], [told(pair, "confused") for pair in worse]

    @cached_property
    def _separated(self) -> list[Row]:
        """Every pair that is or was confused; none without answers, or where nothing was learned."""
        if self.measured is None or self.untrained:
            return []
        return separated_pairs(self.measured.logits, self.measured.zero_shot, self.measured.labels)

    def turned_apart(self) -> list[Row]:
        """Without pictures: pairs whose rows were turned apart most."""
        if self.measured is not None or self.head is None or self.side == "image" or self.untrained:
            return []
        return separated_rows(self.head, self.class_names, _MOST_PAIRS)

    def facts(self) -> Row | None:
        """The same for machines, as of `what_it_learned`; None where the base could not be loaded."""
        if not self.directions:
            return None
        if self.measured is None or self.untrained:
            return {"classes": self.rows, "pairs": self.turned_apart()}
        return {"classes": self.rows, "pairs": [named_pair(pair, self.class_names) for pair in self._separated]}
