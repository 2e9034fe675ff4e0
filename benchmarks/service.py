"""The service beside a plain handler: requests a second and seconds to an answer, for one client and for many.

Both are uvicorn with FastAPI on this machine, over the same classifier; the plain one is what one writes first, a
`pipeline` that is called for each request. They are loaded in turn, so that only the ratio is claimed.

python -m benchmarks.service [--against CHECKOUT]

prints the table of docs/serve.md instead: 16 clients over 1, 10 and 200 classifiers of the shipped base, a request
naming one at random or all of them, one thread of torch; beside it the same of another checkout of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles

from taskres_hf.tables import Table

from .material import clip_folder, jpeg_folder
from .timing import Report

CLIENTS = (1, 8, 32)
SERVICE, FAST, PLAIN = "service", "service with engine auto", "plain handler"
GOALS = {True: (0.95, 1.1), False: (1.2, 0.9)}  # of requests a second and of latency, for one client alone or not
Load = tuple[float, float, float]  # requests a second, p50, p95
_PLAIN = """
import socket, sys
import uvicorn
from fastapi import FastAPI, Request
from io import BytesIO
from PIL import Image
from starlette.concurrency import run_in_threadpool
from transformers import pipeline
import taskres_hf

classify = pipeline("image-classification", model=sys.argv[1])
app = FastAPI()

@app.post("/classify")
async def answer(request: Request):
    body = await request.body()
    return await run_in_threadpool(lambda: classify(Image.open(BytesIO(body))))

listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, http="h11")).run(sockets=[listening])
"""


def load(port: int, addresses: str | list[str], body: bytes, clients: int, requests: int) -> tuple[list[float], float]:
    """Seconds of each request and of all, with so many clients that each keep a connection and ask again and again.

    Args:
        addresses: one, or several of which each request draws one.

    Raises:
        RuntimeError: an answer that is none.
    """
    seconds: list[float] = []
    failures: list[str] = []
    together = threading.Barrier(clients + 1)
    several = [addresses] if isinstance(addresses, str) else addresses

    def client(number: int) -> None:
        draw = random.Random(number)
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        together.wait()
        try:
            for _ in range(requests):
                begin = time.perf_counter()
                connection.request("POST", draw.choice(several), body, {"Content-Type": "image/jpeg"})
                reply = connection.getresponse()
                text = reply.read()
                seconds.append(time.perf_counter() - begin)
                if reply.status != 200:
                    failures.append(f"{reply.status}: {text[:200]!r}")
        except OSError as error:
            failures.append(str(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    together.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begin
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients * requests} requests failed: {failures[0]}")
    return seconds, wall


@contextmanager
def _running(command: list[str]) -> Iterator[int]:
    """The port of a server, which prints its address when it is ready: JSON or the port alone."""
    with _process(command) as (port, _):
        yield port


@contextmanager
def _process(command: list[str], checkout: str | None = None) -> Iterator[tuple[int, int]]:
    """The port of a server, and the id of its process; of the library in a checkout."""
    given = {**os.environ, **({"PYTHONPATH": checkout} if checkout else {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given, cwd=checkout)
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        yield said if isinstance(said, int) else int(said["address"].rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait()


def service(report: Report, rounds: int = 3, most: int = 24) -> None:
    """Throughput and latency at 1, 8 and 32 clients, as ratios to the plain handler.

    Args:
        rounds: each loads both servers once with each number of clients. most: requests a load, at least 2 a client.
    """
    from .serving import _artifact

    try:
        from taskres_hf.service import check_installed

        check_installed()
    except ImportError as error:
        report.skip(f"requests a second, {SERVICE} / {PLAIN}", str(error))
        return
    picture = next(iter(sorted(jpeg_folder(640, (400, 300), 40).rglob("*.jpg")))).read_bytes()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = _artifact(clip_folder(32), 100, f"{scratch}/classifier")
        serve = [
            sys.executable,
            "-m",
            "taskres_hf",
            "serve",
            folder,
            "--port",
            "0",
            "--json",
            "--quiet",
            "--timeout",
            "600",
        ]
        address = "/v1/models/classifier/classify"
        fast = ["--engine", "auto", "--precision", "auto", "--fast-preprocessing"]
        commands = {
            SERVICE: (serve, address),
            FAST: ([*serve, *fast], address),
            PLAIN: ([sys.executable, "-c", _PLAIN, folder], "/classify"),
        }
        servers = {name: (stack.enter_context(_running(command)), where) for name, (command, where) in commands.items()}
        for port, address in servers.values():
            load(port, address, picture, 2, 2)
        for clients in CLIENTS:
            found: dict[str, list[Load]] = {name: [] for name in servers}
            for turn in range(rounds):
                names = list(servers)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    requests = max(2, most // clients) if clients > 1 else most // 3
                    seconds, wall = load(*servers[name], picture, clients, requests)
                    p95 = quantiles(seconds, n=20)[18]
                    found[name].append((len(seconds) / wall, median(seconds), p95))
            _add(report, clients, found)


def _add(report: Report, clients: int, found: dict[str, list[Load]]) -> None:
    many = f"{clients} client{'s' if clients > 1 else ''}"
    for way in (SERVICE, FAST):
        for place, name in enumerate(("requests a second", "p50", "p95")):
            ratios = [ours[place] / plain[place] for ours, plain in zip(found[way], found[PLAIN], strict=True)]
            ours, plain = (median(row[place] for row in found[key]) for key in (way, PLAIN))
            goal = GOALS[clients == 1][place > 0]
            note = f"{ours:.1f} against {plain:.1f}" if place == 0 else f"{1e3 * ours:.0f} against {1e3 * plain:.0f} ms"
            report.add(f"{name}, {way} / {PLAIN}, {many}", ratios, goal, place == 0, f"{note}; ViT-B/32, K=100")


# ---------------------------------------------------------------------- many classifiers


CLASSIFIERS, AT_ONCE = (1, 10, 200), 16
ONE, ALL = "one at random", "all of them"


def _cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def many(
    root: Path, checkouts: dict[str, str], counts: tuple[int, ...] = CLASSIFIERS, rounds: int = 5
) -> tuple[Table, Table]:
    """What it takes until a server is ready; requests a second, and CPU milliseconds of the server for each.

    Args:
        root: where classifiers are made. checkouts: name and folder of each version of the library, the last being
            what the others are compared with. rounds: each loads every version once in each way.
    """
    from .pool import make

    folders = [str(folder) for folder in make(root, max(counts))[0]]
    body = next(iter(sorted(jpeg_folder(640, (400, 300), 40).rglob("*.jpg")))).read_bytes()
    ready: list[list[str]] = []
    cells: list[list[str]] = []
    for count in counts:
        command = [sys.executable, "-m", "taskres_hf", "serve", *folders[:count], "--port", "0", "--json", "--quiet"]
        addresses = {ONE: [f"/v1/models/{Path(one).name}/classify" for one in folders[:count]], ALL: ["/v1/classify"]}
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(_process([*command, "--timeout", "600"], where))
                for name, where in checkouts.items()
            }
            ready += [[str(count), name, f"{_cpu(pid):.1f}", f"{_resident(pid):.0f}"]
                      for name, (_, pid) in servers.items()]  # fmt: skip
            for turn in range(rounds + 1):
                names = list(servers)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    for way, asked in addresses.items() if count > 1 else [(ONE, addresses[ONE])]:
                        port, pid = servers[name]
                        before = _cpu(pid)
                        seconds, wall = load(port, asked, body, AT_ONCE, 8)
                        if turn:  # the first warms up
                            used = 1000 * (_cpu(pid) - before) / len(seconds)
                            found.setdefault((way, name), []).append((len(seconds) / wall, used))
        cells += _rows(count, list(checkouts), found)
    columns = ["classifiers", "a request names", "version", "requests a second", "ms CPU a request"]
    return (
        Table(["classifiers", "version", "CPU seconds until ready", "MB"], ready),
        Table([*columns, "times the requests", "in the rounds"], cells),
    )


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _rows(count: int, names: list[str], found: dict[tuple[str, str], list[tuple[float, float]]]) -> list[list[str]]:
    rows, last = [], names[-1]
    for way, name in sorted(found, key=lambda key: (key[0] == ALL, names.index(key[1]))):
        loads = found[way, name]
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(loads, found[way, last], strict=True)]
        rate, used = (median(load[place] for load in loads) for place in (0, 1))
        spread = ["", ""] if name == last else [f"{median(ratios):.3g}", f"{min(ratios):.3g} to {max(ratios):.3g}"]
        rows.append([str(count), way, name, f"{rate:.0f}", f"{used:.1f}", *spread])
    return rows


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--against", metavar="CHECKOUT", help="another checkout of this repository, loaded in turn")
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    checkouts = {"this": str(Path(__file__).parents[1])}
    if options.against:
        checkouts["the other"] = str(Path(options.against).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        for table in many(Path(scratch), checkouts, rounds=options.rounds):
            print(f"{table.markdown()}\n")


if __name__ == "__main__":
    main()
