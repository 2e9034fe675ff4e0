"""Two or more things timed in turn in one process, so that only their ratio is claimed; kept by kind of processor."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from taskres_hf.machine import abilities, processor
from taskres_hf.tables import Table

RESULTS = Path(__file__).parent / "results"
# A processor with fewer abilities than this one has, as far as libraries can be held to it; ONNX Runtime cannot.
HELD = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}  # fmt: skip
PEER = "peer, times slower than ours: "


def timed(ways: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each way, per round; the order rotates, the first round is thrown away."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            ways[name]()
            if turn:
                found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def ratios(found: Mapping[str, list[tuple[float, float]]], way: str, unit: str) -> dict[str, list[float]]:
    """CPU and wall ratio of one way to another, round by round."""
    pairs = list(zip(found[way], found[unit], strict=True))
    return {"cpu": [a[0] / b[0] for a, b in pairs], "wall": [a[1] / b[1] for a, b in pairs]}


def held() -> str | None:
    """Which of `HELD` this process is held to, or None."""
    return next((name for name, values in HELD.items() if values.items() <= os.environ.items()), None)


def machine() -> dict[str, Any]:
    """What results depend on."""
    here: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    here |= {"abilities": abilities(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**here, "held_to": held()} if held() else here


def results_file() -> Path:
    """Where results of this kind of processor are kept."""
    return RESULTS / f"{f'held-to-{held()}' if held() else '-'.join(abilities())}.json"


class Report:
    """Collects results, prints them as they come, and writes them to the file of this kind of processor."""

    def __init__(self) -> None:
        self.machine = machine()
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: list[float], goal: float, higher_is_better: bool = False, note: str = "") -> None:
        """One claim: what was measured per round, and what it should be."""
        row = {
            "goal": goal,
            "higher_is_better": higher_is_better,
            "min": min(values),
            "median": median(values),
            "max": max(values),
        }
        self.rows[name] = {**row, "note": note} if note else row
        met = row["median"] >= goal if higher_is_better else row["median"] <= goal
        sign = ">=" if higher_is_better else "<="
        print(
            f"{name:58s} {row['median']:9.3f}  ({row['min']:.3f} to {row['max']:.3f})  goal {sign} {goal:g}"
            f"  {'met' if met else 'MISSED'}  {note}",
            flush=True,
        )

    def add_ratio(
        self, name: str, found: Any, way: str, unit: str, goal: float, note: str = "", invert: bool = False
    ) -> None:
        """Wall ratio against a goal, and CPU ratio beside it; `invert` gives how many times faster."""
        both = ratios(found, unit, way) if invert else ratios(found, way, unit)
        cpu = f"cpu {median(both['cpu']):.3f}"
        self.add(name, both["wall"], goal, higher_is_better=invert, note=f"{cpu}; {note}" if note else cpu)

    def skip(self, name: str, reason: str) -> None:
        """A row that has no number here, and why."""
        self.rows[name] = {"not_measured": reason}
        print(f"{name:58s} not measured: {reason}", flush=True)

    def save(self) -> None:
        """Rows that were measured now, beside those that the file has of another time."""
        file = results_file()
        before = json.loads(file.read_text())["rows"] if file.exists() else {}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"machine": self.machine, "rows": {**before, **self.rows}}, indent=1) + "\n")

    @staticmethod
    def stored() -> list[Report]:
        """What the files hold, the processor of most abilities first."""
        found = []
        for file in sorted(RESULTS.glob("*.json")):
            report, kept = Report(), json.loads(file.read_text())
            report.machine, report.rows = kept["machine"], kept["rows"]
            found.append(report)
        return sorted(found, key=lambda one: (one.held_to is not None, -len(one.machine["abilities"])))

    @property
    def held_to(self) -> str | None:
        kept: str | None = self.machine.get("held_to")
        return kept

    @property
    def kind(self) -> str:
        """The kind of processor, as a heading."""
        return f"held to {self.held_to.upper()}" if self.held_to else ", ".join(self.machine["abilities"])


def markdown(reports: Sequence[Report]) -> str:
    """The claims against their goals, each kind of processor a column, then the peers."""
    claims: list[list[str]] = []
    peers: list[list[str]] = []
    for name in dict.fromkeys(name for report in reports for name in report.rows):
        rows = [report.rows.get(name, {"not_measured": "not run"}) for report in reports]
        first = next((row for row in rows if "median" in row), {})
        if name.startswith(PEER):
            peers.append([name.removeprefix(PEER), *map(_peer_cell, rows), first.get("note", "")])
        else:
            goals = dict.fromkeys(_goal(row) for row in rows if "goal" in row)  # of each kind its own
            claims.append([name, " / ".join(goals), *map(_cell, rows), first.get("note", "")])
    kinds = [report.kind for report in reports]
    measured = Table(["measured", "goal", *kinds, "note"], claims)
    beside = Table(["way to a classifier: times slower than ours", *kinds, "what it takes, and how measured"], peers)
    return f"{measured.markdown()}\n\n{beside.markdown()}"


def _goal(row: Mapping[str, Any]) -> str:
    return f"{'>=' if row['higher_is_better'] else '<='} {row['goal']:g}"


def _cell(row: Mapping[str, Any]) -> str:
    if "not_measured" in row:
        return f"- ({row['not_measured']})"
    met = row["median"] >= row["goal"] if row["higher_is_better"] else row["median"] <= row["goal"]
    low, middle, high = (_three_digits(row[key]) for key in ("min", "median", "max"))
    return f"{middle} ({low} to {high}){'' if met else ', MISSED'}"


def _peer_cell(row: Mapping[str, Any]) -> str:
    return f"- ({row['not_measured']})" if "not_measured" in row else _three_digits(row["median"])


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}"
