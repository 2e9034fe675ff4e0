"""Goals 3 and 7: an epoch against its two matrix products, linear growth, and a million embeddings from disk."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from taskres_hf import TaskResClassifier
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.training.recipes import epoch_batches, make_recipe
from taskres_hf.training.steps import loss_and_gradient, penalty_factor

from .material import OUT
from .timing import Report, ratios, timed


def _problem(count: int, classes: int, dim: int = 512) -> tuple[TaskResClassifier, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = TaskResClassifier(10 * F.normalize(torch.randn(classes, dim), dim=1))
    return head, F.normalize(torch.randn(count, dim), dim=1), torch.randint(classes, (count,))


def _epoch(head: TaskResClassifier, images: torch.Tensor, labels: torch.Tensor, closed_form: bool) -> Any:
    recipe = make_recipe("auto-v1", head, len(labels) / len(head.base), len(labels))
    optimizer = torch.optim.Adam([head.residual], lr=recipe.learning_rate, fused=True)
    factor = penalty_factor(recipe, head)
    data = ImageFeatures(images[None], labels, [""] * len(head.base), "")

    def run() -> None:
        for rows, _ in epoch_batches(len(labels), 1, recipe.train_batch_size, 1, 1):
            batch, ids = data.image_embeds[0].index_select(0, rows), labels[rows]
            if closed_form:
                _, _, head.residual.grad = loss_and_gradient(head, batch, ids, factor)
            else:
                optimizer.zero_grad()
                (F.cross_entropy(head(batch), ids) + factor * head.residual.pow(2).sum()).backward()
            optimizer.step()

    return run


def epochs(report: Report) -> None:
    for count, classes, goal in ((1600, 100, 2.6), (16_000, 1000, 1.5)):
        head, images, labels = _problem(count, classes)
        weight, error = torch.randn(classes, 512), torch.randn(256, classes)

        def products(images: torch.Tensor = images, weight: torch.Tensor = weight, error: torch.Tensor = error) -> None:
            for batch in images.split(256):
                torch.mm(batch, weight.T)
                torch.mm(error[: len(batch)].T, batch)

        many = max(1, 16_000 // count)
        found = timed(
            {
                "products": lambda: [products() for _ in range(many)],
                "by hand": lambda run=_epoch(head, images, labels, True): [run() for _ in range(many)],
                "autograd": lambda run=_epoch(head, images, labels, False): [run() for _ in range(many)],
            },
            rounds=7,
        )
        note = f"N={count}, K={classes}, D=512, products at batch 256"
        report.add_ratio(f"epoch / its two products, N={count}, K={classes}", found, "by hand", "products", goal, note)
        report.add_ratio(f"the same with autograd, N={count}, K={classes}", found, "autograd", "products", 8.0, note)


def growth(report: Report) -> None:
    """Time for twice the pictures, and twice the classes."""
    runs = {}
    for name, (count, classes) in {"one": (8000, 250), "pictures": (16_000, 250), "classes": (8000, 500)}.items():
        runs[name] = _epoch(*_problem(count, classes), True)
    found = timed(runs, rounds=7)
    for name in ("pictures", "classes"):
        report.add(f"time for twice the {name}", ratios(found, name, "one")["wall"], 2.3)


_TRAIN = """
import json, sys, time
import numpy as np, torch
from taskres_hf import TaskResCLIPForImageClassification as Model, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_model
from taskres_hf.features import StoredFeatures
path, count, classes, dim, options = sys.argv[1], *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
labels = np.load(path + ".labels.npy")
names = [f"class {k}" for k in range(classes)]
model = Model.from_base(demo_model(), ["a", "b"])
from taskres_hf.residual import TaskResClassifier
torch.manual_seed(0)
model.classifier = TaskResClassifier(10 * torch.nn.functional.normalize(torch.randn(classes, dim), dim=1))
model.config.id2label = dict(enumerate(names)); model.config.label2id = {n: k for k, n in enumerate(names)}
data = StoredFeatures(path, labels, names)
start = time.perf_counter()
arguments = TaskResTrainingArguments(disable_tqdm=True, buffer_mb=8, **options)
trainer = TaskResTrainer(model, arguments, data)
trainer.train()
status = open("/proc/self/status").read()  # ru_maxrss would count the parent before exec
peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
seconds = time.perf_counter() - start
centres = np.random.default_rng(0).standard_normal((classes, dim)).astype(np.float32)
generator, right = np.random.default_rng(1), []
for _ in range(10):
    truth = generator.integers(0, classes, 1000)
    images = centres[truth] + 3 * generator.standard_normal((1000, dim), dtype=np.float32)
    right += (model.classifier(torch.from_numpy(images)).argmax(1).numpy() == truth).tolist()
print(json.dumps({"peak": peak, "seconds": seconds, "accuracy": 100 * sum(right) / len(right)}))
"""
_BY_EPOCHS = {"num_train_epochs": 2, "warmup_lr": 0.05}


def million(report: Report, count: int = 1_280_000, classes: int = 1000, dim: int = 512) -> None:
    """1.28 million synthetic embeddings in fp16 on disk, trained in bounded memory."""
    path = OUT / f"million-{count}.npy"
    if not path.exists():
        OUT.mkdir(exist_ok=True)
        generator = np.random.default_rng(0)
        centres = generator.standard_normal((classes, dim)).astype(np.float32)
        labels = generator.integers(0, classes, count)
        table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, dim))
        for start in range(0, count, 20_000):
            chosen = labels[start : start + 20_000]
            noise = 3 * generator.standard_normal((len(chosen), dim), dtype=np.float32)
            table[start : start + 20_000] = centres[chosen] + noise
        table.flush()
        del table
        np.save(f"{path}.labels.npy", labels)
    for name, options, goal, says in (
        ("training", _BY_EPOCHS, 0.6, "all of them, 2 epochs"), ("recipe auto", {}, 1.0, "12 a class")
    ):  # fmt: skip
        command = [sys.executable, "-c", _TRAIN, str(path), str(count), str(classes), str(dim), json.dumps(options)]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        note = f"1.28 M x {dim} fp16, K={classes}, {says}, {result['accuracy']:.1f} % right"
        report.add(f"peak memory of {name} on 1.28 M embeddings (GiB)", [result["peak"]], goal, note=note)
