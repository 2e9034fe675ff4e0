"""Measures of how hard a task is, from embeddings and the base classifier alone, before any training.

Every function is pure, takes embeddings of any length, computes in fp64 on the CPU and draws nothing. Those that need
no label say how surely and how consistently zero-shot answers; those that take labels say what a few shots tell.
`docs/difficulty.md` says how well each predicts what training reaches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.whitened import fit_whitened

_MOST = 2000  # pictures that are compared with each other; of more, evenly spaced ones
_NO_SPREAD = 1e-12


def unit(embeds: Tensor) -> Tensor:
    """Embeddings [..., D] at length 1, in fp64 on the CPU."""
    return F.normalize(embeds.detach().to("cpu", torch.float64), dim=-1)


def zero_shot(images: Tensor, base: Tensor, logit_scale: float) -> Tensor:
    """Zero-shot probabilities [N, K] of images [N, D] under a base classifier `t` [K, D]."""
    return torch.softmax(logit_scale * unit(images) @ unit(base).T, dim=1)


# ------------------------------------------------------------------------------------------------------- no labels


def confidence(probabilities: Tensor) -> float:
    """Mean largest probability [N, K], from 1/K to 1 (average confidence, Guillory et al., arXiv 2107.03315)."""
    return float(probabilities.max(1)[0].mean())


def margins(probabilities: Tensor) -> Tensor:
    """[N]: by how much the likeliest class of [N, K] is likelier than the second; 1 where there is one class."""
    top = probabilities.topk(min(2, probabilities.shape[1]), dim=1)[0]
    return top[:, 0] - top[:, 1] if top.shape[1] > 1 else torch.ones(len(top))


def margin(probabilities: Tensor) -> float:
    """Mean difference of the two largest probabilities [N, K], from 0 to 1."""
    return float(margins(probabilities).mean())


def certainty(probabilities: Tensor) -> float:
    """1 - mean entropy / log K of probabilities [N, K], from 0 (chance) to 1 (sure)."""
    return 1.0 - float(torch.special.entr(probabilities).sum(1).mean()) / math.log(probabilities.shape[1])


def information(probabilities: Tensor) -> float:
    """Mutual information of picture and answer over log K, from 0 to 1: sure *and* of all classes.

    Entropy of the mean probabilities less the mean entropy (Bridle et al., NIPS 1991).
    """
    mean = float(torch.special.entr(probabilities.mean(0)).sum()) / math.log(probabilities.shape[1])
    return max(0.0, mean - (1.0 - certainty(probabilities)))


def prompt_agreement(images: Tensor, prompts: Tensor) -> float:
    """Share of pairs of prompts that give a picture the same class, from 0 to 1.

    Args:
        images: [N, D]. prompts: [P, K, D], a base classifier each, P at least 2.
    """
    answers = torch.einsum("id,pkd->pik", unit(images), unit(prompts)).argmax(2)
    count = len(answers)
    same = sum(float((answers[one] == answers[other]).double().mean()) for one in range(count) for other in range(one))
    return 2.0 * same / (count * (count - 1))


def text_separation(base: Tensor) -> float:
    """Mean of 1 - cosine to the nearest other class of `t` [K, D]: small where class names read alike."""
    return float((1.0 - _nearest_other(unit(base))).mean())


def _nearest_other(rows: Tensor) -> Tensor:
    return (rows @ rows.T).fill_diagonal_(-1.0).max(1)[0]


def _centred(images: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Both at length 1 after their own mean is taken off, which removes the gap between the modalities.

    Liang et al., arXiv 2203.02053.
    """
    f, u = unit(images), unit(base)
    return unit(f - f.mean(0)), unit(u - u.mean(0))


def alignment(images: Tensor, base: Tensor) -> float:
    """Mean cosine of a picture [N, D] and its nearest class [K, D], both centred."""
    f, u = _centred(images, base)
    return float((f @ u.T).max(1)[0].mean())


def transport_distance(images: Tensor, base: Tensor, smoothing: float = 0.05, iterations: int = 50) -> float:
    """Optimal transport of the pictures to the classes, all of equal weight, at cost 1 - cosine (both centred).

    Entropic, by Sinkhorn's iterations (Cuturi, arXiv 1306.0895).

    Args:
        images: [N, D]. base: `t` [K, D]. smoothing: entropic regularisation, in units of the cost.
    """
    f, u = _centred(_some(images), base)
    cost = 1.0 - f @ u.T
    kernel, (count, classes) = -cost / smoothing, cost.shape
    rows, columns = torch.zeros(count, 1, dtype=cost.dtype), torch.zeros(1, classes, dtype=cost.dtype)
    for _ in range(iterations):
        rows = -math.log(count) - torch.logsumexp(kernel + columns, 1, keepdim=True)
        columns = -math.log(classes) - torch.logsumexp(kernel + rows, 0, keepdim=True)
    return float(((kernel + rows + columns).exp() * cost).sum())


def cluster_structure(images: Tensor, labels: Tensor) -> float:
    """Silhouette at cosine distance, -1 to 1, of classes or of zero-shot pseudo-labels; 0 where it is not defined.

    Rousseeuw 1987, scikit-learn's `silhouette_score`.
    """
    from sklearn.metrics import silhouette_score

    f, y = unit(_some(images)), _some(labels)
    found = len(torch.unique(y))
    return float(silhouette_score(f.numpy(), y.numpy(), metric="cosine")) if 1 < found < len(y) else 0.0


def _some(rows: Tensor) -> Tensor:
    return rows if len(rows) <= _MOST else rows[torch.linspace(0, len(rows) - 1, _MOST).long()]


# ------------------------------------------------------------------------------------------------------- a few labels


def fisher_ratio(images: Tensor, labels: Tensor) -> float:
    """Spread of class means over spread within classes, each the trace of its covariance; 0 at one picture a class.

    Fisher 1936; the spread that means of so few pictures have by chance is taken off.
    """
    f = unit(images)
    means, counts = _means(f, labels)
    free = len(f) - len(means)
    if free < 1 or len(means) < 2:
        return 0.0
    within = float((f - means[_places(labels)]).pow(2).sum()) / free
    between = float((means - means.mean(0)).pow(2).sum()) / (len(means) - 1) - within * float((1.0 / counts).mean())
    return max(0.0, between) / max(within, _NO_SPREAD)


def _places(labels: Tensor) -> Tensor:
    places: Tensor = torch.unique(labels, return_inverse=True)[1]
    return places


def _means(f: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class means [C, D] and pictures [C] of the classes that occur."""
    place = _places(labels)
    counts = torch.bincount(place).double()
    return torch.zeros(len(counts), f.shape[1], dtype=f.dtype).index_add_(0, place, f) / counts[:, None], counts


def class_mean_hits(images: Tensor, labels: Tensor) -> Tensor:
    """Whether each picture [N] is nearest to the mean of its class when it is left out of it; of classes with two."""
    f, place = unit(images), _places(labels)
    means, counts = _means(f, labels)
    scores = f @ unit(means).T
    own = unit((means[place] * counts[place, None] - f) / (counts[place, None] - 1.0).clamp_min(1.0))
    scores[torch.arange(len(f)), place] = (f * own).sum(1)
    return (scores.argmax(1) == place).double()[counts[place] > 1]


def nearest_neighbour_hits(images: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest other picture of each [N] is of its class; of classes with two pictures."""
    f, place = unit(images), _places(labels)
    similar = (f @ f.T).fill_diagonal_(-2.0)
    hits = (place[similar.argmax(1)] == place).double()
    return hits[torch.bincount(place)[place] > 1]


def log_evidence(images: Tensor, labels: Tensor, iterations: int = 11) -> float:
    """LogME: log evidence of a Bayesian linear model of each class against the others, the mean over pictures.

    You et al., arXiv 2102.11005, by fixed-point iteration over one decomposition.

    Args:
        images: [N, D], N at least 2. labels: [N].
    """
    f, place = unit(images), _places(labels)
    count, dim = f.shape
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    s2, total = s.pow(2), 0.0
    classes = int(place.max()) + 1
    for number in range(classes):
        y = (place == number).double()
        x2 = (u.T @ y).pow(2)
        rest = max(float(y.pow(2).sum() - x2.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(iterations):
            ratio = alpha / beta
            gamma = float((s2 / (s2 + ratio)).sum())
            m2 = float((s2 * x2 / (ratio + s2).pow(2)).sum())
            error = float((x2 / (1.0 + s2 / ratio).pow(2)).sum()) + rest
            alpha, beta = gamma / (m2 + 1e-8), max(count - gamma, 1e-8) / (error + 1e-8)
        evidence = dim / 2 * math.log(alpha) + count / 2 * math.log(beta)
        evidence -= 0.5 * (float(torch.log(alpha + beta * s2).sum()) + (dim - len(s2)) * math.log(alpha))
        total += (evidence - beta / 2 * error - alpha / 2 * m2 - count / 2 * math.log(2 * math.pi)) / count
    return total / classes


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """LEEP over log K: log likelihood of labels [N] given zero-shot's [N, K] joint with them; 0 is best.

    Nguyen et al., arXiv 2002.12462, the classes of zero-shot being those of the task.
    """
    joint = torch.zeros(probabilities.shape[1], probabilities.shape[1], dtype=probabilities.dtype)
    joint.index_add_(0, labels, probabilities)
    given = joint / joint.sum(0).clamp_min(1e-30)
    likely = (probabilities @ given.T).gather(1, labels[:, None])
    return float(likely.clamp_min(1e-30).log().mean()) / math.log(probabilities.shape[1])


def negative_conditional_entropy(probabilities: Tensor, labels: Tensor) -> float:
    """NCE over log K: minus the entropy of labels [N] given zero-shot's answers [N, K]; 0 is best.

    Tran et al., arXiv 1908.08142.
    """
    classes, answers = probabilities.shape[1], probabilities.argmax(1)
    joint = torch.bincount(labels * classes + answers, minlength=classes**2).double().view(classes, classes) / len(
        labels
    )
    given = joint / joint.sum(0).clamp_min(1e-30)
    return float((joint * given.clamp_min(1e-30).log()).sum()) / math.log(classes)


def h_score(images: Tensor, labels: Tensor) -> float:
    """Shrunk H-score over K - 1: share of the spread that class means explain, in the metric of all pictures.

    Bao et al. 2019, with Ledoit and Wolf's covariance as in Ibrahim et al., arXiv 2110.06893.
    """
    from sklearn.covariance import LedoitWolf

    f = unit(images)
    means, _ = _means(f, labels)
    fitted = LedoitWolf().fit(f.numpy())
    if float(np.trace(fitted.covariance_)) < _NO_SPREAD:  # all pictures have one embedding
        return 0.0
    keep = 1.0 - float(fitted.shrinkage_)
    centred = np.asarray(keep**0.5 * (means[_places(labels)] - f.mean(0)).numpy())
    explained = np.trace(np.linalg.solve(fitted.covariance_, centred.T @ centred / len(f)))
    return float(explained) / max(len(means) - 1, 1)


def shots_information(images: Tensor, labels: Tensor, base: Tensor, logit_scale: float) -> tuple[float, float | None]:
    """What zero-shot, and class means of other shots, tell of the labels, each from 0 to 1, as recipe `auto` sees it.

    None for the means at one picture a class. Of pictures that are nearly copies none is held out, and what the recipe
    takes class means to tell at one picture a class is given.
    """
    chosen = fit_whitened(unit(images), labels, base, logit_scale).chosen
    alone = int(torch.bincount(labels.cpu()).max()) < 2
    return chosen["text_information"], None if alone else chosen["means_information"]


def cross_validated_logits(
    images: Tensor, labels: Tensor, base: Tensor, logit_scale: float, folds: int = 2
) -> tuple[Tensor, Tensor]:
    """Logits [M, K] of recipe `auto` of pictures that it was not fitted on, and their labels [M].

    Every fit holds out shots of its own, so two folds cost about what one fit of all shots does. A class's pictures go
    to the folds in turn; those of a class with one picture are always fitted on. M is 0 where
    every class has one.
    """
    f, y = unit(images), labels.cpu()
    numbers = torch.zeros_like(y)
    for label in torch.unique(y).tolist():
        members = (y == label).nonzero().flatten()
        numbers[members] = torch.arange(len(members))
    counts = torch.bincount(y)[y]
    folds = min(folds, int(counts.max()))
    parts, truth = [torch.zeros(0, len(base), dtype=torch.float64)], [y[:0]]
    for fold in range(folds if folds > 1 else 0):
        out = (numbers % folds == fold) & (counts > 1)
        fitted = fit_whitened(f[~out], y[~out], base, logit_scale)
        parts.append(f[out] @ fitted.weight.T + fitted.bias)
        truth.append(y[out])
    return torch.cat(parts), torch.cat(truth)


# ------------------------------------------------------------------------------------------------------- all together


def task_measures(
    images: Tensor, base: Tensor, logit_scale: float, labels: Tensor | None = None, prompts: Tensor | None = None
) -> dict[str, float]:
    """Every measure that can be made, by name.

    Args:
        images: [N, D], not normalised, N at least 2. base: `t` [K, D], K at least 2. logit_scale: of the base.
        labels: [N] class ids, or None. prompts: [P, K, D], see `prompt_agreement`, or None.

    Returns:
        Those of `UNLABELLED`; with labels those of `LABELLED`; with two pictures of some class those of `LEFT_OUT`.
    """
    p = zero_shot(images, base, logit_scale)
    found = {
        "confidence": confidence(p), "margin": margin(p), "certainty": certainty(p), "information": information(p),
        "text_separation": text_separation(base), "alignment": alignment(images, base),
        "transport_distance": transport_distance(images, base),
        "pseudo_label_structure": cluster_structure(images, p.argmax(1)),
    }  # fmt: skip
    if prompts is not None:
        found["prompt_agreement"] = prompt_agreement(images, prompts)
    if labels is None:
        return found
    y = labels.cpu()
    told, means_told = shots_information(images, y, base, logit_scale)
    found |= {
        "zero_shot_accuracy": float((p.argmax(1) == y).double().mean()), "text_information": told,
        "leep": leep(p, y), "nce": negative_conditional_entropy(p, y), "log_evidence": log_evidence(images, y),
        "h_score": h_score(images, y), "mean_separation": float(_mean_separation(images, y).mean()),
    }  # fmt: skip
    if means_told is not None:
        logits, truth = cross_validated_logits(images, y, base, logit_scale)
        found |= {
            "class_means": float(class_mean_hits(images, y).mean()), "means_information": means_told,
            "nearest_neighbour": float(nearest_neighbour_hits(images, y).mean()),
            "class_structure": cluster_structure(images, y), "fisher_ratio": fisher_ratio(images, y),
            "cross_validated": float((logits.argmax(1) == truth).double().mean()),
        }  # fmt: skip
    return found


UNLABELLED = (
    "confidence", "margin", "certainty", "information", "prompt_agreement", "text_separation", "alignment",
    "transport_distance", "pseudo_label_structure",
)  # fmt: skip
LABELLED = (
    "zero_shot_accuracy", "text_information", "leep", "nce", "log_evidence", "h_score", "mean_separation",
)  # fmt: skip
LEFT_OUT = (
    "class_means", "means_information", "nearest_neighbour", "class_structure", "fisher_ratio", "cross_validated",
)  # fmt: skip


def _mean_separation(images: Tensor, labels: Tensor) -> Tensor:
    """1 - cosine [C] of each class mean to the nearest other one, the mean of all pictures taken off."""
    f = unit(images)
    return 1.0 - _nearest_other(unit(_means(f - f.mean(0), labels)[0]))


def class_measures(images: Tensor, base: Tensor, logit_scale: float, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Every measure of each class that can be made: name to [K]; higher is easier. Arguments as of `task_measures`.

    Without labels `sureness` (mean probability of a class where zero-shot gives it any, weighted by it),
    `claimed_share` (log of K times the share of pictures that zero-shot gives the class), `text_separation` and
    `alignment` (of the N/K pictures nearest to the class). With labels `truth_probability` and `recall` of zero-shot,
    `mean_separation`, and, where a class has two pictures, `left_out_probability` and `left_out_recall` of recipe
    `auto` and `class_means`, all NaN for a class without a picture that can tell.
    """
    p, classes = zero_shot(images, base, logit_scale), len(base)
    f, u = _centred(images, base)
    near = max(1, round(len(f) / classes))
    shares = torch.bincount(p.argmax(1), minlength=classes).double()
    found = {
        "sureness": p.pow(2).sum(0) / p.sum(0).clamp_min(1e-30),
        "claimed_share": torch.log((shares + 0.5) / (len(p) + 0.5 * classes) * classes),
        "text_separation": 1.0 - _nearest_other(unit(base)),
        "alignment": (f @ u.T).topk(near, dim=0)[0].mean(0),
    }
    if labels is None:
        return found
    y = labels.cpu()
    found["truth_probability"] = _class_mean(p.gather(1, y[:, None])[:, 0], y, classes)
    found["recall"] = _class_mean((p.argmax(1) == y).double(), y, classes)
    found["mean_separation"] = torch.full((classes,), math.nan, dtype=torch.float64)
    found["mean_separation"][torch.unique(y)] = _mean_separation(images, y)
    logits, truth = cross_validated_logits(images, y, base, logit_scale)
    if len(truth):
        q = logits.softmax(1)
        found["left_out_probability"] = _class_mean(q.gather(1, truth[:, None])[:, 0], truth, classes)
        found["left_out_recall"] = _class_mean((q.argmax(1) == truth).double(), truth, classes)
        found["class_means"] = _class_mean(class_mean_hits(images, y), y[torch.bincount(y)[y] > 1], classes)
    return found


def _class_mean(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of values [N] of each class [K], NaN where there is none."""
    counts = torch.bincount(labels, minlength=classes).double()
    return torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, values) / torch.where(
        counts > 0, counts, math.nan
    )
