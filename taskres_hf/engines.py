"""Runs the frozen image tower in the fastest form the machine has, and says which that was.

`engine`: `"torch"`, `"openvino"`, `"onnxruntime"`, or `"auto"`. `precision`: `"fp32"`, `"bf16"`, `"int8"`, or `"auto"`.
Automatic choices never change what an answer means, only its last bits: bf16 in torch is chosen where the processor
multiplies it natively and the tower is large enough to gain, else fp32. int8, in torch, is faster yet and rounds more:
it is the user's explicit choice. What ran is recorded.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .encoders import encode_images, image_weights_digest
from .errors import ConfigurationError, MissingExtraError
from .files import cache_root
from .linear import cpu_has_bf16, onednn
from .towers import REWRITABLE, best_batch_size, int8_obstacle, rewritten, takes_bytes

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
_FORMAT = 4  # of converted towers kept on disk
_LARGEST_KEPT = 31 << 20  # bytes; glibc's limit is 32 MiB
_LARGE = 512  # width of a tower from which bf16 pays


@dataclass(frozen=True)
class ImageEngine:
    """A way to run the tower: call it with pixel values [B, 3, H, W] to get embeddings [B, D] fp32 on the CPU.

    Attributes:
        engine, precision: what was chosen. batch_size: pictures a pass at which it is fastest.
        prepare: converts the tower and returns what runs it; called when the first pictures come.
        takes_bytes: whether the pixel values it takes are bytes, uint8, not yet normalised.
    """

    engine: str
    precision: str
    batch_size: int
    prepare: Callable[[], Callable[[Mapping[str, Tensor]], Tensor]]
    takes_bytes: bool = False

    def get_ready(self) -> None:
        """Convert the tower now rather than when the first pictures come."""
        _ = self._run

    @cached_property
    def _run(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return self.prepare()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.takes_bytes and inputs["pixel_values"].dtype != torch.uint8:
            raise TypeError(f"This engine takes pictures as bytes; got {inputs['pixel_values'].dtype}.")
        return self._run(inputs)

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


def make_engine(
    base: PreTrainedModel,
    engine: str = "auto",
    precision: str = "auto",
    normalisation: tuple[Tensor, Tensor] | None = None,
) -> ImageEngine:
    """The engine for a base.

    Args:
        base: the dual encoder, on its device. engine, precision: see the module.
        normalisation: what pixel values are: a byte times the one plus the other, per channel, [3] each. With it an
            engine may take bytes (`ImageEngine.takes_bytes`).

    Raises:
        ConfigurationError: an unknown name, or a combination that does not exist.
        MissingExtraError: the engine's package is not installed.
    """
    if engine not in ENGINES or precision not in PRECISIONS:
        raise ConfigurationError(
            f"`engine` must be one of {ENGINES} and `precision` one of {PRECISIONS}; got {engine!r}, {precision!r}."
        )
    tower = getattr(base, "vision_model", base)
    parameter = next(tower.parameters())
    on_cpu = parameter.device.type == "cpu"
    half = parameter.dtype in (torch.bfloat16, torch.float16)  # the user chose a dtype for the base: keep it
    plain = base.config.model_type in REWRITABLE
    wide = getattr(getattr(base.config, "vision_config", None), "hidden_size", 0) >= _LARGE
    if precision == "auto" and engine != "onnxruntime":
        precision = "bf16" if on_cpu and not half and wide and cpu_has_bf16() else "fp32"
    precision = "fp32" if precision == "auto" else precision
    if engine == "auto":  # with oneDNN torch is as fast in fp32; OpenVINO's bf16 moves accuracies more than torch's
        found = importlib.util.find_spec("openvino") is not None and onednn(torch.float32) is None
        engine = "openvino" if found and on_cpu and not half and plain and wide and precision == "fp32" else "torch"
    if precision == "int8":
        _check_int8(base, engine, on_cpu and not half)
    if engine == "torch":
        convert = not half and (on_cpu or precision == "bf16")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
        normalisation = normalisation if convert and precision != "fp32" and on_cpu and takes_bytes(base) else None
        return ImageEngine(
            "torch",
            str(parameter.dtype).removeprefix("torch.") if half else precision,
            best_batch_size(base) if on_cpu else 32,
            lambda: _torch_tower(base, dtype if convert else None, normalisation),
            normalisation is not None,
        )
    if not plain or not on_cpu or half:
        raise ConfigurationError(
            f"engine={engine!r} runs fp32 CLIP-like towers on the CPU; this base is {base.config.model_type!r}, "
            f"{parameter.dtype}, on {parameter.device}. Use engine='torch'."
        )
    return _openvino(base, precision) if engine == "openvino" else _onnxruntime(base, precision)


def _check_int8(base: PreTrainedModel, engine: str, fp32_on_cpu: bool) -> None:
    if engine != "torch":
        raise ConfigurationError(f"precision='int8' runs in engine='torch'; got engine={engine!r}.")
    obstacle = int8_obstacle(base) if fp32_on_cpu else "the base is not in fp32 on a CPU"
    if obstacle:
        raise ConfigurationError(
            f"precision='int8' does not run with this base ({base.config.model_type!r}): {obstacle}. "
            "Use precision='auto'."
        )


def _torch_tower(
    base: PreTrainedModel, dtype: torch.dtype | None, normalisation: tuple[Tensor, Tensor] | None
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    # glibc keeps pieces as large as the largest that was given back, and asks the system anew for larger ones: slow.
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)
    return partial(_torch, base if dtype is None else rewritten(base, dtype, normalisation))


def _torch(base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(getattr(base, "vision_model", base).parameters()).device
    return encode_images(base, {name: value.to(device) for name, value in inputs.items()}).float().cpu()


class _Tower(nn.Module):
    """Pixel values to embeddings, as one module to convert."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = rewritten(base)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode_images(self.base, {"pixel_values": pixel_values})


def _picture_size(base: PreTrainedModel) -> tuple[int, int]:
    size = base.config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _openvino(base: PreTrainedModel, precision: str) -> ImageEngine:
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
    height, width = _picture_size(base)
    core = openvino.Core()
    file = cache_root() / "openvino" / f"{image_weights_digest(base)[:24]}-{_FORMAT}.xml"
    if file.is_file():
        model = core.read_model(file)
    else:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns about branches that do not depend on the pixels
            model = openvino.convert_model(_Tower(base), example_input=torch.zeros(1, 3, height, width))
        model.reshape([-1, 3, height, width])
        _keep(openvino, model, file)
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled(inputs["pixel_values"].numpy())[0].copy())

    return run


def _keep(openvino: Any, model: Any, file: Any) -> None:
    """Save the converted tower for the next time; a cache that cannot be written only costs time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_name(f".{file.stem}.tmp.xml")
        openvino.save_model(model, staging, compress_to_fp16=False)
        staging.with_suffix(".bin").replace(file.with_suffix(".bin"))
        staging.replace(file)
    except OSError:
        return


def _onnxruntime(base: PreTrainedModel, precision: str) -> ImageEngine:
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
    height, width = _picture_size(base)
    file = cache_root() / "onnx" / f"{image_weights_digest(base)[:24]}-{_FORMAT}.onnx"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_name(f".{file.name}.tmp")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every torchvision operator it misses
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Tower(base), (torch.zeros(2, 3, height, width),), str(staging), input_names=["pixel_values"],
                output_names=["image_embeds"], dynamo=True, external_data=False, verbose=False,
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=4096)}},
            )  # fmt: skip
        staging.replace(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0])

    return run
