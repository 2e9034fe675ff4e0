"""`python -m benchmarks.scale`: what a million pictures cost on this machine, a billion by arithmetic, and training.

    python -m benchmarks.scale rates        # decode, embed, classify, write: measured, and a million of each
    python -m benchmarks.scale plan         # a billion, from rates that you give or that were measured here
    python -m benchmarks.scale training     # recipe paper from embeddings on disk, one process and two on gloo

Rates are those of the shipped base and of pictures made here, in one process of one thread; a larger base embeds more
slowly, so measure yours: `--base-model`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskres_hf.tables import Table

HOUR, GB, TB = 3600.0, 1e9, 1e12
SIZES = {"224 x 224": (224, 224), "500 x 375": (500, 375)}
BLOCK = 1000  # pictures of what is measured
CLASSES = 1000


def rate(work: Callable[[], Any], count: int, rounds: int = 3) -> float:
    """Pictures a second of the fastest of some rounds: what else runs on the machine only slows."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def jpegs(size: tuple[int, int], count: int) -> list[bytes]:
    """Pictures with edges and shades, as JPEG of quality 90."""
    import PIL.Image

    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = PIL.Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        content = io.BytesIO()
        coarse.resize(size, PIL.Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        found.append(content.getvalue())
    return found


def rates(base: str) -> dict[str, float]:
    """Pictures a second of each step alone, and of all together as `taskres embed` does them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from taskres_hf.cluster import embed
    from taskres_hf.cluster.outputs import read_part
    from taskres_hf.embedding.embedder import Embedder
    from taskres_hf.pictures import read_image
    from taskres_hf.pool import ClassifierPool
    from taskres_hf.residual import TaskResClassifier
    from taskres_hf.storage import write_bytes

    pool = ClassifierPool(base)
    embedder = Embedder(pool.clip, pool.image_processor)
    found: dict[str, float] = {}
    for name, size in SIZES.items():
        pictures = jpegs(size, 200)
        found[f"decode, {name}"] = rate(lambda some=pictures: [read_image(one) for one in some], len(pictures))
    read = [read_image(one) for one in pictures[:64]]
    embedder(read[:2])
    found["prepare and embed"] = rate(lambda: embedder(read), len(read))
    dim = embedder(read[:1]).shape[1]
    embeds = torch.randn(BLOCK, dim)
    head = TaskResClassifier(torch.randn(CLASSES, dim))
    with torch.no_grad():
        found[f"classify, {CLASSES} classes"] = rate(lambda: head(embeds).topk(1), BLOCK)
    rows = np.random.default_rng(0).standard_normal((50 * BLOCK, dim)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), dim)
            sink = io.BytesIO()
            pq.write_table(pa.table({"embedding": values}), sink)
            write_bytes(Path(folder, "part.parquet"), sink.getbuffer())

        found["write parquet, fp32"] = rate(write, len(rows))
        data = pa.table({"image": jpegs(SIZES["500 x 375"], BLOCK)})
        pq.write_table(data, Path(folder, "data.parquet"), row_group_size=250)
        start = time.perf_counter()
        embed(Path(folder, "data.parquet"), base, Path(folder, "out"), progress=False)
        found["all of it, 500 x 375"] = BLOCK / (time.perf_counter() - start)
        found["finished parts looked at"] = rate(lambda: [read_part(Path(folder, "out"), 0) for _ in range(100)], 100)
    return found


def print_rates(base: str) -> None:
    found = rates(base)
    lines = [[name, f"{value:,.0f}", f"{1e6 / value / HOUR:.2f}"] for name, value in found.items()]
    title = f"One process, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(Table(["step", "pictures a second", "core hours a million"], lines, title).markdown(), "\n")


# ---------------------------------------------------------------------- arithmetic


def plan(asked: argparse.Namespace) -> list[list[str]]:
    """What so many pictures cost at given rates."""
    count, core, gpu = asked.pictures, asked.core_rate, asked.gpu_rate
    blocks = -(-count // asked.rows_per_block)
    hours = count / core / HOUR
    block = asked.rows_per_block / core
    lines = [
        ["embeddings, fp32", f"{count * asked.dim * 4 / TB:.2f} TB"],
        ["embeddings, fp16", f"{count * asked.dim * 2 / TB:.2f} TB"],
        ["ids and errors, 40 bytes a row before compression", f"{count * 40 / GB:.0f} GB"],
        [f"pictures read, {asked.picture_kb:g} kB each", f"{count * asked.picture_kb * 1e3 / TB:.0f} TB"],
        [f"hours of a core at {core:g} pictures a second", f"{hours:,.0f}"],
        [f"days on {asked.cores} cores", f"{hours / asked.cores / 24:.1f}"],
        [f"hours of a GPU at {gpu:g} pictures a second" if gpu else "hours of a GPU",
         f"{count / gpu / HOUR:,.0f}" if gpu else "not measured: give --gpu-rate"],
        [f"blocks of {asked.rows_per_block:,}", f"{blocks:,}"],
        ["bytes of a part, fp32", f"{asked.rows_per_block * asked.dim * 4 / 1e6:.0f} MB"],
        ["a block, on one core", f"{block / 60:.1f} minutes"],
        ["a killed worker costs at most", f"{block / 60:.1f} core minutes, {100 / blocks:.4f} % of the work"],
        [f"a killed run of {asked.cores} workers costs at most", f"{asked.cores * block / HOUR:.1f} core hours, "
         f"{100 * min(1.0, asked.cores / blocks):.2f} % of the work"],
        [f"parts looked at when it goes on, {asked.footer_ms:g} ms each",
         f"{blocks * asked.footer_ms / 60_000:.1f} minutes"],
        ["manifest, 300 bytes a block", f"{blocks * 300 / 1e6:.0f} MB"],
    ]  # fmt: skip
    return lines


# ---------------------------------------------------------------------- training

_TRAIN = """
import json, os, sys, time
import numpy as np, torch
torch.set_num_threads(1)
from taskres_hf import TaskResCLIPForImageClassification as Model, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_model
from taskres_hf.embedding import StoredFeatures
from taskres_hf.residual import TaskResClassifier
path, classes, dim, epochs, recipe = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
labels = np.load(path + ".labels.npy")
names = [f"class {k}" for k in range(classes)]
model = Model.from_base(demo_model(), ["a", "b"])
torch.manual_seed(0)
model.classifier = TaskResClassifier(10 * torch.nn.functional.normalize(torch.randn(classes, dim), dim=1))
model.config.id2label = dict(enumerate(names)); model.config.label2id = {n: k for k, n in enumerate(names)}
data = StoredFeatures(path, labels, names)
options = {"recipe": recipe, **({} if recipe == "auto" else {"num_train_epochs": epochs, "warmup_lr": 0.05})}
arguments = TaskResTrainingArguments(disable_tqdm=True, use_cpu=True, buffer_mb=64, augment_online=False, **options)
trainer = TaskResTrainer(model, arguments, data)
start = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - start
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
if trainer.accelerator.is_main_process:
    residual = model.classifier.residual.detach()
    np.save(sys.argv[6], residual.numpy())
    print(json.dumps({"processes": trainer.accelerator.num_processes, "seconds": seconds, "peak": peak}))
"""


def synthetic(path: Path, count: int, classes: int, dim: int) -> None:
    """Unit embeddings around class means, in fp16, and their labels."""
    generator = np.random.default_rng(0)
    means = generator.standard_normal((classes, dim)).astype(np.float32)
    labels = generator.integers(0, classes, count)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, dim))
    for start in range(0, count, 20_000):
        some = means[labels[start : start + 20_000]]
        some = some + 3 * generator.standard_normal(some.shape, dtype=np.float32)
        table[start : start + 20_000] = some / np.linalg.norm(some, axis=1, keepdims=True)
    table.flush()
    np.save(f"{path}.labels.npy", labels)


def training(asked: argparse.Namespace) -> None:
    lines, residuals = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "embeds.npy")
        synthetic(path, asked.embeddings, asked.classes, asked.dim)
        Path(folder, "train.py").write_text(_TRAIN)
        two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        for name, launcher, recipe in (("paper", [], "paper"), ("paper", two, "paper"), ("auto", [], "auto")):
            out = Path(folder, f"{name}{len(launcher)}.npy")
            values = [path, asked.classes, asked.dim, asked.epochs, recipe, out]
            command = [sys.executable, *launcher, str(Path(folder, "train.py")), *map(str, values)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                lines.append([name, "2" if launcher else "1", "", "", "", done.stderr.strip().splitlines()[-1][:200]])
                continue
            said = json.loads(done.stdout.strip().splitlines()[-1])
            residuals[name, said["processes"]] = np.load(out)
            each = said["seconds"] / asked.epochs
            whole = "" if name == "auto" else f"{each * asked.whole / asked.embeddings / 60:.1f}"
            lines.append([name, said["processes"], f"{said['seconds']:.1f}", whole, f"{said['peak']:.2f}", ""])
    columns = ["recipe", "processes", "seconds", f"minutes an epoch of {asked.whole:,}", "peak GiB a process", "note"]
    what = f"{asked.embeddings:,} x {asked.dim} fp16 on disk, K = {asked.classes:,}"
    title = f"{what}, {asked.epochs} epochs, one thread each"
    print(Table(columns, lines, title).markdown(), "\n")
    if {("paper", 1), ("paper", 2)} <= set(residuals):
        one, other = residuals["paper", 1], residuals["paper", 2]
        apart, largest = abs(one - other).max(), abs(one).max()
        print(f"Residual of two processes against one: largest difference {apart:.2g}, largest number {largest:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["rates", "plan", "training"], default="rates")
    parser.add_argument("--base-model", help="by default the shipped one")
    parser.add_argument("--pictures", type=int, default=1_000_000_000)
    parser.add_argument("--core-rate", type=float, help="pictures a second of a core; by default measured here")
    parser.add_argument("--gpu-rate", type=float, help="pictures a second of a GPU; nothing is assumed")
    parser.add_argument("--cores", type=int, default=1000)
    parser.add_argument("--picture-kb", type=float, default=50.0)
    parser.add_argument("--rows-per-block", type=int, default=10_000)
    parser.add_argument("--footer-ms", type=float, default=1.0)
    parser.add_argument("--embeddings", type=int, default=100_000)
    parser.add_argument("--whole", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import datasets
    import transformers

    from taskres_hf.demo import demo_model

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = asked.base_model or demo_model()
    if asked.what == "rates":
        print_rates(base)
    elif asked.what == "training":
        training(asked)
    else:
        asked.core_rate = asked.core_rate or rates(base)["all of it, 500 x 375"]
        title = f"{asked.pictures:,} pictures, D = {asked.dim}; arithmetic, not measured"
        print(Table(["what", "how much"], plan(asked), title).markdown(), "\n")


if __name__ == "__main__":
    main()
