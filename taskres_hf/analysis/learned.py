"""What a classifier learned beyond the text of its classes: which rows changed, towards what, and which pairs it tells.

All of it is about rows as they compete. Only differences between the rows of a classifier decide an answer, so what all
rows share (`text` and `learned` alike) is taken off first; lengths are in units of zero-shot's rows, which are 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_classifier import cached_table_path, make_base_classifier, read_table, write_table
from ..base_model import has_text_tower, load_base_fp32
from ..classes.rows import rows_of
from ..errors import ConfigurationError
from ..residual import TaskResClassifier

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification

WORD_PROMPT = "a photo of something {}."
_SAME = 1e-6  # of a row's length: below it, rounding
Row = dict[str, Any]


def default_words() -> list[str]:
    """Colours, shapes, materials, places and the like: what a picture can be described by, in any task."""
    text = resources.files("taskres_hf.analysis").joinpath("words.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def embed_words(model: TaskResCLIPForImageClassification, words: Sequence[str]) -> Tensor:
    """Text embeddings [W, D] of words in `"a photo of something {}."`; of what has more than six words, as it is.

    They are kept in the cache beside the base classifiers; where they are not there yet, the base's text tower is
    loaded.

    Raises:
        ConfigurationError: no words, or one that is no text. BaseModelError, HubError: the base cannot be loaded.
    """
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ConfigurationError(f"`words` must be texts, at least one, and none empty; got {words!r:.80}.")
    prompts = [[word if len(word.split()) > 6 else WORD_PROMPT.replace("{}", word.strip())] for word in words]
    source = model._base_source
    kept = cached_table_path(source, prompts, "raw") if source is not None and source.name else None
    table = read_table(kept)
    if table is None:
        base = model.clip
        if source is not None and not has_text_tower(base):
            base, *_ = load_base_fp32(source, torch.float32, {})
        table, _ = make_base_classifier(base, source, prompts, "raw", model._tokenizer)
        write_table(kept, table)
    return table


# ---------------------------------------------------------------------- rows


class Learned:
    """A classifier's rows as they compete, before and after training, at full strength.

    Args:
        head: of a model; a residual on the image side is one for all classes and moves none of them.

    Attributes:
        text, rows: zero-shot's rows and the trained ones without what all of them share [K, D] fp64.
        added: the part of each row of `rows` that does not lie along its own text [K, D].
        kept: how much of each trained row still is its text: the squared cosine between the two, from 0 to 1 [K]; 0
            where it points away from its text. 1 for all without training.
        bias: [K].
    """

    def __init__(self, head: TaskResClassifier) -> None:
        head.check_has_text("What a classifier learned")
        unit, found = F.normalize(head.base.cpu().double(), dim=1), rows_of(head)
        self.text, self.rows, self.bias = unit - unit.mean(dim=0), found.weight - found.weight.mean(dim=0), found.bias
        own = F.normalize(self.text, dim=1)
        along = (self.rows * own).sum(dim=1)
        lengths = self.rows.norm(dim=1).clamp_min(1e-12)
        self.added = self.rows - along.unsqueeze(1) * own
        self.added[self.added.norm(dim=1) <= _SAME * lengths] = 0.0
        self.kept = (along / lengths).clamp(0, 1).square()
        self.kept[self.text.norm(dim=1) <= _SAME] = 0.0 if bool(self.added.any()) else 1.0  # a single class
        self.kept[~self.added.any(dim=1)] = 1.0

    def directions(self) -> Tensor:
        """`added` at unit length [K, D]; zeros where nothing was added."""
        return F.normalize(self.added, dim=1)

    def responses(self, image_embeds: Tensor) -> Tensor:
        """How much what was added to each class speaks for each picture [N, K]: cosines, without their mean."""
        images = F.normalize(image_embeds.detach().cpu().double(), dim=1)
        answers = images @ self.directions().T
        return answers - answers.mean(dim=0)


def class_changes(head: TaskResClassifier, class_names: Sequence[str], nearest: int = 3) -> list[Row]:
    """How each class's row changed against its text, the most changed first.

    Returns:
        `name`; `kept`, see `Learned`; `length`: |w_k - t_k| / |t_k|, and `turn`: degrees between t_k and w_k, both of
        the rows as they are stored; `before`, `after`: names of the classes whose text is nearest to t_k and to w_k
        by the cosine; `towards`, `away`: (name, cosine) of the other classes whose text lies most along what was
        added to the row and most against it; `bias`: the class's, or None.
        Of a residual on the image side only `name` (empty), `length` of alpha times the residual, and `towards`, in a
        single row.
    """
    names, texts = list(class_names), F.normalize(head.base.cpu().double(), dim=1)
    if head.side == "image":
        own = F.normalize(texts - texts.mean(dim=0), dim=1)
        shared = head.strength * head.alpha * head.residual[0].detach().cpu().double()
        return [
            {"name": "", "length": float(shared.norm()), "towards": _along(own @ F.normalize(shared, dim=0), names)}
        ]
    learned = Learned(head)
    base, weight = head.base.cpu().double(), head.weight().detach().cpu().double()
    was, now = texts @ texts.T, F.normalize(weight, dim=1) @ texts.T
    lengths = (weight - base).norm(dim=1) / base.norm(dim=1).clamp_min(1e-12)
    turns = now.diagonal().clamp(-1, 1).arccos().rad2deg()
    along = learned.directions() @ F.normalize(learned.text, dim=1).T
    rows = []
    for k, name in enumerate(names):
        others = [j for j in range(len(names)) if j != k]
        rest = [names[j] for j in others]
        rows.append({
            "name": name, "kept": float(learned.kept[k]), "length": float(lengths[k]), "turn": float(turns[k]),
            "before": [rest[j] for j in was[k, others].argsort(descending=True)[:nearest].tolist()],
            "after": [rest[j] for j in now[k, others].argsort(descending=True)[:nearest].tolist()],
            "towards": _along(along[k, others], rest, nearest), "away": _along(-along[k, others], rest, nearest),
            "bias": None if head.class_bias is None else float(head.strength * head.class_bias[k]),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["kept"], -row["length"]))


def _along(values: Tensor, names: Sequence[str], nearest: int = 3) -> list[tuple[str, float]]:
    """The names with the largest values above rounding, each with its value."""
    order = values.argsort(descending=True)[:nearest].tolist()
    return [(names[k], float(values[k])) for k in order if values[k] > _SAME]


def changed_words(
    head: TaskResClassifier,
    class_names: Sequence[str],
    words: Sequence[str],
    embeds: Tensor,
    most: int = 3,
    image_embeds: Tensor | None = None,
    labels: Tensor | None = None,
) -> dict[str, Row]:
    """In which words what was added to each class can be told.

    A word counts by the cosine of its text, without the mean of all words, with what was added to the class's row,
    in standard deviations over all words; it has to stand out by two. With labelled pictures a word is said only if
    they agree: those of the class lie nearer to it than those of the other classes do (farther, for what it moved away
    from). Chance alone lets one word in forty stand out, and half of those pass.

    Args:
        head: on the text side. words, embeds: W texts and `embed_words` of them [W, D].
        most: words of each kind a class.
        image_embeds, labels: pictures [N, D] and class ids [N], best those that it was not trained on.

    Returns:
        By class name: `towards` and `away`, lists of (word, standard deviations).
    """
    learned = Learned(head)
    scores = word_scores(learned.directions(), embeds)
    if image_embeds is not None and labels is not None:
        agree = word_scores(picture_directions(image_embeds, labels, len(learned.rows)), embeds)
    else:
        agree = scores
    found = {}
    for k, name in enumerate(class_names):
        row: Row = {}
        for side, sign in (("towards", 1), ("away", -1)):
            own = sign * scores[k]
            own[(own < 2.0) | (sign * agree[k] <= 0)] = 0.0
            row[side] = [(words[j], float(own[j])) for j in own.argsort(descending=True)[:most].tolist() if own[j] > 0]
        found[name] = row
    return found


def word_scores(directions: Tensor, embeds: Tensor) -> Tensor:
    """Cosines of directions [K, D] with words [W, D] without their mean, in standard deviations over words [K, W]."""
    texts = F.normalize(embeds.cpu().double(), dim=1)
    cosines = F.normalize(directions, dim=1) @ F.normalize(texts - texts.mean(dim=0), dim=1).T
    spread = cosines.std(dim=1, keepdim=True, correction=0).clamp_min(1e-12)
    return (cosines - cosines.mean(dim=1, keepdim=True)) / spread


def picture_directions(image_embeds: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """From the mean of the other classes' pictures to that of each class's [K, D]; zeros for a class without any."""
    images = F.normalize(image_embeds.detach().cpu().double(), dim=1)
    means = torch.zeros(num_classes, images.shape[1], dtype=torch.float64).index_add_(0, labels.cpu(), images)
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double().unsqueeze(1)
    there = counts.flatten() > 0
    means = means / counts.clamp_min(1)
    total = means[there].sum(dim=0)
    others = (total - means) / max(int(there.sum()) - 1, 1)
    directions = means - others
    directions[~there] = 0.0
    return directions


# ---------------------------------------------------------------------- pairs


def separated_rows(head: TaskResClassifier, class_names: Sequence[str], most: int = 10) -> list[Row]:
    """Pairs of classes whose rows training turned apart, by the rows alone, the farthest first.

    Returns:
        `classes`: two names; `before`, `after`: the cosine between their rows, without what all rows share.
    """
    learned = Learned(head)
    was, now = (F.normalize(rows, dim=1) for rows in (learned.text, learned.rows))
    gaps = (was @ was.T - now @ now.T).triu(diagonal=1)
    rows = []
    for place in gaps.flatten().argsort(descending=True)[:most].tolist():
        a, b = divmod(place, len(class_names))
        if a < b and gaps[a, b] > _SAME:
            pair = {"classes": (class_names[a], class_names[b])}
            rows.append({**pair, "before": float(was[a] @ was[b]), "after": float(now[a] @ now[b])})
    return rows


def separated_pairs(logits: Tensor, zero_shot: Tensor, labels: Tensor) -> list[Row]:
    """Pairs of classes by how many pictures are taken for the other one, before and after training.

    Args:
        logits, zero_shot: [N, K] of the trained and of the zero-shot classifier. labels: class ids [N].

    Returns:
        Of every pair that was or is confused: `classes`: two class ids; `before`, `after`: how many pictures of either
        are taken for the other; `mended`: rows of pictures of either which zero-shot took for the other and
        training gets right; `confused`: rows of those taken for the other one now. Where most was gained, first.
    """
    before, after = zero_shot.argmax(dim=1), logits.argmax(dim=1)
    found: dict[tuple[int, int], Row] = {}

    def row_of(label: int, other: int) -> Row:
        pair = (min(label, other), max(label, other))
        return found.setdefault(pair, {"classes": pair, "before": 0, "after": 0, "mended": [], "confused": []})

    for row, (label, was, now) in enumerate(zip(labels.tolist(), before.tolist(), after.tolist(), strict=True)):
        if was != label:
            row_of(label, was)["before"] += 1
            if now == label:
                row_of(label, was)["mended"].append(row)
        if now != label:
            row_of(label, now)["after"] += 1
            row_of(label, now)["confused"].append(row)
    return sorted(found.values(), key=lambda row: (row["after"] - row["before"], row["classes"]))


def what_it_learned(
    model: TaskResCLIPForImageClassification,
    words: Sequence[str] | None = None,
    *,
    image_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    nearest: int = 3,
) -> dict[str, Any]:
    """What a classifier learned beyond the text of its classes, for machines; the report shows it to people.

    Args:
        model: trained, with one label per picture.
        words: to tell it in; by default `default_words()`. An empty list asks for none.
        image_embeds, labels: pictures [N, D] that it was not trained on, and their class ids [N].
        nearest: most entries of each list.

    Returns:
        `classes`: rows of `class_changes`, with `words_towards` and `words_away` where words were asked for;
        `pairs`: with pictures, rows of `separated_pairs` by class names, `mended` as a number; else rows of
        `separated_rows`.

    Raises:
        ConfigurationError: several labels per picture. BaseModelError, HubError: the text tower cannot be loaded.
    """
    head, names = model.classifier, model.class_names
    rows = learned_classes(model, words, image_embeds=image_embeds, labels=labels, nearest=nearest)
    if head.side == "image":
        return {"classes": rows, "pairs": []}
    if image_embeds is None or labels is None:
        return {"classes": rows, "pairs": separated_rows(head, names)}
    with torch.no_grad():
        pairs = separated_pairs(head(image_embeds), head.zero_shot_logits(image_embeds), labels)
    return {"classes": rows, "pairs": [named_pair(pair, names) for pair in pairs]}


def learned_classes(
    model: TaskResCLIPForImageClassification,
    words: Sequence[str] | None = None,
    *,
    image_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    nearest: int = 3,
) -> list[Row]:
    """The `classes` of `what_it_learned`."""
    head, names = model.classifier, model.class_names
    head.check_one_label("What a classifier learned")
    rows = class_changes(head, names, nearest)
    words = default_words() if words is None else list(words)
    if words and head.side == "text":
        told = changed_words(head, names, words, embed_words(model, words), nearest, image_embeds, labels)
        for row in rows:
            row |= {f"words_{side}": entries for side, entries in told[row["name"]].items()}
    return rows


def named_pair(pair: Mapping[str, Any], class_names: Sequence[str]) -> Row:
    """A row of `separated_pairs` with names, and numbers of pictures in place of the pictures."""
    a, b = pair["classes"]
    return {
        "classes": (class_names[a], class_names[b]), "before": pair["before"], "after": pair["after"],
        "mended": len(pair["mended"]),
    }  # fmt: skip
