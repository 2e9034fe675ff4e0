"""Two or more things timed in turn in one process, so that only their ratio is claimed."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from taskres_hf.tables import Table

RESULTS = Path(__file__).parent / "results.json"
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


class Report:
    """Collects results, prints them as they come, and writes `results.json`."""

    def __init__(self) -> None:
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
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**before, **self.rows}, indent=1) + "\n")

    @staticmethod
    def stored() -> Report:
        """What `results.json` holds."""
        report = Report()
        report.rows = json.loads(RESULTS.read_text())
        return report

    def markdown(self) -> str:
        """The claims against their goals, then the peers."""
        claims: list[list[str]] = []
        peers: list[list[str]] = []
        for name, row in self.rows.items():
            if "not_measured" in row:
                claims.append([name.removeprefix(PEER), "", "", "", "", f"not measured: {row['not_measured']}"])
            elif name.startswith(PEER):
                peers.append([name.removeprefix(PEER), _three_digits(row["median"]), row["note"]])
            else:
                met = row["median"] >= row["goal"] if row["higher_is_better"] else row["median"] <= row["goal"]
                goal = f"{'>=' if row['higher_is_better'] else '<='} {row['goal']:g}"
                numbers = [_three_digits(row[key]) for key in ("median", "min", "max")]
                note = "; ".join(filter(None, ["met" if met else "MISSED", row.get("note")]))
                claims.append([name, goal, *numbers, note])
        measured = Table(["measured", "goal", "median", "min", "max", ""], claims)
        beside = ["way to a classifier", "times slower than ours", "what it takes, and how that was measured"]
        return f"{measured.markdown()}\n\n{Table(beside, peers).markdown()}"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}"
