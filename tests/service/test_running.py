"""`taskres serve` as a process of its own: many clients at once, and an end at which nobody is let down."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support import run
from support import same_predictions as same

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds, after which a test is told to fail rather than to wait


class Served:
    """A running `taskres serve`."""

    def __init__(self, log: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "taskres_hf", "serve", *arguments, "--port", "0", "--json"]
        command += ["--timeout", "600", "--drain", "600"]  # however busy the machine of the tests is
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.said: dict[str, Any] = json.loads(line)
        self.port = int(self.said["address"].rpartition(":")[2])

    def ask(self, address: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("POST" if body else "GET", address, body, {"Content-Type": kind})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def served(artifacts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served") / "log", *artifacts.values())
    yield found
    assert found.end(signal.SIGINT) == 130


def test_eight_clients_over_three_classifiers_never_mix(
    served: Served, pictures: list[bytes], expected: dict[str, Any]
) -> None:
    wrong: list[Any] = []

    def client(number: int) -> None:
        for turn in range(15):
            place = (number * 5 + turn) % len(pictures)
            name = list(expected)[(number + turn) % len(expected)]
            status, answer = served.ask(f"/v1/models/{name}/classify", pictures[place])
            if status != 200 or not same(answer["results"][0]["predictions"], expected[name][place]):
                wrong.append((name, place, answer))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(PATIENCE)
    assert not wrong
    numbers = urllib.request.urlopen(f"{served.said['address']}/metrics").read().decode()
    found = {name: float(re.search(rf"^{name} (\S+)$", numbers, re.MULTILINE).group(1))  # type: ignore[union-attr]
             for name in ("taskres_batch_pictures_count", "taskres_batch_pictures_sum")}  # fmt: skip
    assert found["taskres_batch_pictures_sum"] == 120
    assert found["taskres_batch_pictures_count"] < 120  # pictures of different clients passed together


def test_the_load_test_of_the_benchmarks_reaches_it(served: Served, pictures: list[bytes]) -> None:
    from benchmarks.service import load

    seconds, wall = load(served.port, "/v1/models/food/classify", pictures[1], clients=4, requests=3)
    assert len(seconds) == 12
    assert 0 < max(seconds) <= wall


def test_a_client_that_stops_halfway_harms_nobody(served: Served, pictures: list[bytes]) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
    for sent in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nX: " + b"y" * 200_000, head, head + b"half"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as connection:
            connection.sendall(sent)
    assert served.ask("/v1/models/food/classify", pictures[1])[0] == 200
    assert "Traceback" not in served.log.read_text()


def test_the_log_is_one_json_object_a_line(served: Served, pictures: list[bytes]) -> None:
    served.ask("/v1/models/food/classify", pictures[1])
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if '"pictures"' in line]
    assert lines[-1]["route"] == "/v1/models/{name}/classify"
    assert (lines[-1]["status"], lines[-1]["pictures"], lines[-1]["models"]) == (200, 1, ["food"])
    assert [row["name"] for row in served.said["models"]] == ["animals", "food", "signs"]


def test_the_health_check_of_the_container_asks_what_there_is(served: Served) -> None:
    check = json.loads(_dockerfile()["HEALTHCHECK"][0].partition("CMD ")[2])
    assert "8000" in check[-1]
    for port, healthy in ((served.port, True), (1, False)):
        command = [sys.executable, *check[1:-1], check[-1].replace("8000", str(port))]
        assert (subprocess.run(command, capture_output=True).returncode == 0) is healthy


def test_sigterm_while_busy_answers_everything_that_was_accepted(
    artifacts: dict[str, str], pictures: list[bytes], expected: dict[str, Any], tmp_path: Path
) -> None:
    served = Served(tmp_path / "log", artifacts["food"], "--max-batch", "2")
    answers: list[tuple[int, dict[str, Any]]] = []
    body = json.dumps({"images": [_text(content) for content in pictures * 2]}).encode()

    def client() -> None:
        answers.append(served.ask("/v1/models/food/classify", body, "application/json"))

    clients = [threading.Thread(target=client) for _ in range(5)]
    for each in clients:
        each.start()
    end = time.monotonic() + PATIENCE
    while _accepted(served) < 100 and time.monotonic() < end and len(answers) < 3:
        time.sleep(0.01)
    assert served.end() == 143
    for each in clients:
        each.join(PATIENCE)
    assert [status for status, _ in answers] == [200] * 5
    for _, answer in answers:
        rows = [row["predictions"] for row in answer["results"]]
        assert all(same(row, best) for row, best in zip(rows, expected["food"] * 2, strict=True))
    assert "Everything accepted was answered." in served.log.read_text()
    with pytest.raises(ConnectionRefusedError):
        served.ask("/health")


def _text(content: bytes) -> str:
    import base64

    return base64.b64encode(content).decode()


def _accepted(served: Served) -> float:
    numbers = urllib.request.urlopen(f"{served.said['address']}/metrics").read().decode()
    return float(re.search(r"^taskres_queue_pictures (\S+)$", numbers, re.MULTILINE).group(1))  # type: ignore[union-attr]


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, error = run(capsys, "serve", "missing", "--port", port)
    assert code == 1
    assert f"Cannot listen on 127.0.0.1 port {port}" in error
    assert "--port" in error
    code, text, _ = run(capsys, "serve", "./missing", "--port", "0", "--json")
    assert (code, json.loads(text)["type"]) == (1, "ArtifactError")


# ---------------------------------------------------------------------- the container, which is not built here


def _dockerfile() -> dict[str, list[str]]:
    """Instructions by name, continued lines joined."""
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest.strip())
    return found


def test_the_container_runs_the_documented_command() -> None:
    from typer.main import get_command

    from taskres_hf.cli.app import make_app

    told = _dockerfile()
    program, command, *arguments = json.loads(told["ENTRYPOINT"][0]) + json.loads(told["CMD"][0])
    assert (program, command) == ("taskres", "serve")
    parsed = get_command(make_app()).commands["serve"].make_context("serve", arguments).params  # type: ignore[attr-defined]
    assert (parsed["host"], parsed["port"]) == ("0.0.0.0", 8000)
    assert told["EXPOSE"] == ["8000"]
    assert told["USER"][-1].split(":")[0] not in ("root", "0")
    page = (ROOT / "docs" / "serve.md").read_text()
    assert parsed["classifiers"][0] in page  # where to mount a classifier
    assert "docker build -f docker/Dockerfile -t taskres ." in page
    documented = [shlex.split(line) for line in page.replace("\\\n", " ").splitlines() if line.startswith("docker run")]
    assert documented
    assert all("127.0.0.1:8000:8000" in words for words in documented)


def test_the_container_is_made_of_what_there_is() -> None:
    told, ignored = _dockerfile(), (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"  # nothing goes in but what is named: no data, no tokens, no history
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for line in told["COPY"] for source in line.split()[:-1] if not source.startswith("--")}
    assert copied <= let_in
    assert all((ROOT / name).exists() for name in let_in)
    assert any(".[serve]" in line for line in told["RUN"])
    assert "serve = [" in (ROOT / "pyproject.toml").read_text()
