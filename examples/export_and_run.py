"""Export a classifier to ONNX and run it with ONNX Runtime, NumPy and Pillow: the library is not needed any more."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.export import export


def classify(folder: Path, pictures: list[Image.Image]) -> list[str]:
    """The label of each picture, from the files of the export alone."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels = np.asarray(processor(images=pictures, return_tensors="np")["pixel_values"], dtype=np.float32)
    (probabilities,) = session.run(["probabilities"], {"pixel_values": pixels})
    return [labels[index] for index in probabilities.argmax(axis=1)]


def main() -> None:
    task = "animals-plants"
    spec, splits = demo_tasks()[task], demo_dataset(task)
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    arguments = TaskResTrainingArguments(shots=4, on_short="ignore")
    TaskResTrainer(model, arguments, splits["train"]).train()

    folder = Path(tempfile.mkdtemp()) / "onnx"
    facts = export(model, folder, "onnx", dataset=splits["test"])
    print(f"{facts['bytes'] / 1e6:.1f} MB, accuracy {facts['accuracy']['exported']:.3f}")
    pictures = [splits["test"][row]["image"].convert("RGB") for row in (0, 40, 80)]
    print(", ".join(classify(folder, pictures)))


if __name__ == "__main__":
    main()
