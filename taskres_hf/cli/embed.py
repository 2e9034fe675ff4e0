"""`taskres embed`, and what `taskres predict --output-dir` has in common with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .screen import emit, quiet_libraries, say, say_loading, warn, when_interrupted
from .values import check_device, resolve_base

if TYPE_CHECKING:
    from ..cluster import Written

_CLUSTER = "Many pictures, many machines"


class ClusterName(opt.Choice):
    RAY = "ray"


class Numbers(opt.Choice):
    FP32 = "fp32"
    FP16 = "fp16"


EngineCluster = Annotated[
    ClusterName | None,
    typer.Option(help="Share the blocks out over a Ray cluster; by default this process.", rich_help_panel=_CLUSTER),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", rich_help_panel=_CLUSTER,
        help="Of a running cluster, or 'auto'; by default one is started here.",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="How many; as many as fit.", rich_help_panel=_CLUSTER)
]
WorkerCpus = Annotated[float, typer.Option(metavar="N", help="CPUs of each worker.", rich_help_panel=_CLUSTER)]
WorkerGpus = Annotated[float, typer.Option(metavar="N", help="GPUs of each worker.", rich_help_panel=_CLUSTER)]
RowsPerBlock = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", rich_help_panel=_CLUSTER,
        help="About how many pictures a block has: what is written, and done again after a crash, at once.",
    ),
]  # fmt: skip
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", metavar="COLUMN", rich_help_panel=opt.DATA,
        help="Column of the data to write too; of shards an ending such as cls. Repeatable.",
    ),
]  # fmt: skip


OutputDir = Annotated[
    Path,
    typer.Option(
        "--output-dir", "-o", metavar="FOLDER", show_default=False,
        help="Folder to write, or of a run to go on with.",
    ),
]  # fmt: skip


def embed(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Parquet files with pictures (bytes) or paths, WebDataset shards (.tar), pictures, or folders of one "
            "of these.",
            show_default=False,
        ),
    ],
    output_dir: OutputDir,
    base_model: opt.TrainBase = None,
    device: opt.Device = None,
    engine_cluster: EngineCluster = None,
    address: Address = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = 1,
    worker_gpus: WorkerGpus = 0,
    rows_per_block: RowsPerBlock = 10_000,
    image_column: opt.ImageColumn = None,
    keep: Keep = None,
    numbers: Annotated[
        Numbers, typer.Option(help="Numbers of the embeddings written.", rich_help_panel=opt.OUTPUT)
    ] = Numbers.FP32,
    base_revision: opt.BaseRevision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    dtype: opt.Dtype = None,
    use_cpu: opt.Cpu = False,
    engine: opt.Engine = opt.EngineName.TORCH,
    precision: opt.Precision = opt.PrecisionName.FP32,
    batch_size: opt.BatchSize = None,
    allow_skipped: Annotated[
        bool,
        typer.Option("--allow-skipped", help="End with 0 although pictures were skipped.", rich_help_panel=opt.OUTPUT),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Embed a data set into parquet files, each picture once; run it again to go on where it stopped.

    Example:  taskres embed shards/ -o embedded --base-model shipped --keep cls
    """
    when_interrupted(lambda: kept_blocks(output_dir))
    quiet_libraries(quiet or as_json, collect=as_json)
    from ..cluster import embed as run

    name = base_model or opt.default_base_model()
    say_loading(f"the base model {name}", quiet or as_json)
    written = run(
        data, resolve_base(name), output_dir, image_column=image_column, keep=keep or [], numbers=numbers.value,
        rows_per_block=rows_per_block, batch_size=batch_size, engine=engine.value, precision=precision.value,
        device=check_device(device, use_cpu), progress=not (quiet or as_json),
        cluster=cluster_of(engine_cluster, address, workers, worker_cpus, worker_gpus),
        revision=base_revision, trust_remote_code=trust_remote_code, dtype=dtype and dtype.value,
    )  # fmt: skip
    tell(written, as_json, allow_skipped, "embedded")


def cluster_of(
    engine: ClusterName | None, address: str | None, workers: int | None, cpus: float = 1, gpus: float = 0
) -> Any:
    """The options that say who does the work."""
    from ..cluster import Cluster

    for option, given in {"--address": address, "--workers": workers}.items():
        if engine is None and given is not None:
            raise typer.BadParameter("it is for a cluster: add --engine-cluster ray.", param_hint=option)
    return Cluster(engine and engine.value, workers, cpus, gpus, address)


def kept_blocks(folder: Path) -> str:
    """What to say when interrupted."""
    count = len(list(folder.glob("part-*.parquet"))) if folder.is_dir() else 0
    if count:
        return f"{count} finished blocks are kept in {folder}: the same command goes on from there."
    return "Nothing was written."


def tell(written: Written, as_json: bool, allow_skipped: bool, done: str) -> None:
    """The account of a run; ends with 3 where pictures were skipped."""
    for message in written.messages:
        warn(f"Skipped: {message}")
    result = {
        "output": str(written.path), "rows": written.rows, "pictures": written.pictures, "blocks": written.blocks,
        "resumed_blocks": written.resumed, "skipped": written.errors,
    }  # fmt: skip
    before = f", {written.resumed} of them there before" if written.resumed else ""
    line = f"{written.pictures} pictures {done} in {written.path}: {written.blocks} blocks{before}"
    emit(as_json, result, lambda: say(line))
    if written.errors:
        warn(f"{written.errors} of {written.pictures} pictures were skipped: the column error says why.")
        if not allow_skipped:
            raise typer.Exit(3)
