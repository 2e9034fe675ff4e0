"""Which pictures to label next: strategies over the embeddings of a pool that has no labels.

Each is a function of a `Pool`, a number and a seed, and gives that many rows of the pool, the most useful first; the
same seed gives the same rows. `choose` applies one and suggests nothing that looks like a picture chosen before it.
docs/label-next.md says how many labels each saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError, DataError
from .difficulty import margins

DEFAULT = "cover"
_NEAR = 0.12  # of the usual squared distance of two pictures, below which they are as one, as in `training.whitened`
_NEIGHBOURS = 20  # that say how typical a picture is (TypiClust)
_PURE = 0.95  # of the balls around pictures that must lie within one cluster (ProbCover)
_RADII = 60  # tried for that
_STARTS = 4  # of k-means, of which the best is taken
_MOST_BALLS = 10_000  # pictures, of more a draw is looked at
_PIECE = 4_000_000  # distances looked at in one go


@dataclass(frozen=True)
class Pool:
    """What a strategy sees.

    Attributes:
        images: [N, D] embeddings of the pool, of unit length. probabilities: [N, K] of the classifier as it is.
        labelled: [M, D] embeddings of pictures that have labels, of unit length. labels: [M] their class ids.
    """

    images: Tensor
    probabilities: Tensor
    labelled: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        return int(self.probabilities.shape[1])

    def select(self, rows: Tensor) -> Pool:
        """The same with fewer pictures to choose from."""
        return replace(self, images=self.images[rows], probabilities=self.probabilities[rows])


def make_pool(
    images: Tensor, probabilities: Tensor, labelled: Tensor | None = None, labels: Tensor | None = None
) -> Pool:
    """A pool from embeddings of any length.

    Args:
        images: [N, D]. probabilities: [N, K]. labelled: [M, D], none by default. labels: [M] class ids.

    Raises:
        DataError: shapes do not fit each other, values that are not finite, or class ids that are none.
    """
    labelled = images[:0] if labelled is None else labelled
    labels = torch.empty(0, dtype=torch.long) if labels is None else labels
    if images.ndim != 2 or probabilities.ndim != 2 or len(images) != len(probabilities):
        raise DataError(
            f"A pool needs embeddings [N, D] and probabilities [N, K]; got {[*images.shape]} and "
            f"{[*probabilities.shape]}."
        )
    if labelled.ndim != 2 or labelled.shape[1] != images.shape[1] or labels.shape != labelled.shape[:1]:
        raise DataError(
            f"Labelled pictures need embeddings [M, {images.shape[1]}] and labels [M]; got {[*labelled.shape]} and "
            f"{[*labels.shape]}."
        )
    if not all(bool(values.isfinite().all()) for values in (images, probabilities, labelled)):
        raise DataError("Embeddings or probabilities hold NaN or infinite values: leave those pictures out.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < probabilities.shape[1]:
        raise DataError(f"Labels must be class ids from 0 to {probabilities.shape[1] - 1}.")

    def unit(rows: Tensor) -> Tensor:
        return F.normalize(rows.detach().to("cpu", torch.float32), dim=1)

    return Pool(unit(images), probabilities.detach().to("cpu", torch.float32), unit(labelled), labels.cpu().long())


def choose(pool: Pool, n: int, strategy: str = DEFAULT, seed: int = 1) -> list[int]:
    """Rows of the pool to label next, the most useful first.

    Args:
        n: how many; fewer come where fewer pictures differ from each other and from the labelled ones.
        strategy: a name of `STRATEGIES`.

    Raises:
        ConfigurationError: an unknown strategy, or n below 1.
    """
    check_choice(n, strategy)
    rows = distinct(pool)
    return rows[STRATEGIES[strategy](pool.select(rows), n, seed)].tolist() if len(rows) else []


def check_choice(n: int, strategy: str) -> None:
    """Refuse, before any work, what `choose` refuses."""
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"`strategy` must be one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigurationError(f"`n`, the number of pictures, must be a whole number of at least 1; got {n!r}.")


def distinct(pool: Pool) -> Tensor:
    """Rows of the pool without those that are nearly the same as an earlier one or as a labelled picture.

    Near is what recipe `auto` counts as one picture: 0.12 of the squared distance that two pictures usually have.
    """
    images = pool.images
    least = 1.0 - _NEAR * (1.0 - float(images.mean(0).pow(2).sum())) if len(images) else 1.0
    kept = torch.empty(0, dtype=torch.long)
    for piece in _pieces(len(images), max(len(images), len(pool.labelled))):
        rows = torch.arange(len(images))[piece]
        for others in (pool.labelled, images[kept]):
            if len(others) and len(rows):
                rows = rows[(images[rows] @ others.T).amax(1) < least]
        alike = (images[rows] @ images[rows].T >= least).tril(-1)
        first = torch.ones(len(rows), dtype=torch.bool)
        for row in alike.any(1).nonzero().flatten().tolist():  # few: what is like an earlier one that stays
            first[row] = not bool((alike[row] & first).any())
        kept = torch.cat([kept, rows[first]])
    return kept


def _pieces(count: int, width: int) -> Iterator[slice]:
    size = max(1, _PIECE // max(width, 1))
    return (slice(start, start + size) for start in range(0, count, size))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _highest(scores: Tensor, n: int) -> list[int]:
    return torch.argsort(scores, descending=True, stable=True)[:n].tolist()


# ---------------------------------------------------------------------- no thought, and doubt


def random(pool: Pool, n: int, seed: int) -> list[int]:
    """Any pictures."""
    return torch.randperm(len(pool), generator=_generator(seed))[:n].tolist()


def entropy(pool: Pool, n: int, seed: int) -> list[int]:
    """Those whose probabilities have the highest entropy."""
    return _highest(torch.special.entr(pool.probabilities).sum(1), n)


def least_confidence(pool: Pool, n: int, seed: int) -> list[int]:
    """Those whose likeliest class is the least likely (Lewis and Gale 1994)."""
    return _highest(-pool.probabilities.amax(1), n)


def margin(pool: Pool, n: int, seed: int) -> list[int]:
    """Those between two classes (Scheffer et al. 2001)."""
    return _highest(-margins(pool.probabilities), n)


def badge(pool: Pool, n: int, seed: int) -> list[int]:
    """k-means++ over the gradients that the likeliest labels would give (BADGE, Ash et al. 2020).

    A gradient is (p - y) f^T [K, D]; distances of two follow from products of each part, so none is made. The first is
    the longest, the others are drawn in proportion to their squared distance to the nearest drawn one.
    """
    images, error = pool.images, pool.probabilities.clone()
    error[torch.arange(len(error)), error.argmax(1)] -= 1.0
    lengths, draw = error.pow(2).sum(1), _generator(seed)
    chosen = _highest(lengths, 1)
    distance = torch.full_like(lengths, torch.inf)
    while len(chosen) < min(n, len(pool)):
        last = chosen[-1]
        gone = lengths + lengths[last] - 2.0 * (error @ error[last]) * (images @ images[last])
        distance = torch.minimum(distance, gone.clamp_min(0.0))
        distance[chosen] = 0.0
        if not float(distance.sum()) > 0.0:  # the classifier has no doubt of any
            return _filled(pool, chosen, n, seed)
        chosen.append(int(torch.multinomial(distance, 1, generator=draw)))
    return chosen[:n]


# ---------------------------------------------------------------------- coverage


def cover(pool: Pool, n: int, seed: int, weights: Tensor | None = None) -> list[int]:
    """Greedy k-medoids: each picture brings the pool closest, on average, to the nearest chosen or labelled one.

    The sum of distances that it lowers is submodular, so this is within 1 - 1/e of the best choice (facility location;
    Nemhauser et al. 1978, Wei et al. 2015), and the gain of a picture never grows: it is computed again only where the
    last one known is the highest (Minoux 1978).

    Distances are those of directions from the mean of all pictures: embeddings of one tower lie in a narrow cone.

    Args:
        weights: [N], how much each picture of the pool counts.
    """
    images, labelled = _centred(pool)
    weights = torch.ones(len(images)) if weights is None else weights
    near = _nearest(images, labelled)
    bound = torch.empty(len(images))
    for piece in _pieces(len(images), len(images)):
        bound[piece] = weights @ (near[:, None] - _distances(images, images[piece])).clamp_min(0.0)
    chosen: list[int] = []
    fresh = torch.ones(len(images), dtype=torch.bool)
    while len(chosen) < min(n, len(images)):
        best = int(bound.argmax())
        away = _distances(images, images[best : best + 1])[:, 0]
        if fresh[best]:  # its gain is of now
            chosen.append(best)
            near, bound[best] = torch.minimum(near, away), -torch.inf
            fresh[:] = False
        else:
            bound[best] = float(weights @ (near - away).clamp_min(0.0))
            fresh[best] = True
    return chosen


def _centred(pool: Pool) -> tuple[Tensor, Tensor]:
    """Embeddings of the pool and of the labelled pictures without their common mean, of unit length again."""
    rows = torch.cat([pool.images, pool.labelled])
    rows = F.normalize(rows - rows.mean(0), dim=1) if len(rows) else rows
    return rows[: len(pool)], rows[len(pool) :]


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """[N, M] between embeddings of unit length."""
    return (2.0 - 2.0 * rows @ others.T).clamp_min(0.0).sqrt()


def _nearest(images: Tensor, labelled: Tensor) -> Tensor:
    """[N]: distance to the nearest labelled picture; where there is none, that of two opposite ones."""
    near = torch.full((len(images),), 2.0)
    for piece in _pieces(len(images), len(labelled)):
        if len(labelled):
            near[piece] = _distances(images[piece], labelled).amin(1)
    return near


def k_center(pool: Pool, n: int, seed: int) -> list[int]:
    """Each the farthest from all chosen and labelled ones (core-set, Sener and Savarese 2018); first the most central
    one where nothing is labelled."""
    images, chosen = pool.images, list[int]()
    near = _nearest(images, pool.labelled)
    if not len(pool.labelled):
        near = near + images @ images.mean(0)
    while len(chosen) < min(n, len(images)):
        chosen.append(int(near.argmax()))
        near = torch.minimum(near, _distances(images, images[chosen[-1:]])[:, 0])
        near[chosen] = -1.0
    return chosen


def _clusters(rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means: cluster [N] of each row, and centres."""
    from sklearn.cluster import KMeans

    made = KMeans(min(count, len(rows)), n_init=_STARTS, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(made.labels_).long(), torch.from_numpy(made.cluster_centers_)


def k_means(pool: Pool, n: int, seed: int) -> list[int]:
    """The picture nearest to the centre of each of n clusters, large ones first."""
    if not len(pool):
        return []
    cluster, centres = _clusters(pool.images, n, seed)
    away = (pool.images - centres[cluster]).norm(dim=1)
    sizes = torch.bincount(cluster, minlength=len(centres))
    members = [(cluster == one).nonzero().flatten() for one in _highest(sizes.float(), len(sizes)) if sizes[one]]
    return _filled(pool, [int(rows[away[rows].argmin()]) for rows in members], n, seed)


def _filled(pool: Pool, chosen: list[int], n: int, seed: int) -> list[int]:
    """As many as asked for: what is left is drawn."""
    known = set(chosen)
    return (chosen + [row for row in random(pool, len(pool), seed) if row not in known])[:n]


def typiclust(pool: Pool, n: int, seed: int) -> list[int]:
    """The most typical picture of each cluster: clusters without a label first, the largest of them first (TypiClust,
    Hacohen et al. 2022). As many clusters as there are labels and pictures to choose; typical is what has a low mean
    distance to its 20 nearest in the cluster.
    """
    if not len(pool):
        return []
    count, rows = len(pool), torch.cat([pool.images, pool.labelled])
    cluster, _ = _clusters(rows, n + len(pool.labelled), seed)
    most = int(cluster.max()) + 1
    sizes, known = torch.bincount(cluster[:count], minlength=most), torch.bincount(cluster[count:], minlength=most)
    ranked = []
    for one in sorted(sizes.nonzero().flatten().tolist(), key=lambda one: (int(known[one]), -int(sizes[one]))):
        members = (cluster == one).nonzero().flatten()
        order = members[torch.argsort(_spread(rows[members]), stable=True)]
        ranked.append(order[order < count].tolist())
    return _by_turns(ranked, n)


def _spread(rows: Tensor) -> Tensor:
    """[N]: mean distance of each row to its nearest ones; low is typical."""
    spread = torch.zeros(len(rows))
    most = min(_NEIGHBOURS, len(rows) - 1)
    for piece in _pieces(len(rows), len(rows)):
        if most:
            spread[piece] = _distances(rows[piece], rows).topk(most + 1, dim=1, largest=False)[0].sum(1) / most
    return spread


def _by_turns(lists: list[list[int]], n: int) -> list[int]:
    """The first of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [one[turn] for turn in range(longest) for one in lists if turn < len(one)][:n]


def probcover(pool: Pool, n: int, seed: int) -> list[int]:
    """Each has the most pictures around it that no chosen or labelled one has (ProbCover, Yehuda et al. 2022).

    Around is a ball of the largest radius with which 95 % of all balls lie within one of K clusters.
    """
    drawn = torch.tensor(sorted(random(pool, _MOST_BALLS, seed)), dtype=torch.long)
    if not len(drawn):
        return []
    images = pool.images[drawn]
    away = _distances(images, images)
    cluster, _ = _clusters(images, pool.classes, seed)
    nearest_other = away.masked_fill(cluster[:, None] == cluster, torch.inf).amin(1)
    radius = max(
        (r for r in torch.linspace(0.02, 1.4, _RADII).tolist() if float((nearest_other > r).float().mean()) >= _PURE),
        default=0.02,
    )
    ball, open_ = away <= radius, _nearest(images, pool.labelled) > radius
    chosen: list[int] = []
    while len(chosen) < min(n, len(images)):
        gain = ball[:, open_].sum(1)
        best = int(gain.argmax())
        if not gain[best]:
            break
        chosen.append(best)
        open_ = open_ & ~ball[best]
    return _filled(pool, drawn[chosen].tolist(), n, seed)


def expected_misses(probabilities: Tensor) -> Tensor:
    """[K]: the share of each class's pictures that is expected to be given another class, by probabilities [N, K]."""
    top, likeliest = probabilities.max(1)
    found = torch.zeros_like(probabilities[0]).index_add_(0, likeliest, top)
    return (1.0 - found / probabilities.sum(0).clamp_min(1e-12)).clamp(0.0, 1.0)


# ---------------------------------------------------------------------- both


def balanced(pool: Pool, n: int, seed: int) -> list[int]:
    """As many of each likeliest class as brings the labels of all classes level (PCB, Bang et al. 2024), the most
    typical of each class (`typiclust`).

    The likeliest classes are those after the probabilities were brought to the same sum for every class (Sinkhorn and
    Knopp 1967): zero-shot prefers some classes.
    """
    even = pool.probabilities.clamp_min(1e-12)
    for _ in range(20):
        even = even / even.sum(0)
        even = even / even.sum(1, keepdim=True)
    likeliest = even.argmax(1)
    labels = torch.bincount(pool.labels, minlength=pool.classes).tolist()
    left = torch.bincount(likeliest, minlength=pool.classes).tolist()
    wanted = [0] * pool.classes
    for _ in range(min(n, len(pool))):
        open_ = [one for one in range(pool.classes) if left[one] > wanted[one]]
        wanted[min(open_, key=lambda one: (labels[one] + wanted[one], -left[one]))] += 1
    ranked = []
    for one in sorted((one for one in range(pool.classes) if wanted[one]), key=lambda one: (labels[one], -left[one])):
        rows, own = (likeliest == one).nonzero().flatten(), pool.labels == one
        part = replace(pool.select(rows), labelled=pool.labelled[own], labels=pool.labels[own])
        ranked.append(rows[typiclust(part, wanted[one], seed)].tolist())
    return _by_turns(ranked, n)


Strategy = Callable[[Pool, int, int], list[int]]
STRATEGIES: dict[str, Strategy] = {
    "cover": cover, "balanced": balanced, "typiclust": typiclust,
    "probcover": probcover, "k-means": k_means, "k-center": k_center, "badge": badge, "margin": margin,
    "entropy": entropy, "least-confidence": least_confidence, "random": random,
}  # fmt: skip
