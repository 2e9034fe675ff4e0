"""`python -m benchmarks.reading`: from picture files to embeddings: how often files are read, and where the time goes.

    python -m benchmarks.reading                      # ratios, seconds and memory; some minutes
    python -m benchmarks.reading --profile            # where the time goes, by py-spy; writes docs/images/reading.svg

`before` is what the library did until 0.1: read every file to tell which are known, one after the other, then read and
decode each again. Before each round files are dropped from memory, where the system does that for its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from transformers import CLIPImageProcessor, CLIPModel

from taskres_hf.data.labelled import LabelledImages
from taskres_hf.data.reading import FileCells
from taskres_hf.demo import demo_model
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import embed_images
from taskres_hf.pictures import picture_digest, read_image
from taskres_hf.tables import Table

from .material import OUT, clip_folder, jpeg_folder
from .timing import ratios, timed

SMALL, CAMERA = (400, 300), (4000, 3000)
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "reading.svg"
# What a sample of a stack belongs to, by a function in it; the first that is there counts.
STEPS = {
    "digest of the weights": ("image_weights_digest",),
    "tower": ("embed (taskres_hf/embedding/embedder.py",),
    "resize and normalise": ("prepare (taskres_hf/embedding/preprocessing.py", "Preprocessor.prepare"),
    "decode": ("read_image", "load_image"),
    "read and digest": ("read_once", "FileDigests.find"),
    "cache": ("KeptRows", "FileDigests", "write_tensors"),
}


def embedder(base: str, engine: str = "auto") -> Embedder:
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
    made = Embedder(clip, CLIPImageProcessor.from_pretrained(base), engine, engine)
    made.get_ready()
    return made


def labelled(files: Sequence[str]) -> LabelledImages:
    return LabelledImages.from_cells(FileCells(files), [row % 2 for row in range(len(files))], ["a", "b"])


def files_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.jpg"))


def many(count: int, size: tuple[int, int] = SMALL) -> list[str]:
    """So many files of different content: bytes after the end of a JPEG are no part of the picture."""
    folder = OUT / f"many-{size[0]}x{size[1]}-{count}"
    if not folder.exists():
        made = jpeg_folder(640, size, 40) if size == SMALL else jpeg_folder(32, size, 1)
        sources = [Path(name).read_bytes() for name in files_in(made)]
        for number in range(count):
            place = folder / f"class {number % 40:02d}" / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(sources[number % len(sources)] + number.to_bytes(4, "big"))
        time.sleep(11)  # files that are newer are read again the next time
    return files_in(folder)


def forget(files: Sequence[str]) -> None:
    """Drop files from the system's memory, so that reading them is reading a disk."""
    for name in files if hasattr(os, "posix_fadvise") else ():
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def before(made: Embedder, files: Sequence[str]) -> torch.Tensor:
    """A first pass as it was: all digests, one after the other, then all pictures once more; the weights twice."""
    assert made.key == made.key
    for name in files:
        picture_digest(name)
    size = made.batch_size
    batches = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
    stream = made.stream(batches, lambda row: read_image(files[row]), False, size, len(batches))
    return torch.cat([embeds for _, embeds in stream if embeds is not None])


def first_pass(base: str, files: Sequence[str], rounds: int) -> list[float]:
    """Seconds of a first pass over those of before, round by round; and that the embeddings are the same."""
    made = embedder(base)
    images = labelled(files)

    def ours() -> Any:
        forget(files)
        with tempfile.TemporaryDirectory() as cache:
            return embed_images(made, images, cache_dir=cache, progress=False)

    def theirs() -> Any:
        forget(files)
        return before(made, files)

    assert torch.equal(ours().image_embeds[0], theirs())
    found = timed({"ours": ours, "before": theirs}, rounds)
    return ratios(found, "ours", "before")["wall"]


def second_pass(files: list[str], added: int = 10) -> Iterator[tuple[str, str, str]]:
    """Rows: a folder that is embedded already, unchanged; with pictures added; and how long reading it takes."""
    made, picture = embedder(demo_model()), read_image(files[0])
    with tempfile.TemporaryDirectory() as name:
        cache, new = Path(name) / "cache", Path(name) / "new"
        new.mkdir()
        with mock.patch.object(LabelledImages, "image", return_value=picture):  # what the cache holds does not matter
            embed_images(made, labelled(files), cache_dir=cache, progress=False)

        def again(wanted: Sequence[str] = files, kept: Path | None = cache) -> None:
            embed_images(made, labelled(wanted), cache_dir=kept, progress=False)

        def read() -> None:
            for path in files:
                Path(path).read_bytes()

        def digest() -> None:
            for path in files:
                picture_digest(path)

        found = timed({"again": again, "read": read, "digest": digest}, 3)
        seconds = {way: median(wall for _, wall in pairs) for way, pairs in found.items()}
        for way, what in (
            ("again", "second pass, unchanged"),
            ("digest", "reading and digesting, one after the other"),
        ):
            unit = f"{median(ratios(found, way, 'read')['wall']):.2f} of reading them"
            yield what, f"{seconds[way]:.2f} s", unit
        for number in range(added):
            (new / f"{number}.jpg").write_bytes(Path(files[number]).read_bytes() + b"new")
        mixed = sorted([*files, *files_in(new)], key=os.path.basename)
        start = time.perf_counter()
        again(mixed)
        yield f"second pass, {added} pictures added", f"{time.perf_counter() - start:.2f} s", ""


def peak(way: str, count: int) -> None:
    """Print the most memory of a process that embeds camera-size pictures, in MB, beyond what it had before."""
    made, files = embedder(clip_folder(32)), many(100, CAMERA)[:count]
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: embed_images(made, labelled(files), progress=False),
        "before": lambda: before(made, files),
    }
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run[way]()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)


def measure(count: int, rounds: int) -> None:
    """Print what the module says."""
    rows = []
    for what, base, files in (
        ("400x300, shipped base", demo_model(), many(10_000)[:650]),
        ("400x300, ViT-B/32", clip_folder(32), many(10_000)[:200]),
        ("4000x3000, ViT-B/32", clip_folder(32), many(100, CAMERA)),
    ):
        found = first_pass(base, files, rounds)
        rows.append([what, str(len(files)), *(f"{value:.2f}" for value in (median(found), min(found), max(found)))])
    print(Table(["first pass over before", "pictures", "median", "min", "max"], rows).markdown())
    print()
    for what, files in ((f"{count:,} files of 400x300", many(10_000)[:count]), ("100 of 4000x3000", many(100, CAMERA))):
        print(Table([what, "", ""], [list(row) for row in second_pass(files)]).markdown())
        print()
    rows = [[str(number), *(_asked(way, number) for way in ("ours", "before"))] for number in (50, 100)]
    print(Table(["pictures of 4000x3000", "most memory beyond the loaded model, MB", "before"], rows).markdown())


def _asked(way: str, number: int) -> str:
    command = [sys.executable, "-m", "benchmarks.reading", "--peak", way, str(number)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


# ---------------------------------------------------------------------- where the time goes


def once(kind: str) -> None:
    """Embed a folder, for a profiler to watch."""
    files = many(100, CAMERA) if kind == "camera" else many(10_000)[:480]
    made = embedder(clip_folder(32))
    with tempfile.TemporaryDirectory() as cache:
        embed_images(made, labelled(files), cache_dir=cache, progress=False)


def stacks(kind: str, rate: int = 200) -> Counter[tuple[str, ...]]:
    """Samples of each stack, from the embedding's own functions on; threads that wait are not sampled."""
    found: Counter[tuple[str, ...]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if spy is None:
            sys.exit("The profiler is missing: pip install py-spy")
        command = [spy, "record", "--function", "--nonblocking", "-r", str(rate), "-f", "raw", "-o", f"{folder}/raw"]
        child = [sys.executable, "-m", "benchmarks.reading", "--once", kind]
        subprocess.run([*command, "--", *child], check=True, capture_output=True)
        for line in Path(folder, "raw").read_text(encoding="utf-8").splitlines():
            stack, _, count = line.rpartition(" ")
            frames = stack.split(";")
            own = [place for place, frame in enumerate(frames) if "taskres_hf/embedding/" in frame]
            if own and any("embed_images" in frame or "_worker" in frame for frame in frames):
                found[tuple(frames[own[0] :])] += int(count)
    return found


def step(frames: Sequence[str]) -> str:
    """What a stack is at."""
    for name, marks in STEPS.items():
        if any(mark in frame for frame in frames for mark in marks):
            return name
    return "else"


def draw(found: Counter[tuple[str, ...]], title: str, path: Path, deepest: int = 14, least: float = 0.004) -> None:
    """Stacks as a flame graph: a bar is a function, as wide as its share of the time, upon the one that called it."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["svg.hashsalt"] = "none", "taskres"
    total = sum(found.values())
    colours = dict(
        zip(
            [*STEPS, "else"], ("#C9C9C9", "#9DC3E6", "#F4B183", "#FFD966", "#A9D18E", "#D9B3FF", "#EEEEEE"), strict=True
        )
    )
    figure = Figure(figsize=(9.0, 0.28 * deepest + 0.9), layout="constrained")
    axes = figure.add_subplot()

    def bars(stacks: list[tuple[tuple[str, ...], int]], left: float, level: int) -> None:
        groups: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for frames, count in stacks:
            if level < min(len(frames), deepest):
                groups.setdefault(frames[level], []).append((frames, count))
        for name, inside in sorted(groups.items(), key=lambda pair: (step(pair[1][0][0]), pair[0])):
            width = sum(count for _, count in inside) / total
            if width >= least:
                steps = Counter[str]()
                for frames, count in inside:
                    steps[step(frames)] += count
                colour = colours[steps.most_common(1)[0][0]] if len(steps) == 1 else "#EEEEEE"
                axes.barh(level, width, 0.94, left, color=colour, edgecolor="white", linewidth=0.6)
                text = name.partition(" (")[0]
                if 100 * width > 0.85 * len(text):
                    axes.text(left + width / 2, level, text, ha="center", va="center", fontsize=7)
                bars(inside, left, level + 1)
            left += width

    bars(sorted(found.items()), 0.0, 0)
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.set(xlim=(0, 1), ylim=(-0.6, deepest), yticks=[], xlabel="share of the time of all threads")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=7, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def profile() -> None:
    """Print the share of each step, and draw that of camera-size pictures."""
    rows = []
    for kind, what in (("small", "400x300, ViT-B/32"), ("camera", "4000x3000, ViT-B/32")):
        found = stacks(kind)
        shares: Counter[str] = Counter()
        for frames, count in found.items():
            shares[step(frames)] += count
        total = sum(shares.values())
        rows.append([what, *(f"{100 * shares[name] / total:.1f} %" for name in [*STEPS, "else"])])
        if kind == "camera":
            draw(found, f"Embedding a folder of pictures: {what}, {total} samples", FIGURE)
    print(Table(["share of the time of all threads", *STEPS, "else"], rows).markdown())


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=10_000, help="files of the second pass")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--profile", action="store_true", help="where the time goes; needs py-spy")
    made.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    made.add_argument("--once", help=argparse.SUPPRESS)
    options = made.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
    elif options.once:
        once(options.once)
    elif options.profile:
        profile()
    else:
        measure(options.count, options.rounds)


if __name__ == "__main__":
    main()
