"""Damaged files of every kind: the answer of the whole file, an error of ours, or a cache made again; nothing else."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fuzz import harness, sources, targets
from fuzz.harness import CORPUS, Target, pack, replay, run_target, unpack

TARGETS = {**targets.OWN, **sources.BROUGHT}


@cache
def _target(name: str) -> Target:
    return TARGETS[name]()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_give_no_other_answer_and_no_other_error(name: str, tmp_path: Path) -> None:
    outcome = run_target(_target(name), 200, seed=11, corpus=tmp_path / "corpus", scratch=str(tmp_path))
    assert not outcome.findings
    assert outcome.inputs == 200
    assert outcome.counts["refused"] + outcome.counts["made again"] > 50  # the damage was met


@pytest.mark.parametrize("name", TARGETS)
def test_faults_found_once_stay_mended(name: str, tmp_path: Path) -> None:
    outcome = replay(_target(name), CORPUS, str(tmp_path))
    assert not outcome.findings


# ---------------------------------------------------------------------- the harness itself


def _first_byte(folder: Path) -> Any:
    return (folder / "a.bin").read_bytes()[:1]


def _finding(read: Any, tmp_path: Path, runs: int = 40) -> list[str]:
    target = Target("careless", [{"a.bin": b"0123456789"}], read)
    outcome = run_target(target, runs, seed=0, corpus=tmp_path / "corpus", scratch=str(tmp_path))
    assert outcome.inputs == runs
    assert outcome.counts["finding"] == len(outcome.findings)
    return outcome.findings


def test_another_answer_and_another_error_are_found(tmp_path: Path) -> None:
    assert any("another answer" in text for text in _finding(_first_byte, tmp_path))
    reproducers = list((tmp_path / "corpus").iterdir())
    assert unpack(reproducers[0])["undamaged"] == {"a.bin": b"0123456789"}
    assert any("ValueError" in text for text in _finding(lambda folder: int((folder / "a.bin").read_bytes()), tmp_path))


def test_a_reader_that_hangs_or_takes_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(folder: Path) -> Any:
        while _first_byte(folder) != b"0":
            pass
        return b"0"

    def grow(folder: Path) -> Any:
        return b"0" if _first_byte(folder) == b"0" else len(bytearray(os.urandom(1 << 20) * 64)) * 0 + b"1"[0]

    monkeypatch.setattr(harness, "MOST_SECONDS", 0.05)
    assert any("more than 0.05 seconds" in text for text in _finding(hang, tmp_path))
    monkeypatch.setattr(harness, "MOST_SECONDS", 5.0)
    monkeypatch.setattr(harness, "MOST_BYTES", 16 << 20)
    target = Target("greedy", [{"a.bin": b"0123456789"}], grow, check=lambda answer: "")
    found = run_target(target, 40, seed=0, corpus=tmp_path / "corpus", scratch=str(tmp_path)).findings
    assert any("MB of memory" in text for text in found)


def test_a_crash_of_the_process_is_found_and_the_run_goes_on(tmp_path: Path) -> None:
    def crash(folder: Path) -> Any:
        if _first_byte(folder) != b"0":
            os.kill(os.getpid(), signal.SIGKILL)
        return b"0"

    found = _finding(crash, tmp_path, 12)
    assert found
    assert all("the process ended with -9" in text for text in found)


def test_an_input_can_be_made_again(tmp_path: Path) -> None:
    target = _target("cells")
    made = [harness.make_input(target, 3, number) for number in range(50)]
    assert made == [harness.make_input(target, 3, number) for number in range(50)]
    assert made != [harness.make_input(target, 4, number) for number in range(50)]
    (tmp_path / "cells-1.zip").write_bytes(pack(target.seeds[0], made[0][1]))
    assert unpack(tmp_path / "cells-1.zip")["damaged"] == made[0][1]
    assert replay(target, tmp_path).inputs == 1
