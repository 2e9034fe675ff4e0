"""The table of docs/export.md: every format and precision on a shipped task, what it weighs and what it keeps.

python -m benchmarks.export
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.export.exporting import TOLERANCES, export
from taskres_hf.tables import Table

TASK, SHOTS = "animals-plants", 16
RUNS = {
    "onnx": "ONNX Runtime: servers, phones, C++, C#, Java",
    "openvino": "OpenVINO: Intel processors",
    "torch": "torch, without transformers",
    "linear": "transformers, to be read and changed",
    "web": "a browser, from any static host",
    "handler": "Hugging Face Inference Endpoints",
}
COMBINATIONS = [
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "fp16"),
    ("torch", "fp32"), ("linear", "fp32"), ("linear", "fp16"), ("web", "fp32"), ("web", "int8"), ("handler", "fp32"),
]  # fmt: skip


def table() -> Table:
    """Rows of formats and precisions; sizes without the JavaScript that `--vendor` adds."""
    spec, splits = demo_tasks()[TASK], demo_dataset(TASK)
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    arguments = TaskResTrainingArguments(shots=SHOTS, seed=1, on_short="ignore", disable_tqdm=True)
    TaskResTrainer(model, arguments, splits["train"]).train()
    rows = []
    for format, precision in COMBINATIONS:
        with tempfile.TemporaryDirectory() as folder:
            facts = export(model, Path(folder) / "out", format, precision=precision, dataset=splits["test"])
        check, accuracy = facts["check"], facts["accuracy"]
        difference = f"{check['largest_difference'] / check['tolerance'] * TOLERANCES[precision]:.1e}"
        size, same = f"{facts['bytes'] / 1e6:.1f}", 100 * check["same_answer"]
        rows.append([format, precision, RUNS[format], size, difference, same, 100 * accuracy["exported"]])
    own = 100 * accuracy["classifier"]
    columns = ["format", "precision", "runs in", "MB", "difference", "same answer %", "accuracy %"]
    return Table(columns, rows, caption=f"Of the classifier itself: {own:.1f} % of {accuracy['pictures']} pictures.")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table().markdown())
