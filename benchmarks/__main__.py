"""`python -m benchmarks [GROUP ...]`: measure, print each row, and write `benchmarks/results/ABILITIES.json`.

ABILITIES are those of the processor. `--hold avx2` measures as on a processor that has no more than AVX2, as far as
libraries can be held to that. Rows that cannot run, for want of instructions or of an extra, are listed with the
reason. `--table` prints what all files hold, side by side.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

from . import device, embedding, epochs, peers, results, service, serving, solver
from .timing import HELD, Report, markdown, results_file

GROUPS: dict[str, list[Callable[[Report], object]]] = {
    "photos": [lambda _: results.print_photos()],
    "start-up": [serving.start_up],
    "loading": [serving.loading],
    "serving": [serving.inference],
    "service": [service.service],
    "epochs": [epochs.epochs, epochs.growth],
    "solver": [solver.solver],
    "preprocessing": [embedding.preprocessing],
    "throughput": [
        embedding.throughput,
        lambda report: embedding.throughput(report, 16, 32),
        lambda report: embedding.throughput(report, 32, 16, (4000, 3000), rounds=3),
    ],
    "device": [device.device],
    "precision": [embedding.precision],
    "training": [embedding.training],
    "views": [lambda report: embedding.training(report, 160, 10, views=4)],
    "peers": [peers.peers],
    "million": [epochs.million],
}

ON_REQUEST = ("photos",)  # accuracy, not speed: a table of docs/results.md


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="*", choices=[*GROUPS, []], help="default: all but photos")
    parser.add_argument("--hold", choices=list(HELD), help="hold the libraries to instructions that every machine has")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results as Markdown")
    options = parser.parse_args()
    if options.table:
        print(markdown(Report.stored()))
        return
    if options.hold and not HELD[options.hold].items() <= os.environ.items():  # libraries read it when they load
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **HELD[options.hold]})
    warnings.simplefilter("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report, begun = Report(), time.monotonic()
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TASKRES_CACHE", cache)
        for name in options.group or [name for name in GROUPS if name not in ON_REQUEST]:
            start = time.monotonic()
            for part in GROUPS[name]:
                part(report)
            report.save()
            print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes in all")
    print(f"Written to {results_file()}")


if __name__ == "__main__":
    main()
