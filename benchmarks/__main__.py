"""`python -m benchmarks [GROUP ...]`: measure, print a table, and write `benchmarks/results.json`.

All groups take about 25 minutes on two cores. Rows that cannot run on a machine, for want of instructions or of the
openvino extra, are listed with the reason."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import warnings

import torch

from . import embedding, epochs, peers, results, service, serving
from .timing import Report

GROUPS = {
    "photos": [lambda _: results.print_photos()],
    "start-up": [serving.start_up],
    "loading": [serving.loading],
    "serving": [serving.inference],
    "service": [service.service],
    "epochs": [epochs.epochs, epochs.growth],
    "preprocessing": [embedding.preprocessing],
    "throughput": [
        embedding.throughput,
        lambda report: embedding.throughput(report, 16, 48),
        lambda report: embedding.throughput(report, 32, 16, (4000, 3000), rounds=5),
    ],
    "precision": [embedding.precision],
    "training": [embedding.training],
    "views": [lambda report: embedding.training(report, 640, 40, views=4)],
    "peers": [peers.peers],
    "million": [epochs.million],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", nargs="*", choices=[*GROUPS, []], help="default: all")
    parser.add_argument("--table", action="store_true", help="measure nothing, print results.json as Markdown")
    options = parser.parse_args()
    if options.table:
        print(Report.stored().markdown())
        return
    warnings.simplefilter("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    report = Report()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TASKRES_CACHE", cache)
        for name in options.group or GROUPS:
            for part in GROUPS[name]:
                part(report)
            report.save()


if __name__ == "__main__":
    main()
