"""Classifiers on Ray Serve: replicas that come and go with the load, each with all classifiers over one base.

    pip install "taskres_hf[ray]"
    python examples/ray_serve.py made/                     # a folder of classifiers over one base
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/?classifiers=pets,food&top_k=3"

Classifiers that are added, replaced or removed in the folder are exchanged within seconds, without a pause in serving:
each replica looks where Serve asks for its health. Until all have looked, answers may be of either version; each says
which.

Pictures of requests that come together pass the tower together, whatever classifiers they name. `taskres serve`
(docs/serve.md) does this in one process, with more limits and metrics; this is for when one is not enough.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before Ray is imported: it tells nobody of its use, and listens to this machine alone. To serve a cluster, start it
# with `ray start`, take these lines out and give its address to `ray.init`.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

MAX_BODY = 10 << 20  # bytes
MAX_BATCH = 32


@serve.deployment(max_ongoing_requests=2 * MAX_BATCH, max_queued_requests=256, health_check_period_s=2)
class Classifiers:
    """One replica: a pool of classifiers, a base, one batch at a time."""

    def __init__(self, root: str) -> None:
        from ray.serve._private import replica

        from taskres_hf import ClassifierPool

        # A replica opens one more port, on which it unpickles what comes, to everybody unless RAY_USE_TLS is set.
        # Nobody needs it here; this name is Ray's own (2.60), and where it is gone the replica does not start.
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, _: add_port(server, "127.0.0.1:0")
        self.root, self.seen = Path(root), versions_of(Path(root))
        self.pool = ClassifierPool(classifiers={name: self.root / name for name in self.seen})

    async def check_health(self) -> None:
        """Serve calls this every two seconds; what cannot be loaded changes nothing and is tried again."""
        await asyncio.to_thread(self.exchange)

    def exchange(self) -> None:
        from taskres_hf.errors import TaskResError

        now = versions_of(self.root)
        if now == self.seen or not now:
            return
        try:
            self.pool.update({name: self.root / name for name in now if now[name] != self.seen.get(name)})
        except TaskResError as error:
            print(f"Not exchanged: {error}", file=sys.stderr)
            return
        self.pool.remove(*(name for name in self.pool.names if name not in now))
        self.seen = now

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def answers(self, asked: list[tuple[Any, list[str] | None, int | None]]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.classify, asked)

    def classify(self, asked: list[tuple[Any, list[str] | None, int | None]]) -> list[dict[str, Any]]:
        from taskres_hf.errors import ConfigurationError

        view, embeds = self.pool.view(), self.pool.embed([picture for picture, _, _ in asked])
        found: list[dict[str, Any]] = []
        for row, (_, names, top_k) in zip(embeds, asked, strict=True):
            try:  # one request that names what is not there does not keep the others from their answers
                logits = view.logits(row[None], names)
            except ConfigurationError as error:
                found.append({"error": str(error), "status": 404})
                continue
            labels = {name: view.predictions(name, one, top_k)[0] for name, one in logits.items()}
            versions = {name: view[name].checksum for name in logits}
            found.append({"predictions": labels, "versions": versions, "replica": os.getpid(), "status": 200})
        return found

    async def __call__(self, request: Request) -> JSONResponse:
        from taskres_hf.errors import ImageError
        from taskres_hf.pictures import read_image

        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BODY:
                return JSONResponse({"error": f"The picture is larger than {MAX_BODY >> 20} MiB."}, 413)
        names, top_k = request.query_params.get("classifiers"), request.query_params.get("top_k", "1")
        if not top_k.isdecimal() or not 0 < int(top_k) < 1000:
            return JSONResponse({"error": "top_k must be a whole number from 1 on."}, 422)
        try:
            picture = await asyncio.to_thread(read_image, bytes(content))  # never a file or an address
        except ImageError as error:
            return JSONResponse({"error": str(error)}, 422)
        answer = await self.answers((picture, names.split(",") if names else None, int(top_k)))
        return JSONResponse(answer, answer.pop("status"))


def versions_of(root: Path) -> dict[str, str]:
    """Classifiers in a folder and a checksum of each, kilobytes."""
    files = sorted(root.glob("*/model.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of classifier folders, all over one base")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, nargs=2, default=[1, 4], metavar=("LEAST", "MOST"))
    asked = parser.parse_args()
    if not versions_of(asked.root):
        sys.exit(f"No folder in {asked.root} is a classifier: none holds model.safetensors.")
    least, most = asked.replicas
    scaling = {"min_replicas": least, "initial_replicas": least, "max_replicas": most, "target_ongoing_requests": 16}
    # With GPUs: ray_actor_options={"num_gpus": 1}, and device="cuda" of the pool.
    replicas = Classifiers.options(autoscaling_config=scaling, ray_actor_options={"num_cpus": 0.5})
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # of this user alone; paths of sockets may not be long
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=place)
    serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
    waiting = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        serve.run(replicas.bind(str(asked.root.absolute())), name="classifiers", route_prefix="/")
        print(f"Serving {', '.join(versions_of(asked.root))} on http://127.0.0.1:{asked.port}/", flush=True)
        signal.sigwait(waiting)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
