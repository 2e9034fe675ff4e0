"""Measuring a classifier on pictures that it was not trained on: held out, or by stratified cross-validation.

Which pictures a residual was trained on is remembered in its config by their content.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from ..data import LabelledImages, duplicates, folds_of_pictures, shorten
from ..embedding.features import ImageFeatures, content_digest
from ..errors import ConfigurationError, DataError
from ..evaluation import (
    accuracy,
    compare_multi_label,
    compare_with_zero_shot,
    metrics_from_logits,
    multi_label_metrics,
)
from ..rejection import Rejection, check_enough, choose, class_means, nearest_mean, usable_rejection
from ..residual import TaskResClassifier, label_threshold

Name = Callable[[int], str]  # a picture's position to what a person calls it

_BYTES = 5  # of each SHA-256: two different pictures among a million share them once in 10^6 cases
_MOST = 20_000  # pictures named, 133 kB in the config


def remember(digests: Sequence[str]) -> dict[str, Any]:
    """The training pictures for `config.data["train_pictures"]`.

    Args:
        digests: N SHA-256 digests in hexadecimal.

    Returns:
        `count`, the number of different pictures, and `sha256_prefixes`: the first five bytes of each digest, sorted,
        in base64. Of more than 20,000 pictures only those with the smallest digests are named.
    """
    prefixes = sorted({bytes.fromhex(digest)[:_BYTES] for digest in digests})
    return {"count": len(prefixes), "sha256_prefixes": base64.b64encode(b"".join(prefixes[:_MOST])).decode("ascii")}


def remember_together(provenances: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """`config.data` of a classifier that comes from several trainings, or from pictures added later.

    Args:
        provenances: their `config.data`; None where nothing was recorded.
    """
    known = [dict(one) for one in provenances if one]
    if len(known) < 2:
        return known[0] if known else None
    digests = sorted({str(one["train_digest"]) for one in known if one.get("train_digest")})
    data: dict[str, Any] = {"train_images": sum(int(one.get("train_images") or 0) for one in known)}
    if digests:
        data["train_digest"] = (
            digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        )
    stored = [one["train_pictures"] for one in known if isinstance(one.get("train_pictures"), Mapping)]
    packed = [base64.b64decode(str(one.get("sha256_prefixes", ""))) for one in stored]
    prefixes = sorted({part[start : start + _BYTES] for part in packed for start in range(0, len(part), _BYTES)})
    data["train_images"] -= sum(len(part) // _BYTES for part in packed) - len(prefixes)  # counted in each
    unnamed = sum(
        max(0, int(one.get("count", 0)) - len(part) // _BYTES) for one, part in zip(stored, packed, strict=True)
    )
    if stored:
        named = base64.b64encode(b"".join(prefixes[:_MOST])).decode("ascii")
        data["train_pictures"] = {"count": len(prefixes) + unnamed, "sha256_prefixes": named}
    return data


def goes_on_from(config: Any, head: TaskResClassifier, recipe: str, digest: str) -> dict[str, Any] | None:
    """What was recorded of an earlier training on other pictures that a run by epochs goes on from; else None.

    Recipe `auto`, and epochs after `auto`, start from zero-shot: a warning says that earlier pictures are forgotten.

    Args:
        config, head: of the model. recipe: of the run. digest: of its pictures.
    """
    earlier, data = config.training, config.data or {}
    if not earlier or head.is_zero_shot or data.get("train_digest") in (None, digest):
        return None
    if recipe == "auto" or earlier.get("recipe") == "auto":
        alone = head.several_labels or _noun(config) == "texts"  # what cannot be merged
        warnings.warn(
            f"This classifier was trained before, on {data.get('train_images', 'other')} {_noun(config)}. "
            f"{'Recipe auto fits' if recipe == 'auto' else 'What recipe auto fitted is not gone on from: this trains'} "
            f"from zero-shot, so those are forgotten. Give old and new {_noun(config)} together"
            f"{'.' if alone else ', or bring both classifiers together afterwards (taskres merge).'}",
            stacklevel=3,
        )
        return None
    return {"training": dict(earlier), "data": dict(data), "few_shot": dict(config.few_shot or {})}


def _noun(config: Any) -> str:
    return "pictures" if getattr(config, "text_encoding", None) is None else "texts"


def remember_start(config: Any, before: Mapping[str, Any]) -> None:
    """Record, after a run's own facts, what it went on from: measurements leave out the pictures of both."""
    earlier, data = before["training"], before["data"]
    start = {"recipe": earlier.get("recipe") or earlier.get("method"), "train_images": data.get("train_images")}
    more = {"changes": earlier["changes"]} if earlier.get("changes") else {}
    config.training = {**(config.training or {}), "continued_from": start, **more}
    own = config.data or {}
    both = remember_together([data, own]) or {}
    config.data = {**own, **{key: both[key] for key in ("train_images", "train_pictures") if key in both}}


def known_rows(data: ImageFeatures, provenance: Mapping[str, Any] | None) -> tuple[list[int], bool]:
    """Positions of pictures that the residual was trained on, and whether those are all.

    Args:
        data: N pictures. provenance: `config.data` of the classifier.

    Returns:
        The positions; False where the training pictures were too many to name each.
    """
    if (provenance or {}).get("train_digest") == data.digest:
        return list(range(len(data))), True
    return known_digests(data.digests, provenance)


def known_digests(digests: Sequence[str], provenance: Mapping[str, Any] | None) -> tuple[list[int], bool]:
    """As `known_rows`, of N SHA-256 digests in hexadecimal; none is known where there are none."""
    stored = (provenance or {}).get("train_pictures")
    if not isinstance(stored, Mapping) or not digests:
        return [], True
    packed = base64.b64decode(str(stored.get("sha256_prefixes", "")))
    known = {packed[start : start + _BYTES] for start in range(0, len(packed), _BYTES)}
    rows = [row for row, digest in enumerate(digests) if bytes.fromhex(digest)[:_BYTES] in known]
    return rows, len(known) >= int(stored.get("count", 0))


def picture_names(images: LabelledImages | None) -> Name:
    """What to call each picture in a message: its file, else its row."""

    def name(position: int) -> str:
        if images is None:
            return f"row {position}"
        cell = images.source(position)
        if images.noun != "picture":
            return str(cell)
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return str(path) if isinstance(path, str) and path else f"row {images.indices[position]}"

    return name


def warn_of_conflicts(data: ImageFeatures, name: Name) -> int:
    """Name pictures that are there under several labels; their number."""
    labels, called = data.labels.tolist(), data.class_names
    if data.labels.ndim == 2:  # each set of labels is one answer
        rows = [tuple(row) for row in labels]
        sets = list(dict.fromkeys(rows))
        labels = [sets.index(row) for row in rows]
        called = [" + ".join(c for c, x in zip(data.class_names, row, strict=True) if x) or "nothing" for row in sets]
    groups = duplicates(data.digests, labels).conflicting if data.digests else []
    if groups:
        listed = shorten(" and ".join(f"{name(row)} as {called[labels[row]]!r}" for row in group) for group in groups)
        warnings.warn(
            f"{len(groups)} {data.noun}s are there under more than one label: {listed}. Decide what each is, or leave "
            "it out; with both labels it only blurs the classes.",
            stacklevel=5,
        )
    return len(groups)


Metrics = dict[str, Any]
ComputeMetrics = Callable[[EvalPrediction], Metrics]


class OnlyTrainingPicturesError(DataError):
    """Nothing is left to measure on without the pictures that the residual was trained on."""


@torch.no_grad()
def both_logits(head: TaskResClassifier, data: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Logits [N, K] of the trained and of the zero-shot classifier, on the CPU."""
    embeds = data.image_embeds[0]
    return head(embeds).cpu(), head.zero_shot_logits(embeds).cpu()


def full_metrics(
    logits: Tensor,
    zero_shot: Tensor,
    labels: Tensor,
    class_names: list[str],
    compute: ComputeMetrics | None,
    threshold: float | Tensor = 0.5,
) -> Metrics:
    """`compare_with_zero_shot`, or `compare_multi_label` of labels [N, K], and what the user's function computes."""
    if labels.ndim == 2:
        found = compare_multi_label(logits, zero_shot, labels, class_names, threshold)
        return _computed(logits, labels, compute) | found
    return _computed(logits, labels, compute) | compare_with_zero_shot(logits, zero_shot, labels, class_names)


def epoch_metrics(head: TaskResClassifier, data: ImageFeatures, compute: ComputeMetrics | None) -> Metrics:
    """What an epoch logs, with the prefix `eval_`: metrics of the trained classifier alone."""
    logits, _ = both_logits(head, data)
    return prefixed(own_metrics(logits, data.labels, compute, label_threshold(head.facts)))


def own_metrics(logits: Tensor, labels: Tensor, compute: ComputeMetrics | None, threshold: float = 0.5) -> Metrics:
    """Metrics of one classifier, with what the user's function computes."""
    if labels.ndim == 2:
        return _computed(logits, labels, compute) | multi_label_metrics(logits, labels, threshold=threshold)
    return _computed(logits, labels, compute) | metrics_from_logits(logits, labels)


def _computed(logits: Tensor, labels: Tensor, compute: ComputeMetrics | None) -> Metrics:
    """What the user's function adds, as JSON can hold it; names of ours keep our meaning."""
    if compute is None:
        return {}
    found = compute(EvalPrediction(logits.numpy(), labels.numpy()))
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"compute_metrics must return a dict of numbers; got {type(found).__name__}.")
    plain: Metrics = denumpify_detensorize(dict(found))
    return plain


def prefixed(metrics: Metrics, prefix: str = "eval") -> Metrics:
    """Metrics under the names that callbacks of transformers expect."""
    return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in metrics.items()}


def without_training_pictures(provenance: Mapping[str, Any] | None, data: ImageFeatures, name: Name) -> ImageFeatures:
    """The pictures that the residual was not trained on; leaving some out is said in a warning that names them.

    Args:
        provenance: `config.data` of the classifier. name: what to call a picture by its row.

    Raises:
        OnlyTrainingPicturesError: none is left, or of too many training pictures not all can be told.
    """
    rows, complete = known_rows(data, provenance)
    if not rows:
        return data
    listed = shorten(map(name, rows[:6]), 5) if len(rows) < 6 else f"{shorten(map(name, rows[:5]))} and so on"
    what = f"{len(rows)} of {len(data)} {data.noun}s are ones that this classifier was trained on ({listed})"
    ask = "To measure on them all the same: evaluate(include_train_pictures=True), or --include-train-pictures."
    if len(rows) == len(data) or not complete:
        reason = "" if complete else f", and of so many training {data.noun}s not all can be told"
        raise OnlyTrainingPicturesError(
            f"{what}{reason}: accuracy on them says nothing about others. Measure on {data.noun}s that were held out, "
            f"or by cross-validation (TaskResTrainer.cross_validate). {ask}"
        )
    warnings.warn(f"{what}; they are left out. {ask}", stacklevel=5)
    known = set(rows)
    return data.select([row for row in range(len(data)) if row not in known])


def unseen_pictures(provenance: Mapping[str, Any] | None, images: LabelledImages) -> LabelledImages:
    """Those of N pictures that the residual was not trained on, before any is embedded; warns where some are left out.

    Args:
        provenance: `config.data` of the classifier.

    Raises:
        OnlyTrainingPicturesError: none is left, or of too many training pictures not all can be told.
    """
    count, digests = len(images), tuple(map(images.digest, range(len(images))))
    rows = torch.arange(count, dtype=torch.float64).view(1, count, 1)
    labels = torch.tensor(images.labels)
    data = ImageFeatures(rows, labels, images.class_names, content_digest(images), (), digests)
    unseen = without_training_pictures(provenance, data, picture_names(images))
    return images.select(unseen.image_embeds.flatten().long().tolist())


def split_name(dataset: Any) -> str | None:
    """The split's name that came with the data."""
    split = getattr(dataset, "split", None)
    return str(split) if split else None


_ALWAYS_TRAINS = -1


def fold_of_each_picture(
    labels: Sequence[Any], digests: Sequence[str], folds: int, seed: int, noun: str = "picture"
) -> list[int]:
    """The fold in which each picture is tested, from 0; -1 for pictures that only ever train.

    Classes are spread evenly (scikit-learn's `StratifiedKFold`). Equal pictures are in the same fold, whatever their
    labels. A class with one picture cannot be tested: without it nothing would be known of the class.

    Args:
        labels: N class ids, or N lists of K numbers where pictures have several labels (`data.stratified`).
        digests: N digests of the pictures, or none where they are not known.
        noun: what a message calls one of them.

    Raises:
        DataError: no class has two different pictures.
    """
    from sklearn.model_selection import StratifiedKFold

    keys = list(digests) if digests else [str(row) for row in range(len(labels))]
    if any(isinstance(label, list) for label in labels):
        return folds_of_pictures(labels, keys, folds, seed)
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    counts = Counter(labels[row] for row in first.values())
    tested = [row for row in first.values() if counts[labels[row]] > 1]
    if not tested:
        raise DataError(
            f"No class has two different {noun}s, so nothing can be measured honestly by cross-validation: "
            "the only one of a class is needed to train it. Add some, or measure on a held-out split."
        )
    truth = [labels[row] for row in tested]
    splitter = StratifiedKFold(min(folds, max(Counter(truth).values())), shuffle=True, random_state=seed)
    fold_of_key: dict[str, int] = {}
    with warnings.catch_warnings():
        # Classes with fewer pictures than folds are what few shots are: each picture is then tested by itself.
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, held_out) in enumerate(splitter.split(truth, truth)):
            fold_of_key |= {keys[tested[place]]: fold for place in held_out.tolist()}
    return [fold_of_key.get(key, _ALWAYS_TRAINS) for key in keys]


def choose_rejection(plain: ImageFeatures, rate: float, folds: int, seed: int) -> Rejection:
    """The threshold of "none of these" from N training pictures, each compared with means of the other folds.

    Args:
        rate: see `Rejection`. folds, seed: as in `cross_validate`.

    Raises:
        FewShotError: too few pictures for the rate. DataError: no class has two different pictures.
    """
    check_rejectable(plain, rate, seed, folds)
    assigned = torch.tensor(fold_of_each_picture(plain.labels.tolist(), plain.digests, folds, seed, plain.noun))
    embeds, parts = plain.image_embeds[0], []
    for fold in range(int(assigned.max()) + 1):
        means = class_means(embeds[assigned != fold], plain.labels[assigned != fold])
        parts.append(nearest_mean(embeds[assigned == fold], means))
    return choose(torch.cat(parts), class_means(embeds, plain.labels), rate)


def check_rejectable(plain: ImageFeatures, rate: float, seed: int, folds: int = 5) -> None:
    """Refuse a rate that is finer than the pictures allow, before anything is trained.

    Raises:
        FewShotError: too few pictures for the rate. DataError: no class has two different pictures.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigurationError(f"`folds` must be a whole number of at least 2; got {folds!r}.")
    assigned = fold_of_each_picture(plain.labels.tolist(), plain.digests, folds, seed, plain.noun)
    check_enough(sum(fold != _ALWAYS_TRAINS for fold in assigned), rate)


def rejected_share(head: TaskResClassifier, data: ImageFeatures, logits: Tensor) -> Metrics:
    """`rejected` and `accuracy_of_kept` (None where none is kept) of a head with a threshold; empty without one."""
    if head.facts.get("rejection") is None:
        return {}
    rejected = usable_rejection(head).rejects(data.image_embeds[0])
    kept = ~rejected
    found = accuracy(logits[kept], data.labels[kept]) if bool(kept.any()) else None
    return {"rejected": float(rejected.double().mean()), "accuracy_of_kept": found}


class OutOfFold(NamedTuple):
    """What classifiers say of pictures that they were not trained on.

    Attributes:
        rows: M positions of the tested pictures. logits, zero_shot: [M, K]. folds: how many classifiers there were.
        thresholds: [M, 1], the score from which on each picture's classifier gives one of several labels.
    """

    rows: list[int]
    logits: Tensor
    zero_shot: Tensor
    folds: int
    thresholds: Tensor


def out_of_fold(
    head: TaskResClassifier,
    train: ImageFeatures,
    plain: ImageFeatures,
    folds: int,
    seed: int,
    fit: Callable[[TaskResClassifier, ImageFeatures], None],
) -> OutOfFold:
    """Train on all folds but one and classify that one, in turn; the head that is given does not change.

    Args:
        head: whose base, scale and `alpha` each fold starts from, with a zero residual.
        train: N embeddings to train on. plain: the same N pictures, not augmented, to test on.
        folds: at least 2; fewer are made where no class has so many pictures.
        fit: trains a head on a part of `train`.

    Raises:
        DataError: no class has two different pictures.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigurationError(f"`folds` must be a whole number of at least 2; got {folds!r}.")
    assigned = torch.tensor(fold_of_each_picture(train.labels.tolist(), plain.digests, folds, seed, plain.noun))
    count = int(assigned.max()) + 1
    logits: list[Tensor] = []
    zero_shot: list[Tensor] = []
    rows: list[int] = []
    thresholds: list[Tensor] = []
    for fold in range(count):
        apart = copy.deepcopy(head)
        apart.reset()
        fit(apart, train.select(torch.nonzero(assigned != fold).flatten().tolist()))
        held_out = torch.nonzero(assigned == fold).flatten().tolist()
        for found, some in zip((logits, zero_shot), both_logits(apart, plain.select(held_out)), strict=True):
            found.append(some)
        rows += held_out
        thresholds.append(torch.full((len(held_out), 1), label_threshold(apart.facts), dtype=torch.float64))
    return OutOfFold(rows, torch.cat(logits), torch.cat(zero_shot), count, torch.cat(thresholds))


def cross_validated_metrics(found: OutOfFold, data: ImageFeatures, compute: ComputeMetrics | None = None) -> Metrics:
    """Metrics over all pictures that were tested.

    Args:
        found: of `out_of_fold` on the N pictures of `data`. compute: further metrics, see `TaskResTrainer`.

    Returns:
        Metrics, `folds`, and of one label per picture `untested_classes`: the names of those with a single picture.
    """
    labels = data.labels[found.rows]
    metrics = full_metrics(found.logits, found.zero_shot, labels, data.class_names, compute, found.thresholds)
    if labels.ndim == 2:
        return metrics | {"folds": found.folds}
    single = sorted(set(data.labels.tolist()) - set(labels.tolist()))
    untested = [data.class_names[label] for label in single]
    if untested:
        warnings.warn(
            f"{len(untested)} of {len(data.class_names)} classes have a single {data.noun}, which is needed to train "
            f"them: nothing was measured of {shorten(untested)}. The accuracy is that of the others alone.",
            stacklevel=3,
        )
    return metrics | {"folds": found.folds, "untested_classes": untested}
