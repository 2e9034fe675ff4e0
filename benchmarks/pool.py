"""The tables of docs/pool.md: many classifiers over one base, in a pool and as models of their own.

python -m benchmarks.pool [--classifiers 1000] [--folder FOLDER]

Classifiers of 2 to 50 classes over the shipped base, of random residuals, which cost what trained ones cost; 64 shipped
pictures. All ways run in turn in one process on one thread, the order rotates, and CPU time is what is compared.
Memory is the growth of the resident set of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification
from taskres_hf.demo import demo_dataset, demo_model
from taskres_hf.pool import Pack, pack, pack_with_base
from taskres_hf.tables import Table

from .timing import timed

PICTURES, FEWEST, MOST, ALONE = 64, 2, 50, 10
POOL_FOLDERS, POOL_PACK, PLAIN = "pool, from folders", "pool, from a packed file", "models over one base"


def make(root: Path, count: int, seed: int = 1) -> tuple[list[Path], int]:
    """Artifacts in folders, and how many classes they have together."""
    draw, made, total = random.Random(seed), [], 0
    clip: Any = demo_model()
    for number in range(count):
        classes = draw.randint(FEWEST, MOST)
        total += classes
        made.append(root / f"c{number:04d}")
        if made[-1].is_dir():
            continue
        model = TaskResCLIPForImageClassification.from_base(clip, [f"thing {number} {k}" for k in range(classes)])
        with torch.no_grad():
            model.classifier.residual.normal_(generator=torch.Generator().manual_seed(number))
        model.save_pretrained(made[-1])
        clip = model.clip
    return made, total


def load_models(folders: list[Path]) -> dict[str, TaskResCLIPForImageClassification]:
    """The plain way: a model for each, which share the base."""
    first = TaskResCLIPForImageClassification.from_pretrained(folders[0])
    rest = (TaskResCLIPForImageClassification.from_pretrained(folder, base_model=first.clip) for folder in folders[1:])
    return {folder.name: model for folder, model in zip(folders, [first, *rest], strict=True)}


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _child(way: str, root: str, file: str) -> None:
    """In a fresh process: seconds and megabytes that loading takes, after one classifier and its base are there."""
    warnings.simplefilter("ignore")
    folders = sorted(Path(root).iterdir())
    embeds = torch.ones(1, 192)
    if way == PLAIN:
        first = load_models(folders[:1])
        first[folders[0].name](image_embeds=embeds)
    else:
        pool = ClassifierPool(classifiers=folders[:1])
        pool.logits(embeds)
    before, begin = _resident(), time.process_time()
    if way == PLAIN:
        shared = first[folders[0].name].clip
        kept: Any = [TaskResCLIPForImageClassification.from_pretrained(one, base_model=shared) for one in folders]
    elif way == POOL_FOLDERS:
        pool.update(folders)
        kept = pool
    else:
        pool.update(Pack(file))
        kept = pool
    print(json.dumps([time.process_time() - begin, _resident() - before, len(kept)]))


def loading(root: Path, file: Path, rounds: int) -> Table:
    """Seconds and memory of loading all, in fresh processes, in turn."""
    found: dict[str, list[list[float]]] = {way: [] for way in (POOL_FOLDERS, POOL_PACK, PLAIN)}
    for _ in range(rounds):
        for way, rows in found.items():
            command = [sys.executable, "-m", "benchmarks.pool", "--child", way, str(root), str(file)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    seconds = {way: median(row[0] for row in rows) for way, rows in found.items()}
    memory = {way: median(row[1] for row in rows) for way, rows in found.items()}
    cells = [
        [way, f"{seconds[way]:.2f}", f"{seconds[PLAIN] / seconds[way]:.3g}", f"{memory[way]:.0f}",
         f"{memory[PLAIN] / memory[way]:.3g}"]
        for way in found
    ]  # fmt: skip
    columns = ["way", "CPU seconds", "times less", "MB more", "times less memory"]
    return Table(columns, cells, title="Loading all of them, the base being there")


def classifying(folders: list[Path], rounds: int) -> Table:
    """CPU time of classifying 64 pictures, of each way."""
    pool, models = ClassifierPool(classifiers=folders), load_models(folders)
    rows = demo_dataset("food")["test"]
    pictures = [rows[number % len(rows)]["image"].convert("RGB") for number in range(PICTURES)]
    own = random.Random(2).choices(list(models), k=PICTURES)
    first = models[folders[0].name]

    def embed() -> torch.Tensor:
        pixels = first.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return first.get_image_features(pixels)

    embeds, processor = embed(), first.image_processor
    differ = max(
        float((logits - models[name](image_embeds=embeds).logits).abs().max() / logits.abs().max())
        for name, logits in pool.logits(embeds).items()
    )
    print(f"Largest difference of a logit from its own model's, as a share of the largest: {differ:.1e}\n")

    @torch.no_grad()
    def each(of: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        given = of()
        return [models[name](image_embeds=given[place : place + 1]).logits for place, name in enumerate(own)]

    @torch.no_grad()
    def all_of(of: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        given = of()
        return [model(image_embeds=given).logits for model in models.values()]

    def pixels() -> torch.Tensor:
        return processor(images=pictures, return_tensors="pt")["pixel_values"]

    few = folders[:ALONE]
    pipelines = _pipelines(few)
    many, one = f"{PICTURES} pictures through all {len(folders):,}", f"{PICTURES} pictures, each through its own"
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        f"{many}, embeddings given": {"pool": lambda: pool.logits(embeds), "plain": lambda: all_of(lambda: embeds)},
        f"{many}, from pictures": {"pool": lambda: pool(pixels()), "plain": lambda: all_of(embed)},
        f"{one}, embeddings given": {
            "pool": lambda: pool.logits_of_each(embeds, own), "plain": lambda: each(lambda: embeds)},
        f"{one}, from pictures": {
            "pool": lambda: pool.logits_of_each(embed(), own), "plain": lambda: each(embed)},
        f"{PICTURES} pictures through {ALONE}, from pictures": {
            "pool": lambda: pool(pixels(), names=[one.name for one in few]),
            "pipeline": lambda: [ask(pictures, batch_size=PICTURES) for ask in pipelines]},
    }  # fmt: skip
    cells = []
    for name, pair in ways.items():
        found = timed(pair, rounds)
        other = next(way for way in pair if way != "pool")
        ratios = [slow[0] / fast[0] for fast, slow in zip(found["pool"], found[other], strict=True)]
        ours, theirs = (1e3 * median(cpu for cpu, _ in found[way]) for way in ("pool", other))
        spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
        what = PLAIN if other == "plain" else "a `pipeline` each"
        cells.append([name, f"{ours:.2f}", what, f"{theirs:.2f}", f"{median(ratios):.3g}", spread])
        if other == "pipeline":
            scaled, whole = theirs * len(folders) / ALONE, float(cells[1][1])
            cells.append([
                f"{many}, from pictures", cells[1][1], f"a `pipeline` each, extrapolated from {ALONE}", f"{scaled:.0f}",
                f"{scaled / whole:.3g}", "",
            ])  # fmt: skip
    return Table(["what", "pool, ms", "the other way", "its ms", "times slower", "in the rounds"], cells)


def _pipelines(folders: list[Path]) -> list[Any]:
    from transformers import pipeline

    return [pipeline("image-classification", model=str(folder)) for folder in folders]


def measure(classifiers: int = 1000, rounds: int = 5, folder: str | None = None) -> None:
    """Print all of it, with one thread of torch meanwhile.

    Args:
        folder: keep the classifiers there, and take those that are there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(folder or scratch, "made")
        file, light = Path(scratch, "p.safetensors"), Path(scratch, "l.safetensors")
        folders, total = make(root, classifiers)
        pack_with_base(folders, file)
        pack(folders, light)
        plain = sum(one.stat().st_size for one in root.rglob("*") if one.is_file())
        print(
            f"{len(folders):,} classifiers, {total:,} classes, D = 192: 4 K D is {4 * 192 * total / 1e6:.1f} MB. "
            f"Folders {plain / 1e6:.1f} MB, packed {file.stat().st_size / 1e6:.1f} MB, without the text embeddings "
            f"{light.stat().st_size / 1e6:.1f} MB.\n",
            flush=True,
        )
        print(loading(root, file, max(1, rounds // 2)).markdown() + "\n", flush=True)
        print(classifying(folders, rounds).markdown())
    torch.set_num_threads(threads)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--classifiers", type=int, default=1000)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--folder", help="keep the classifiers there, and take those that are there")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.child:
        torch.set_num_threads(1)
        _child(*options.child)
        return
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    measure(options.classifiers, options.rounds, options.folder)


if __name__ == "__main__":
    main()
