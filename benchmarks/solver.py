"""`python -m benchmarks.solver`: what recipe `auto` costs at every size, beside scikit-learn's logistic regression.

On synthetic embeddings with the lengths and angles of real ones (see `benchmarks.stress`), a tenth of whose labels are
exchanged: told apart without an error, they would be fitted at once. Fits are timed in turn in one process; the peak of
memory is that of a process of its own, above what it held before the fit.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.whitened import fit_whitened

from . import options as opt
from .stress import Case, synthetic
from .timing import Report, ratios, timed

CLASSES, SHOTS, DIMS = (10, 100, 1000), (1, 4, 16), (512, 1024)
WRONG = 0.1  # of the labels
AUTO = "auto"
SCALED, PLAIN, CHOSEN = "scaled embeddings", "as it comes", "C by cross-validation"
_CHOSEN_UP_TO = 40_000  # logits: it fits some fifty times
Fit = Callable[[], Callable[[np.ndarray], np.ndarray]]


def problem(classes: int, shots: int, dim: int, seed: int = 1) -> Case:
    """Synthetic shots, a tenth of which have the label of another, and 2,000 test pictures."""
    case = synthetic(classes, shots, seed, dim=dim)
    labels = case.labels.clone()
    moved = torch.tensor(random.Random(seed).sample(range(len(labels)), max(2, round(WRONG * len(labels)))))
    labels[moved] = labels[moved.roll(1)]
    return case._replace(labels=labels)


def ways(case: Case) -> dict[str, Fit]:
    """Each fits once and returns what predicts class ids of embeddings [M, D]; without what would take too long."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, labels = case.images.numpy(), case.labels.numpy()
    head: TaskResClassifier = case.head
    logits, fewest = len(labels) * len(head.base), int(np.bincount(labels)[np.unique(labels)].min())

    def auto() -> Callable[[np.ndarray], np.ndarray]:
        fitted = fit_whitened(case.images, case.labels, head.base, float(head.logit_scale))
        weight, bias = fitted.weight.numpy(), fitted.bias.numpy()
        return lambda pictures: (pictures @ weight.T + bias).argmax(1)

    def of(make: Callable[[], Any]) -> Fit:
        return lambda: make().fit(images, labels).predict

    found: dict[str, Fit] = {AUTO: auto}
    found[PLAIN] = of(lambda: LogisticRegression(max_iter=1000))
    found[SCALED] = of(lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)))
    if logits <= _CHOSEN_UP_TO and fewest > 1:
        folds = StratifiedKFold(min(5, fewest), shuffle=True, random_state=0)
        grid = list(np.logspace(-2, 4, 7))
        found[CHOSEN] = of(
            lambda: LogisticRegressionCV(Cs=grid, cv=folds, max_iter=1000, l1_ratios=(0.0,), scoring="neg_log_loss",
                                         use_legacy_attributes=False)
        )  # fmt: skip
    return found


def measure(classes: int, shots: int, dim: int) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """CPU and wall seconds of each way by round, and accuracies in percent."""
    case = problem(classes, shots, dim)
    found = ways(case)
    pictures, truth = case.test.numpy(), case.truth.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # folds that lack a class
        accuracies = {name: 100.0 * float((fit()(pictures) == truth).mean()) for name, fit in found.items()}
        rounds = 1 if len(case.labels) * classes > 1_000_000 else 3
        return timed(found, rounds=rounds), accuracies


_FIT = """
import json, sys
from benchmarks.solver import AUTO, problem, ways

def memory(name):
    return int(open("/proc/self/status").read().split(name)[1].split()[0]) / 1024

classes, shots, dim = map(int, sys.argv[2:])
ways(problem(2, 2, dim))[sys.argv[1]]()  # loads what fitting uses
fit = ways(problem(classes, shots, dim))[sys.argv[1]]
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
fit()
print(json.dumps(memory("VmHWM:") - before))
"""


def peak(way: str, classes: int, shots: int, dim: int) -> float:
    """MiB that a fit takes at most, above the shots themselves (Linux)."""
    command = [sys.executable, "-W", "ignore", "-c", _FIT, way, str(classes), str(shots), str(dim)]
    return float(
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    )


def solver(report: Report, dim: int = 512) -> None:
    """Rows for `python -m benchmarks`, of a size that takes seconds."""
    for classes, shots in ((10, 16), (100, 16), (1000, 4)):
        found, accuracies = measure(classes, shots, dim)
        for way in found:
            if way not in (AUTO, PLAIN):
                note = f"{accuracies[AUTO]:.1f} % against {accuracies[way]:.1f} % right"
                name = f"recipe auto / logistic regression, {way}, K={classes}, {shots} shots, D={dim}"
                report.add_ratio(name, found, AUTO, way, 1.0, note)


def rows(classes: Sequence[int], shots: Sequence[int], dims: Sequence[int]) -> list[list[str]]:
    """One row a size: what `auto` takes, and how many times that each way of scikit-learn takes."""
    lines = []
    for dim in dims:
        for count in classes:
            for each in shots:
                found, accuracies = measure(count, each, dim)
                seconds = median(wall for _, wall in found[AUTO])
                line = [f"{dim}", f"{count:,}", f"{each}", f"{seconds:.3g}", f"{peak(AUTO, count, each, dim):.0f}"]
                line.append(f"{accuracies[AUTO]:.1f}")
                for way in (PLAIN, SCALED, CHOSEN):
                    if way not in found:
                        line += ["", ""]
                        continue
                    line += [f"{median(ratios(found, way, AUTO)['wall']):.2g}", f"{accuracies[way]:.1f}"]
                lines.append(line)
                print(*line, sep=" | ", file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = opt.parser(__doc__, seeds=1, shots=SHOTS)
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS))
    options = opt.read(parser)
    columns = ["D", "K", "shots", "seconds", "MiB", "right"]
    for way in (PLAIN, SCALED, CHOSEN):
        columns += [f"{way}: times as long", "right"]
    title = f"One fit of recipe `auto`, and scikit-learn's logistic regression, {torch.get_num_threads()} threads"
    print(Table(columns, rows(options.classes, options.shots, options.dims), title).markdown())


if __name__ == "__main__":
    main()
