"""`python -m benchmarks.stress`: recipe `auto` and peers that fit fast, where tasks or shots are difficult.

On the photographs and the shipped emoji: plain shots, one to all shots a class, wrong labels, pairs of classes, shots
that come twice, and class names that mean nothing. Then on synthetic embeddings, which are no pictures: drawn so that
their lengths and angles are those measured on real embeddings of CLIP ViT-B/32 (`SYNTHETIC`). All their classes vary
alike, which real ones do not, so they flatter linear discriminants. Last, time and memory of a large task, each fit in
a process of its own. Shots that come twice and synthetic embeddings showed what recipe `auto` lacked, and are no
independent check of what it does about them.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding import ImageFeatures
from taskres_hf.methods.all import METHODS
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table

from . import options as opt
from .tasks import Task, described, draws, tasks

FAST = ("taskres", "linear-probe", "linear-probe-cv", "gda", "proker", "clap", "lp++", "class-mean", "zero-shot")
OF_MANY_CLASSES = ("taskres", "gda", "class-mean", "zero-shot")  # those that fit a thousand classes in seconds
SEVERAL = 3  # pairs of classes a task and seed
NOISE = 4.0  # grey levels, of a picture's second copy

# Real CLIP ViT-B/32: length of the mean image; cosine of an image with its own text and with another one; of two images
# of one class and of two; effective rank (of the squares) of the variation within a class; cosine of the centred class
# mean and the centred text.
SYNTHETIC = {"mean": 0.80, "own": 0.274, "other": 0.200, "same": 0.75, "apart": 0.64, "rank": 56.0, "agree": 0.53}
LOGIT_SCALE = 100.0


class Case(NamedTuple):
    """What a method is fitted on and measured on."""

    head: TaskResClassifier
    images: Tensor  # [N, D]
    labels: Tensor  # [N]
    test: Tensor  # [M, D]
    truth: Tensor  # [M]


def scores(case: Case, methods: Sequence[str], seed: int) -> dict[str, float]:
    """Accuracy in percent of each method."""
    names = [f"class {k}" for k in range(len(case.head.base))]
    shots = ImageFeatures(case.images[None], case.labels, names, "")
    found = {}
    for name in methods:
        logits = METHODS[name]().fit(shots, case.head, seed=seed).logits(case.test)
        found[name] = 100.0 * float((logits.argmax(dim=1) == case.truth).double().mean())
    return found


# ---------------------------------------------------------------------- difficult shots of real pictures


def wrong(labels: Tensor, share: float, classes: int, chance: random.Random) -> Tensor:
    """Labels of which a share, on average, is that of another class."""
    moved = [(x + chance.randrange(1, classes)) % classes if chance.random() < share else x for x in labels.tolist()]
    return torch.tensor(moved)


def imbalanced(labels: Tensor, chance: random.Random) -> list[int]:
    """Rows that leave a class from one picture to all that were drawn, log-uniformly."""
    keep: list[int] = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten().tolist()
        keep += rows[: max(1, round(len(rows) ** chance.random()))]
    return keep


def two_classes(case: Case, pair: tuple[int, int]) -> Case:
    """The same with two of its classes."""
    head, some = case.head, list(pair)
    parts = []
    for embeds, labels in ((case.images, case.labels), (case.test, case.truth)):
        rows = torch.isin(labels, torch.tensor(some))
        parts += [embeds[rows], (labels[rows] == some[1]).long()]
    return Case(TaskResClassifier(head.base[some], head.alpha, head.logit_scale, head.logit_bias), *parts)


def conditions(task: Task, rows: list[int], seed: int, twin: Tensor, nameless: TaskResClassifier) -> Iterator[Any]:
    """Name and case of every kind of difficult shots.

    Args:
        rows: of the training pictures, as drawn. twin: embeddings [N, D] of the mirrored and noisy training pictures.
        nameless: the zero-shot classifier of names that mean nothing.
    """
    chance, classes = random.Random(seed), len(task.head.base)
    images, labels = task.train.image_embeds[0, rows], task.train.labels[rows]
    plain = Case(task.head, images, labels, task.test.image_embeds[0], task.test.labels)
    yield "plain", plain
    keep = imbalanced(labels, chance)
    yield "1 to all shots", plain._replace(images=images[keep], labels=labels[keep])
    for share in (0.2, 0.4):
        yield f"{share:.0%} wrong", plain._replace(labels=wrong(labels, share, classes, chance))
    pairs = list(combinations(range(classes), 2))
    for pair in chance.sample(pairs, min(SEVERAL, len(pairs))):
        yield "two classes", two_classes(plain, pair)
    yield "every shot twice", plain._replace(images=torch.cat([images, twin[rows]]), labels=labels.repeat(2))
    yield "names say nothing", plain._replace(head=nameless)


def twins(kind: str) -> dict[str, tuple[Tensor, TaskResClassifier]]:
    """Of each task the mirrored, noisy training pictures' embeddings, and the classifier of names such as class_17."""
    import numpy as np
    from PIL import Image, ImageOps

    found = {}
    for name, spec, base, splits in described(kind):
        names = [f"class_{number}" for number in range(len(spec["classes"]))]
        model = TaskResCLIPForImageClassification.from_base(base, names, spec["template"], underscores="keep")
        generator = np.random.default_rng(0)

        def copy(row: Mapping[str, Any], generator: Any = generator) -> dict[str, Any]:
            pixels = np.asarray(ImageOps.mirror(row["image"].convert("RGB")), np.float32)
            noisy = np.clip(pixels + NOISE * generator.standard_normal(pixels.shape), 0, 255).astype(np.uint8)
            return {"image": Image.fromarray(noisy)}

        copied = splits["train"].map(copy, load_from_cache_file=False, keep_in_memory=True)
        named = TaskResCLIPForImageClassification.from_base(
            model.clip, spec["classes"], spec["template"], tokenizer=model.tokenizer,
            image_processor=model.image_processor,
        )  # fmt: skip
        embedded = TaskResTrainer(named, TaskResTrainingArguments(disable_tqdm=True)).embed(copied)
        found[name] = embedded.image_embeds[0], model.classifier
    return found


def print_difficult(kind: str, shots: Sequence[int], seeds: Sequence[int], methods: Sequence[str]) -> None:
    found, others = tasks(kind), twins(kind)
    for count in shots:
        cells: dict[str, dict[str, list[float]]] = {}
        for name, task in found.items():
            for seed, rows in zip(seeds, draws(task, count, seeds), strict=True):
                for condition, case in conditions(task, rows, seed, *others[name]):
                    for method, score in scores(case, methods, seed).items():
                        cells.setdefault(condition, {}).setdefault(method, []).append(score)
        lines = [[method, *(f"{mean(values[method]):.1f}" for values in cells.values())] for method in methods]
        over = f"mean over {len(found)} tasks and {len(seeds)} seeds"
        title = f"Accuracy in percent, {kind}, {count} shot{'s' * (count > 1)}, {over}"
        print(Table(["method", *cells], lines, title).markdown(), "\n", flush=True)


# ---------------------------------------------------------------------- synthetic embeddings


def synthetic(classes: int, shots: int, seed: int, tests: int = 2000, dim: int = 512) -> Case:
    """A task whose embeddings have the lengths and angles of `SYNTHETIC`.

    An image is a common vector, one of its class and one of its own; a text a common vector and one of its class. Both
    kinds of variation have one spectrum, a power law of the given effective rank.
    """
    facts, generator = SYNTHETIC, torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] * _spectrum(dim, facts["rank"]).sqrt()

    def vectors(count: int, square: float) -> Tensor:
        return square**0.5 * torch.randn(count, dim, generator=generator) @ axes.T

    of_class = facts["same"] - facts["apart"]
    means, other = vectors(classes, of_class), vectors(classes, 1.0)
    text_length = (facts["own"] - facts["other"]) / (facts["agree"] * of_class**0.5)
    agreeing = facts["agree"] * means / of_class**0.5 + (1.0 - facts["agree"] ** 2) ** 0.5 * other
    common = F.normalize(torch.randn(2, dim, generator=generator), dim=1)
    image_mean, text_mean = facts["mean"] * common[0], (1.0 - text_length**2) ** 0.5
    cosine = facts["other"] / (facts["mean"] * text_mean)
    across = F.normalize(common[1] - (common[1] @ common[0]) * common[0], dim=0)
    direction = cosine * common[0] + (1.0 - cosine**2) ** 0.5 * across
    head = TaskResClassifier(text_mean * direction + text_length * agreeing, 0.5, LOGIT_SCALE)

    def images(labels: Tensor) -> Tensor:
        return F.normalize(image_mean + means[labels] + vectors(len(labels), 1.0 - facts["same"]), dim=1)

    labels, truth = torch.arange(classes).repeat_interleave(shots), torch.arange(tests) % classes
    return Case(head, images(labels), labels, images(truth), truth)


def _spectrum(dim: int, rank: float) -> Tensor:
    """Shares [D] of a power law whose effective rank, 1 / (sum of squares), is the one asked for."""
    low, high = 0.0, 3.0
    for _ in range(50):
        power = 0.5 * (low + high)
        shares: Tensor = torch.arange(1, dim + 1).double().pow(-power)
        shares /= shares.sum()
        low, high = (power, high) if float(1.0 / shares.pow(2).sum()) > rank else (low, power)
    return shares.to(torch.float32)


def print_synthetic(seeds: Sequence[int]) -> None:
    """At few shots alone: with more, methods that know of one covariance make no mistake here."""
    columns: list[str] = []
    cells: dict[str, list[str]] = {method: [] for method in FAST}
    for classes in (2, 10, 100, 1000):
        many = classes == 1000
        for count in [4] if many else [1, 2, 4]:
            columns.append(f"K {classes:,}, {count} shot{'s' * (count > 1)}")
            turns = [
                scores(synthetic(classes, count, seed), OF_MANY_CLASSES if many else FAST, seed)
                for seed in seeds[: 1 if many else None]
            ]
            for method, values in cells.items():
                values.append(f"{mean(turn[method] for turn in turns):.1f}" if method in turns[0] else "")
    title = f"Accuracy in percent, synthetic embeddings, mean over {len(seeds)} seeds (one at K 1,000)"
    lines = [[method, *values] for method, values in cells.items()]
    print(Table(["method", *columns], lines, title).markdown(), "\n", flush=True)


# ---------------------------------------------------------------------- time and memory

_FIT = """
import json, sys, time
from benchmarks.stress import METHODS, synthetic
from taskres_hf.embedding import ImageFeatures

method, classes, shots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
case = synthetic(classes, shots, 1)
data = ImageFeatures(case.images[None], case.labels, [f"class {k}" for k in range(classes)], "")
METHODS["taskres"]().fit(data.select(range(2 * shots)), case.head)  # loads what fitting uses

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20

before, start = peak(), time.perf_counter()
fitted = METHODS[method]().fit(data, case.head)
seconds = time.perf_counter() - start
after = peak()
right = float((fitted.logits(case.test).argmax(1) == case.truth).double().mean())
print(json.dumps({"seconds": seconds, "before": before, "peak": after, "accuracy": 100 * right}))
"""


def print_large(classes: int = 1000, shots: int = 16) -> None:
    """Seconds and peak memory of fits on a large task, each in a process of its own."""
    lines = []
    for method in ("taskres", "gda", "class-mean"):
        command = [sys.executable, "-c", _FIT, method, str(classes), str(shots)]
        ran = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        lines.append([
            method, f"{ran['seconds']:.1f}", f"{ran['before']:.2f}", f"{ran['peak']:.2f}", f"{ran['accuracy']:.1f}"
        ])  # fmt: skip
    threads = torch.get_num_threads()
    title = f"One fit on synthetic embeddings, {classes:,} classes x {shots} shots, D 512, {threads} threads"
    columns = ["method", "seconds", "peak before (GiB)", "peak (GiB)", "accuracy"]
    print(Table(columns, lines, title).markdown(), "\n", flush=True)


def main() -> None:
    parser = opt.parser(__doc__, seeds=3, shots=(1, 4))
    parser.add_argument("--part", choices=["difficult", "synthetic", "large"], help="one of the three")
    options = opt.read(parser)
    if options.part in (None, "difficult"):
        for kind in opt.kinds(options):
            print_difficult(kind, options.shots, options.seeds, FAST)
    if options.part in (None, "synthetic"):
        print("## Synthetic embeddings\n")
        print_synthetic(options.seeds)
    if options.part in (None, "large"):
        print("## A large task\n")
        print_large()


if __name__ == "__main__":
    main()
