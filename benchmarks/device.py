"""Embedding beside a GPU: how near pictures come to what the tower makes of tensors that lie on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPModel

from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.engines.devices import DeviceTower
from taskres_hf.embedding.features import embed_images
from taskres_hf.embedding.workers import WORKERS, worker_count
from taskres_hf.picture_files import find_images

from .material import clip_folder, jpeg_folder
from .timing import Report, ratios, timed

GOAL = 0.8


def device(report: Report, count: int = 20_000, rounds: int = 3) -> None:
    """Embedding rate over the tower's own, with as many processes as are taken by themselves, and with threads."""
    for patch in (32, 16):
        ways = {"processes": "", "threads": "0"}
        rows = {way: f"embedding beside a GPU / the tower's own rate, B/{patch}, {way}" for way in ways}
        if not torch.cuda.is_available():
            for row in rows.values():
                report.skip(row, "no GPU")
            continue
        clip = CLIPModel.from_pretrained(clip_folder(patch), dtype=torch.float32).eval().to("cuda")
        embedder = Embedder(clip, CLIPImageProcessor(), "auto", "auto")
        contents = [Path(file).read_bytes() for file in find_images([jpeg_folder(640, (400, 300), 40)])]
        images = LabelledImages.from_cells(_Copies(contents, range(count)), [0] * count, ["picture"])
        size = embedder.batch_size_for(count)
        tower = embedder.engine.beside
        assert tower is not None
        found = timed(
            {"tower": lambda: _resident(tower, embedder, size, count)}
            | {way: lambda number=number: _embed(embedder, images, number) for way, number in ways.items()},
            rounds=rounds,
        )
        for way, row in rows.items():
            processes = worker_count(count) if way == "processes" else 0
            note = f"{torch.cuda.get_device_name()}; {embedder.engine.name}, {size} a pass, {processes} processes"
            rate = count / min(wall for _, wall in found["tower"])
            report.add(row, ratios(found, "tower", way)["wall"], GOAL, True, f"{note}; {rate:.0f} pictures a second")


def _resident(tower: DeviceTower, embedder: Embedder, size: int, count: int) -> None:
    """The tower alone, as it runs in the other ways, on pixels that are on the device."""
    sides = (3, *(int(embedder.base.config.vision_config.image_size),) * 2)
    pixels, waits = {"pixel_values": torch.zeros(size, *sides, device=tower.device)}, []
    for _ in range(-(-count // size)):
        waits.append(tower.submit(pixels))
    for wait in waits:
        wait()


class _Copies:
    """The same JPEG files again and again, each a picture of its own by what follows its end."""

    def __init__(self, contents: Sequence[bytes], rows: Sequence[int]) -> None:
        self.contents, self.rows = contents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, bytes | None]:
        number = self.rows[row]
        return {"bytes": self.contents[number % len(self.contents)] + number.to_bytes(8, "big"), "path": None}

    def select(self, rows: Sequence[int]) -> _Copies:
        return _Copies(self.contents, [self.rows[row] for row in rows])


def _embed(embedder: Embedder, images: LabelledImages, workers: str) -> None:
    """Files in memory to embeddings on the CPU."""
    before = os.environ.get(WORKERS)
    try:
        os.environ[WORKERS] = workers
        embed_images(embedder, images, progress=False)
    finally:
        os.environ.pop(WORKERS) if before is None else os.environ.__setitem__(WORKERS, before)
