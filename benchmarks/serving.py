"""Goals 4 to 6: inference through `pipeline`, loading, swapping, start-up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection, pipeline

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.base_model import load_image_tower
from taskres_hf.embedding import use_engine
from taskres_hf.encoders import BaseSource
from taskres_hf.picture_files import find_images
from taskres_hf.pictures import read_image

from .material import clip_folder, jpeg_folder, obstacle
from .timing import Report, timed


def _artifact(base: str, classes: int, folder: str) -> str:
    model = TaskResCLIPForImageClassification.from_base(base, [f"thing number {k}" for k in range(classes)])
    with torch.no_grad():
        model.classifier.residual.normal_()
    model.save_pretrained(folder)
    return folder


def inference(report: Report) -> None:
    base = clip_folder(32)
    pictures = [read_image(file) for file in find_images([jpeg_folder(640, (400, 300), 40)])[:32]]
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
    processor = CLIPImageProcessor()

    def bare(batch: list[Any]) -> None:
        with torch.no_grad():
            for start in range(0, len(pictures[: len(batch)]), 32):
                clip.get_image_features(**processor(images=batch[start : start + 32], return_tensors="pt"))

    with tempfile.TemporaryDirectory() as scratch:
        for classes in (100, 1000):
            folder = _artifact(base, classes, f"{scratch}/{classes}")
            ours = pipeline("image-classification", model=folder)
            fast = pipeline("image-classification", model=folder)
            form = use_engine(fast.model)
            no_bf16 = obstacle("torch", "bf16")
            half = None if no_bf16 else pipeline("image-classification", model=folder, dtype=torch.bfloat16)
            for size in (1, 32):
                found = timed(
                    {
                        "bare": lambda size=size: [bare(pictures[:size]) for _ in range(32 // size // 2 or 1)],
                        "pipeline": lambda size=size: [
                            ours(pictures[:size], batch_size=size) for _ in range(32 // size // 2 or 1)
                        ],
                    },
                    rounds=9,
                )
                name = f"pipeline / bare tower and preprocessing, batch {size}, K={classes}"
                report.add_ratio(name, found, "pipeline", "bare", 1.05, "ViT-B/32")
            labels = ours.model.class_names
            zero_shot = pipeline("zero-shot-image-classification", model=base)
            rounds = 3 if classes == 100 else 1
            ways = {
                "zero-shot": lambda labels=labels: zero_shot(pictures[0], candidate_labels=labels),
                "ours": lambda: ours(pictures[0]),
                "engine": lambda: fast(pictures[0]),
            }
            if half is not None:
                ways["half"] = lambda: half(pictures[0])
            found = timed(ways, rounds=rounds)
            goal = 9.0 if classes == 100 else 85.0
            name = f"times faster than the zero-shot pipeline, K={classes}"
            note = "one picture, ViT-B/32"
            report.add_ratio(f"{name}, fp32", found, "ours", "zero-shot", goal, note, invert=True)
            row = f"{name}, with use_engine"
            report.add_ratio(row, found, "engine", "zero-shot", goal, f"{note}; {form}", invert=True)
            if half is None:
                report.skip(f"{name}, bf16", str(no_bf16))
                continue
            report.add_ratio(f"{name}, bf16", found, "half", "zero-shot", goal, note, invert=True)


def loading(report: Report) -> None:
    base = clip_folder(32)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _artifact(base, 1000, f"{scratch}/a")
        other = _artifact(base, 1000, f"{scratch}/b")
        live = TaskResCLIPForImageClassification.from_pretrained(folder)
        five = range(5)
        swap = [TaskResCLIPForImageClassification.from_pretrained(other, base_model=live.clip), live]
        found = timed(  # five at a time: one takes milliseconds
            {
                "stock": lambda: [
                    CLIPVisionModelWithProjection.from_pretrained(base, dtype=torch.float32) for _ in five
                ],
                "tower": lambda: [load_image_tower(BaseSource(base)) for _ in five],
                "artifact": lambda: [TaskResCLIPForImageClassification.from_pretrained(folder) for _ in five],
            },
            rounds=15,
        )
        note = "605 MB checkpoint, second load"
        report.add_ratio("loading the tower / the stock loader", found, "tower", "stock", 0.3, note)
        report.add_ratio("loading a whole artifact, K=1,000 / the stock loader", found, "artifact", "stock", 1.0, note)

        def exchange() -> None:
            for _ in range(1000):
                live.use_classifier(swap[0])

        seconds = timed({"swap": exchange}, rounds=5)["swap"]
        report.add(
            "swapping a classifier, K=1,000 (ms)", [wall for _, wall in seconds], 1.0, note="per 1 of 1,000 swaps"
        )


def start_up(report: Report) -> None:
    command = Path(sys.executable).parent / "taskres"

    def run(*arguments: str) -> None:
        subprocess.run(arguments, check=True, capture_output=True)

    import os
    import time
    from statistics import median

    def child_cpu(*arguments: str) -> float:
        before = os.times()
        run(*arguments)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    pairs = []
    for turn in range(12):
        start = time.perf_counter()
        cpu_help = child_cpu(str(command), "--help")
        middle = time.perf_counter()
        cpu_imports = child_cpu(sys.executable, "-c", "import typer, rich")
        end = time.perf_counter()
        if turn:
            pairs.append(((middle - start) / (end - middle), cpu_help / max(cpu_imports, 1e-3)))
    note = f"cpu {median(pair[1] for pair in pairs):.2f}"
    report.add('taskres --help / python -c "import typer, rich"', [pair[0] for pair in pairs], 3.0, note=note)
