"""The image tower in OpenVINO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import MissingExtraError
from .engine import ImageEngine, Tower, converted_tower, picture_size
from .rewriting import best_batch_size


def openvino_engine(base: PreTrainedModel, precision: str) -> ImageEngine:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError('engine="openvino" needs its package: pip install "taskres_hf[openvino]".') from error
    return ImageEngine(
        "openvino",
        precision,
        best_batch_size(base, torch.get_num_threads()),
        lambda: _openvino_tower(openvino, base, precision),
    )


def _openvino_tower(openvino: Any, base: PreTrainedModel, precision: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    height, width = picture_size(base)
    core = openvino.Core()

    def convert(file: Path) -> None:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        # What `openvino.convert_model` does, without its reports of usage: some thirty, each sent by a fork of this
        # process, unless the user has opted out.
        frontend = FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns about branches that do not depend on the pixels
            traced = TorchScriptPythonDecoder(Tower(base).eval(), example_input=torch.zeros(1, 3, height, width))
            model = frontend.convert(frontend.load(traced))
        model.reshape([-1, 3, height, width])
        openvino.save_model(model, file, compress_to_fp16=False)

    model = core.read_model(converted_tower("openvino", "tower.xml", base, convert))
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled(inputs["pixel_values"].numpy())[0].copy())

    return run
