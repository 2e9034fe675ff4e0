"""The example on Ray Serve: two replicas answer as the pool itself does, and classifiers are exchanged meanwhile."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support import same_predictions

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_serve.py"


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.skipif(
    find_spec("ray") is None or find_spec("uvicorn") is None,  # looking for "ray.serve" would import Ray
    reason='needs Ray Serve: pip install "taskres_hf[ray]"',
)
@pytest.mark.skipif("TASKRES_TEST_RAY" not in os.environ, reason="runs alone, last in `make test`: TASKRES_TEST_RAY=1")
def test_two_replicas_answer_as_the_pool_does(trained: Path, base: str, splits: Any, tmp_path: Path) -> None:
    root, port = tmp_path / "made", _port()
    shutil.copytree(trained, root / "first")
    TaskResCLIPForImageClassification.from_base(base, ["cat", "dog"]).save_pretrained(root / "second")
    pictures = []
    for row in range(12):
        content = io.BytesIO()
        splits["test"][row]["image"].save(content, "PNG")
        pictures.append(content.getvalue())
    pool = ClassifierPool.from_folders(root)
    wanted = pool.classify(pictures, top_k=2)
    command = [sys.executable, EXAMPLE, root, "--port", port, "--replicas", 2, 2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    service = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    assert service.stdout is not None
    children: list[psutil.Process] = []
    try:
        line = service.stdout.readline()
        assert "Serving first, second" in line
        children = psutil.Process(service.pid).children(recursive=True)
        listening = {
            one.laddr.ip.removeprefix("::ffff:")
            for process in children
            for one in process.net_connections("inet")
            if one.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::1"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(8) as many:

            def ask(picture: bytes, **options: Any) -> httpx.Response:
                return client.post("/", content=picture, params={"top_k": 2, **options})

            replies = [reply.json() for reply in many.map(ask, pictures * 2)]
            assert len({reply["replica"] for reply in replies}) == 2
            for reply, one in zip(replies, wanted * 2, strict=True):
                assert all(same_predictions(reply["predictions"][name], one[name]) for name in ("first", "second"))
            only = ask(pictures[0], classifiers="second").json()
            assert list(only["predictions"]) == ["second"]
            assert only["versions"] == {"second": pool["second"].checksum}
            assert ask(pictures[0], classifiers="third").status_code == 404
            assert ask(b"no picture").status_code == 422
            assert ask(pictures[0], top_k="x").status_code == 422

            TaskResCLIPForImageClassification.from_base(base, ["owl", "fox", "bee"]).save_pretrained(root / "third")
            shutil.rmtree(root / "second")  # a replica may look in between
            end, exchanged = time.monotonic() + 60, set()
            versions = {frozenset({"first", *others}) for others in (["second"], ["second", "third"], ["third"])}
            while len(exchanged) < 2:  # every reply is of a version that there was
                assert time.monotonic() < end
                after = [reply.json() for reply in many.map(ask, pictures)]
                assert {frozenset(reply["predictions"]) for reply in after} <= versions
                exchanged |= {reply["replica"] for reply in after if set(reply["predictions"]) == {"first", "third"}}
            assert exchanged == {reply["replica"] for reply in replies}  # none was started anew
        service.terminate()
        assert service.wait(60) == 0
    finally:
        for process in [*children, psutil.Process(service.pid)] if service.poll() is None else children:
            if process.is_running():
                process.kill()
