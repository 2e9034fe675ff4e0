"""The image tower in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import ConfigurationError, MissingExtraError
from .engine import ImageEngine, Tower, converted_tower, picture_size
from .rewriting import best_batch_size


def onnxruntime_engine(base: PreTrainedModel, precision: str) -> ImageEngine:
    if precision == "bf16":
        raise ConfigurationError("engine='onnxruntime' runs in fp32 on the CPU. Pass precision='fp32'.")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise MissingExtraError('engine="onnxruntime" needs its packages: pip install "taskres_hf[onnx]".') from error
    size = best_batch_size(base, torch.get_num_threads())
    return ImageEngine("onnxruntime", "fp32", size, lambda: _onnxruntime_tower(onnxruntime, base))


def _onnxruntime_tower(onnxruntime: Any, base: PreTrainedModel) -> Callable[[Mapping[str, Tensor]], Tensor]:
    height, width = picture_size(base)

    def convert(file: Path) -> None:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every torchvision operator it misses
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Tower(base), (torch.zeros(2, 3, height, width),), str(file), input_names=["pixel_values"],
                output_names=["image_embeds"], dynamo=True, external_data=False, verbose=False,
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=4096)}},
            )  # fmt: skip

    file = converted_tower("onnx", "tower.onnx", base, convert)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0])

    return run
