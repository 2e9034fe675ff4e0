"""`python -m benchmarks.engine_parts`: what each part of the rewritten tower earns, switched off beside the whole.

ViT-B/32 and ViT-B/16 with random weights, on one core, decoding left out. Each number is the CPU time of a pass with
the part off over that of the whole form, timed in turn in one process: 1.10 is a part that earns 10 %. Each kind of
processor is a process of its own: this machine as it is, and this same machine with oneDNN, torch and MKL held to AVX2
by their environment variables, which is not quite a processor that has no more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import CLIPModel

from taskres_hf.embedding.engines import onednn, rewriting
from taskres_hf.embedding.engines.onednn import onednn_int8
from taskres_hf.encoders import encode_images, family_of
from taskres_hf.machine import is_faster, processor
from taskres_hf.tables import Table

from .material import clip_folder
from .timing import HELD, ratios, timed

KINDS: dict[str, dict[str, str]] = {"as it is": {}, "held to AVX2": HELD["avx2"]}


@contextmanager
def _without(part: str) -> Iterator[None]:
    """The tower is rewritten without a part."""
    family = family_of
    off: dict[str, list[Any]] = {
        "weights laid out once for oneDNN": [
            patch.object(rewriting, "onednn", lambda dtype: None), patch.object(onednn, "onednn", lambda dtype: None),
        ],
        "activation within the product": [patch.object(rewriting, "packed_mlp", lambda *_: None)],
        _LAST: [
            patch.object(rewriting, "family_of", lambda base: replace(family(base), reads_first_token=False))
        ],
    }  # fmt: skip
    switches = off.get(part, [])
    for switch in switches:
        switch.start()
    try:
        yield
    finally:
        for switch in switches:
            switch.stop()


_LAST = "last layer for the first token alone"
_FLOATS = ["weights laid out once for oneDNN", "activation within the product", _LAST]
PARTS = {"fp32": _FLOATS, "bf16": _FLOATS, "int8": [_LAST]}
STOCK, COMPILED = "everything: the tower as it is, in fp32", "everything, and torch.compile in its place"
TOWERS = {32: 8, 16: 4}  # pixels of a patch, and pictures a pass
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """By tower and form, by part: the median of the time without the part over the time with it."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for size, pictures in TOWERS.items():
        clip = CLIPModel.from_pretrained(clip_folder(size), dtype=torch.float32).eval()
        values = torch.randn(pictures, 3, 224, 224)
        for form, parts in PARTS.items():
            if (form == "bf16" and not is_faster(torch.bfloat16)) or (form == "int8" and onednn_int8() is None):
                continue
            ways: dict[str, Callable[[], Tensor]] = {STOCK: _pass(clip, values)}
            for part in ["", *parts]:
                with torch.no_grad(), _without(part):
                    ways[part] = _pass(rewriting.rewritten(clip, _DTYPES[form]), values)
            if form == "fp32" and shutil.which(os.environ.get("CXX", "g++")):
                ways[COMPILED] = torch.compile(_pass(clip, values))
            times = timed(ways, rounds=rounds)
            found[f"{form} {size}"] = {part: median(ratios(times, part, "")["cpu"]) for part in ways if part}
    return found


def _pass(tower: Any, values: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return encode_images(tower, {"pixel_values": values})

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="measure this very process and print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.json:
        print(json.dumps(measure(options.rounds)))
        return
    found = {}
    for kind, variables in KINDS.items():
        command = [sys.executable, "-m", "benchmarks.engine_parts", "--json", "--rounds", str(options.rounds)]
        done = subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    print(f"{processor()}, torch {torch.__version__}, one core; time without a part over time with it\n")
    rows = []
    for form, parts in PARTS.items():
        for part in [STOCK, *([COMPILED] if form == "fp32" else []), *parts]:
            numbers = [found[kind].get(f"{form} {size}", {}).get(part) for kind in KINDS for size in TOWERS]
            rows.append([form, part, *("-" if number is None else f"{number:.2f}" for number in numbers)])
    columns = [f"ViT-B/{size}, {kind}" for kind in KINDS for size in TOWERS]
    print(Table(["form", "switched off", *columns], rows).markdown())


if __name__ == "__main__":
    main()
