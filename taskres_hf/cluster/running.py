"""Blocks to parts, by this process or by the workers of a Ray cluster.

Ray Data hands each worker the names of blocks, a few lines of text, never pictures: a worker reads, embeds and writes
its block itself. So nothing piles up in Ray's object store, a worker's memory is bounded by its batches and the rows of
one block, and a block whose worker was killed is simply done again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import ConfigurationError, DataError, MissingExtraError, TaskResError, chain
from ..tables import visible
from .inputs import ROWS_PER_BLOCK, Block, Inputs, find_inputs
from .outputs import RESERVED, OutputFolder
from .workers import Job, Worker

ENGINES = ("ray",)
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray takes the address 127.0.0.1, on every system
_AHEAD = 2  # blocks that a worker has or knows of: the next begins while the last is reported
_STORE = 100 << 20  # bytes of a local cluster's object store: only names of blocks and what is said of them go through


@dataclass(frozen=True)
class Written:
    """What `embed` and `predict` wrote.

    Attributes:
        path: the folder. rows: rows in its parts, with those that have an error. pictures: pictures seen.
        blocks: number of parts; `resumed`: those that were there before.
        errors: number of pictures without an answer. messages: why, of at most 20 a block of this run.
    """

    path: Path
    rows: int
    pictures: int
    blocks: int
    resumed: int
    errors: int
    messages: list[str]


@dataclass(frozen=True)
class Cluster:
    """Who does the blocks.

    Attributes:
        engine: `ray`, or None for this process. workers: how many; as many as there are CPUs for by default.
        cpus, gpus: of each worker; a worker with `gpus` runs on `cuda` unless a device is named.
        address: of a running cluster (`auto`: the one on this machine); None starts one here, and ends it.
    """

    engine: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    address: str | None = None


def embed(
    data: Any,
    base_model: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    keep: Sequence[str] = (),
    numbers: str = "fp32",
    rows_per_block: int = ROWS_PER_BLOCK,
    batch_size: int | None = None,
    engine: str = "torch",
    precision: str = "fp32",
    device: str | None = None,
    cluster: str | Cluster | None = None,
    progress: bool = True,
    **loading: Any,
) -> Written:
    """Embed every picture of a data set into parquet files, each row once; goes on where a run was stopped.

    Args:
        data: parquet files (bytes, or paths relative to the file), WebDataset shards (`.tar`), picture files, or
            folders of one of these.
        base_model: Hub id or folder of a dual encoder, or of an image model alone.
        output_dir: a new folder, or that of a run to go on with. In a cluster all machines must see it, the data and
            the base under the same paths.
        image_column: of parquet files; recognised by itself where only one can be it.
        keep: columns that go into the output as they are; of tars, endings such as `cls`.
        numbers: `fp32` or `fp16` of the embeddings, which are not normalised.
        rows_per_block: what is done at once, and again after a crash; see `inputs.find_inputs`.
        batch_size: pictures a forward pass, by default the engine's best. engine, precision: see `embedding.engines`.
        device: None for the fastest there is (in a cluster: `cuda` with GPUs, else `cpu`).
        cluster: `"ray"`, a `Cluster` with its details, or None for this process.
        **loading: `revision`, `dtype`, `trust_remote_code`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The account. `output_dir` holds `part-NNNNNN.parquet` with the columns source, row (which picture it is),
        picture (its name), those kept, embedding [D] (null where it cannot be read), error; and `_manifest.json`.

    Raises:
        DataError: nothing to read, or files of it are damaged (all others are finished then).
        ConfigurationError: the folder is another run's, an unknown engine or number type, or Ray was imported before,
            so that a cluster started now would be open to the network.
        BaseModelError, HubError: the base cannot be loaded. MissingExtraError: Ray is not installed.
        ArtifactError: the folder cannot be written.
    """
    if numbers not in ("fp32", "fp16"):
        raise ConfigurationError(f"`numbers` must be 'fp32' or 'fp16'; got {numbers!r}.")
    job = Job(
        "embed", os.fspath(base_model), os.path.abspath(output_dir), loading, device, engine, precision, batch_size,
        numbers,
    )  # fmt: skip
    return _run(data, job, _cluster(cluster), rows_per_block, image_column, keep, progress)


def predict(
    model: Any,
    data: Any,
    output_dir: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    reject: bool = False,
    unknown: str = "unknown",
    names: Sequence[str] | None = None,
    image_column: str | None = None,
    keep: Sequence[str] = (),
    rows_per_block: int = ROWS_PER_BLOCK,
    batch_size: int | None = None,
    engine: str = "torch",
    precision: str = "fp32",
    device: str | None = None,
    cluster: str | Cluster | None = None,
    progress: bool = True,
    **loading: Any,
) -> Written:
    """Classify every picture of a data set into parquet files, each row once; goes on where a run was stopped.

    Args:
        model: folder or Hub id of a classifier; a packed file, or a list of folders, for several over one base.
        top_k, reject, unknown: as in `classify_files`; of several classifiers only `top_k`.
        names: some of a packed file's classifiers.
        **loading: of `from_pretrained`: `revision`, `base_model`, `dtype`, `strength`, `token`, ...
        data, output_dir and all others: as in `embed`.

    Returns:
        The account. Parts have the columns source, row, picture, those kept, `classifier` (of several: a row for each
        picture and classifier), labels, scores, `rejected` (with `reject`), error.

    Raises:
        DataError, ConfigurationError, MissingExtraError, ArtifactError, HubError: as in `embed` and in
            `classify_files`.
    """
    source = [os.fspath(one) for one in model] if isinstance(model, (list, tuple)) else os.fspath(model)
    answering = {"top_k": top_k, "reject": reject, "unknown": unknown, "names": names and list(names)}
    job = Job(
        "predict", source, os.path.abspath(output_dir), loading, device, engine, precision, batch_size,
        answering=answering,
    )  # fmt: skip
    return _run(data, job, _cluster(cluster), rows_per_block, image_column, keep, progress)


def _cluster(given: str | Cluster | None) -> Cluster:
    cluster = given if isinstance(given, Cluster) else Cluster(given)
    if cluster.engine not in (None, *ENGINES):
        raise ConfigurationError(f"`cluster` must be one of {ENGINES} or None; got {cluster.engine!r}.")
    if cluster.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise MissingExtraError('A cluster needs Ray: pip install "taskres_hf[ray]".')
    if cluster.engine == "ray":
        _check_closed(cluster)
    if (cluster.workers is not None and cluster.workers < 1) or cluster.cpus <= 0 or cluster.gpus < 0:
        raise ConfigurationError(f"Workers and their CPUs must be at least 1, and GPUs not negative; got {cluster}.")
    return cluster


def _run(
    data: Any, job: Job, cluster: Cluster, rows_per_block: int, column: str | None, keep: Sequence[str], progress: bool
) -> Written:
    taken = sorted(set(keep) & set(RESERVED))
    if taken:
        raise ConfigurationError(f"The output has columns of its own called {', '.join(taken)}: they cannot be kept.")
    inputs = find_inputs(data, rows_per_block, column, keep)
    if cluster.engine is not None and job.device is None:
        job = replace(job, device="cuda" if cluster.gpus else "cpu")
    job = replace(job, column=inputs.column, keep=inputs.kept)
    worker = Worker(replace(job, device="cpu") if cluster.engine else job)
    run = {
        "what": job.kind, "model": worker.digest, "batch_size": worker.batch_size, "engine": job.engine,
        "precision": job.precision, "numbers": job.numbers, "answering": job.answering, "image_column": job.column,
        "keep": sorted(job.keep), "rows_per_block": rows_per_block,
    }  # fmt: skip
    with OutputFolder(job.output, run, inputs).opened() as folder:
        job = replace(job, run=folder.digest, model_digest=worker.digest, batch_size=worker.batch_size)
        worker.job = job
        parts = folder.finished()
        resumed = len(parts)
        left = [block for block in inputs.blocks if block.number not in parts]
        problems: list[str] = []
        told: list[str] = []
        doing = _ray(left, job, cluster) if cluster.engine and left else map(worker, left)
        for said in _shown(doing, inputs, parts, progress):
            if "problem" in said:
                problems.append(said["problem"])
                continue
            told += said.pop("messages")
            for remark in said.pop("remarks"):
                warnings.warn(f"{visible(said['source'])}: {remark}", stacklevel=3)
            parts[said["number"]] = said
        if problems:
            first = " ".join(" ".join(problems[:3]).split())
            raise DataError(
                f"{len(problems)} of {len(inputs.blocks)} blocks cannot be read: {first} All others are finished in "
                f"{job.output}: mend the files and run again, or give the data without them."
            )
        manifest = folder.finish(parts)
    pictures = sum(part["pictures"] for part in manifest["parts"])
    return Written(folder.path, manifest["rows"], pictures, len(parts), resumed, manifest["errors"], told)


def _shown(
    doing: Iterator[dict[str, Any]], inputs: Inputs, parts: Mapping[int, Any], progress: bool
) -> Iterator[dict[str, Any]]:
    """What workers say, with a bar of blocks on a terminal."""
    pictures = errors = 0
    total, done = len(inputs.blocks), len(parts)
    with tqdm(total=total, initial=done, unit="block", desc="Blocks", disable=not progress) as bar:
        for said in doing:
            pictures, errors = pictures + said.get("pictures", 0), errors + said.get("errors", 0)
            seconds = bar.format_dict["elapsed"] or 1.0
            bar.set_postfix_str(f"{pictures:,} pictures, {pictures / seconds:.0f}/s, {errors:,} unreadable", False)
            bar.update()
            yield said


# ---------------------------------------------------------------------- Ray


def _ray(blocks: Sequence[Block], job: Job, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """What the workers of a cluster say of each block, in the order in which they finish.

    Raises:
        TaskResError: what a worker raised. ConfigurationError: a block ended its worker again and again.
    """
    import json

    with _connected(cluster):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        _quiet_ray_data()
        context = DataContext.get_current()
        context.enable_progress_bars = False  # ours counts pictures
        context.execution_options.preserve_order = False
        there: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        room = there.get("CPU", 1) // cluster.cpus
        room = min(room, there.get("GPU", 0) // cluster.gpus) if cluster.gpus else room
        workers = min(cluster.workers or max(1, int(room)), len(blocks))
        rows = [{"block": block.as_json()} for block in blocks]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            RayWorker,  # type: ignore[arg-type]
            fn_constructor_args=(job, max(1, int(cluster.cpus))),
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_AHEAD),
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )  # a worker that died is started again, and its block done again: Ray Data's own defaults
        try:
            for row in done.iter_rows():
                yield json.loads(row["said"])
        except ray.exceptions.RayError as error:
            raise _in_words(error, job) from error


def _in_words(error: Exception, job: Job) -> Exception:
    """An error of ours that a worker raised, or what to do about workers that died."""
    for cause in chain(error):
        for candidate in (cause, getattr(cause, "cause", None)):
            own = next((kind for kind in type(candidate).__mro__ if kind.__module__ == TaskResError.__module__), None)
            if own is not None and isinstance(candidate, TaskResError):
                text = str(getattr(candidate, "cause", None) or candidate)
                return own(text)  # type: ignore[no-any-return]
    text = visible(str(error).strip())[-400:]
    return ConfigurationError(
        f"The workers cannot go on: {text} Finished blocks stay in {job.output}; run again to go on. If a worker was "
        "killed for want of memory, give fewer workers, or a smaller batch_size or rows_per_block."
    )


class RayWorker:
    """A `Worker` as Ray Data calls it."""

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")  # what there is to say was said where the run began
        self._worker = Worker(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import json

        return {"said": json.dumps(self._worker(Block.from_json(row["block"])))}


@contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    """In a Ray cluster: the one that this process is in already, the one at an address, or a new one, ended after."""
    _close_to_others(cluster)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    place = None if cluster.address is not None else _own_folder()
    try:
        if place is None:
            ray.init(address=cluster.address, **quiet)
        else:
            cpus = None if cluster.workers is None else max(1, int(cluster.workers * cluster.cpus + 0.999))
            ray.init(num_cpus=cpus, include_dashboard=False, _temp_dir=place, object_store_memory=_STORE, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {cluster.address}" if cluster.address else "a Ray cluster on this machine"
        raise ConfigurationError(f"Cannot reach {where}: {visible(str(error))[:400]}") from error
    try:
        yield
    finally:
        ray.shutdown()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _close_to_others(cluster: Cluster) -> None:
    """Before `ray` is imported: its makers are told nothing, and what starts here listens to this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_closed(cluster)
    if "ray" in sys.modules:  # it has read its settings
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.address is None:
        os.environ.setdefault(_LOOPBACK, "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _check_closed(cluster: Cluster) -> None:
    """Refuse to start a cluster that all the network could speak to, and so run code in.

    Raises:
        ConfigurationError: Ray was imported before, without the setting, which it reads then and never again.
    """
    ray = sys.modules.get("ray")
    if ray is None or cluster.address is not None or _LOOPBACK in os.environ or ray.is_initialized():
        return
    raise ConfigurationError(
        "Ray was imported before, so the cluster that is to be started now would listen on all addresses of this "
        "machine, without a password. Do one of these: import Ray after taskres_hf has started its cluster, or not at "
        f"all; set {_LOOPBACK}=0 and RAY_AUTH_MODE=token in the environment before Python starts; or start a cluster "
        "yourself (ray start --head) and give its address (address='auto', --address auto)."
    )


def _quiet_ray_data() -> None:
    """Errors only on the terminal; everything stays in Ray's own log file."""
    for handler in logging.getLogger("ray.data").handlers:
        if "File" not in type(handler).__name__:
            handler.setLevel(logging.ERROR)


def _own_folder() -> str:
    """Where a local cluster keeps its sockets, whose paths may not be long, and its logs; of this user alone."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
