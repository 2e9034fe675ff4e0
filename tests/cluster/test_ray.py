"""A real Ray cluster of two workers on this machine: killed workers, a killed driver, nothing open to others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from taskres_hf.cluster import embed, predict, read_manifest
from taskres_hf.cluster.running import Cluster, _connected
from taskres_hf.errors import ConfigurationError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install "taskres_hf[ray]"'),
    pytest.mark.skipif(
        "TASKRES_TEST_RAY" not in os.environ, reason="runs alone, last in `make test`: TASKRES_TEST_RAY=1"
    ),
]
TWO = Cluster("ray", workers=2)
BLOCK = 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The cluster that `embed` would start, kept for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:  # the settings of this cluster are no others'
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        with _connected(TWO):
            yield


@pytest.fixture(scope="module")
def data(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 rows in six files, 18 blocks."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        for name in ("a", "b"):
            shutil.copy(tables / f"{name}.parquet", folder / f"{name}{number}.parquet")
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: (row["source"], row["row"]))


def _workers() -> list[psutil.Process]:
    """Those of this process's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] if any("RayWorker" in part for part in process.cmdline()) else []
        except psutil.Error:  # it has just ended
            continue
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _when(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def _parts(folder: Path) -> int:
    return len(list(folder.glob("part-*"))) if folder.is_dir() else 0


def test_a_killed_worker_costs_no_row_and_doubles_none(cluster: None, data: Path, base: str, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    embed(data, base, alone, keep=["label"], rows_per_block=BLOCK, progress=False)
    killed: list[int] = []

    def kill() -> None:
        _when(lambda: _parts(out) > 0 and bool(_workers()))  # one between two calls is not known by its name
        victim = _workers()[0]
        killed.append(_parts(out))
        victim.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    written = embed(data, base, out, keep=["label"], rows_per_block=BLOCK, cluster=TWO, progress=False)
    thread.join()
    assert 0 < killed[0] < 18  # it was in the middle
    assert (written.rows, written.blocks, written.errors) == (330, 18, 9)
    assert read_manifest(out)["run"] == read_manifest(alone)["run"]
    assert _rows(out) == _rows(alone)  # bit for bit, each row once
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_after_a_killed_driver_the_rest_is_done(
    cluster: None, data: Path, trained: Path, base: str, tmp_path: Path
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    predict(trained, data, alone, rows_per_block=BLOCK, progress=False)
    command = [
        sys.executable, "-m", "taskres_hf", "predict", trained, data, "--output-dir", out, "--rows-per-block", BLOCK,
        "--engine-cluster", "ray", "--workers", 2, "--quiet",
    ]  # fmt: skip
    driver = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        _when(lambda: _parts(out) > 1 or driver.poll() is not None)
        started = psutil.Process(driver.pid).children(recursive=True)
        texts = [part for process in started for part in process.cmdline()]
        folders = {found.group() for text in texts if (found := re.search("/tmp/ray-[^/]+", text))}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        time.sleep(1)  # its cluster notices by itself; what has not by then is ended below
    finally:
        for process in filter(_runs, started):
            process.kill()
    for folder in folders:  # a killed driver leaves its cluster's logs
        shutil.rmtree(folder, ignore_errors=True)
    before = _parts(out)
    assert 1 < before < 18
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    written = predict(trained, data, out, rows_per_block=BLOCK, cluster=TWO, progress=False)
    assert (written.resumed, written.blocks, written.rows) == (before, 18, 330)
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())  # nothing was done twice
    assert _rows(out) == _rows(alone)


def test_what_a_worker_raises_is_said_in_our_words(cluster: None, data: Path, base: str, tmp_path: Path) -> None:
    from taskres_hf.cluster import running

    mine = running.Worker

    class Other(mine):  # type: ignore[valid-type,misc]
        """Of a machine with another base."""

        def __init__(self, job: Any) -> None:
            super().__init__(job)
            self.digest = "0" * 64

    running.Worker = Other  # type: ignore[misc]
    try:
        with pytest.raises(ConfigurationError, match="Put the same files on all machines"):
            embed(data, base, tmp_path / "out", rows_per_block=200, cluster=Cluster("ray", workers=1), progress=False)
    finally:
        running.Worker = mine  # type: ignore[misc]


def test_a_cluster_that_we_start_is_open_to_this_machine_alone(cluster: None) -> None:
    listening = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray" not in " ".join(process.cmdline()[:3]):  # what other tests have started
                continue
            sockets = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
            listening |= {(one.laddr.ip.removeprefix("::ffff:"), process.cmdline()[0]): one for one in sockets}
        except (psutil.Error, OSError, IndexError):  # it has just ended
            continue
    assert listening
    assert not {where for where in listening if where[0] not in ("127.0.0.1", "::1")}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "token"
