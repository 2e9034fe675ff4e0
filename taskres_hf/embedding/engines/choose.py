"""Runs the frozen image tower in the fastest form the machine has, and says which that was.

`engine`: `"torch"`, `"openvino"`, `"onnxruntime"`, or `"auto"`. `precision`: `"fp32"`, `"bf16"`, `"int8"`, or `"auto"`.
Automatic choices never change what an answer means, only its last bits: bf16 in torch is chosen where the processor
multiplies it natively and the tower is large enough to gain, else fp32. int8, in torch, is faster yet and rounds more:
it is the user's explicit choice. What ran is recorded.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...base_model import cpu_has_bf16
from ...encoders import encode_images
from ...errors import ConfigurationError
from ...families import family_of
from .engine import ImageEngine
from .onednn import onednn
from .onnxruntime import onnxruntime_engine
from .openvino import openvino_engine
from .rewriting import best_batch_size, int8_obstacle, rewritten, takes_bytes, watched_module

ENGINES = ("auto", "torch", "openvino", "onnxruntime")


PRECISIONS = ("auto", "fp32", "bf16", "int8")


_LARGEST_REUSED = 31 << 20  # bytes; glibc's limit is 32 MiB


_LARGE = 512  # width of a tower from which bf16 pays


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
    clip_like = family_of(base).clip_layers
    wide = getattr(getattr(base.config, "vision_config", None), "hidden_size", 0) >= _LARGE
    if precision == "auto" and engine != "onnxruntime":
        precision = "bf16" if on_cpu and not half and wide and cpu_has_bf16() else "fp32"
    precision = "fp32" if precision == "auto" else precision
    if engine == "auto":  # with oneDNN torch is as fast in fp32; OpenVINO's bf16 moves accuracies more than torch's
        needed = onednn(torch.float32) is None and importlib.util.find_spec("openvino") is not None
        fits = on_cpu and not half and clip_like and wide and precision == "fp32"
        engine = "openvino" if needed and fits else "torch"
    if precision == "int8":
        _check_int8(base, engine, on_cpu and not half)
    if engine == "torch" and (half or not (on_cpu or precision == "bf16")):
        return stock_engine(base)
    if engine != "torch" and (half or not clip_like or not on_cpu):
        raise ConfigurationError(
            f"engine={engine!r} runs fp32 CLIP-like towers on the CPU; this base is {base.config.model_type!r}, "
            f"{parameter.dtype}, on {parameter.device}. Use engine='torch'."
        )
    watched = engine_of_watched(base, f"{engine}-{precision}")
    if watched is not None:
        return watched
    if engine == "torch":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
        normalisation = normalisation if precision != "fp32" and on_cpu and takes_bytes(base) else None
        return ImageEngine(
            "torch",
            precision,
            best_batch_size(base) if on_cpu else 32,
            lambda: _torch_tower(base, dtype, normalisation),
            normalisation is not None,
        )
    return openvino_engine(base, precision) if engine == "openvino" else onnxruntime_engine(base, precision)


def engine_of_watched(base: PreTrainedModel, instead_of: str) -> ImageEngine | None:
    """The tower as it is, with a warning, where a hook takes part in it, which another form would not run; or None."""
    name = watched_module(base)
    if name is None:
        return None
    if not hasattr(dict(base.named_modules()).get(name), "_hf_hook"):  # Accelerate's own, for placing a model
        warnings.warn(
            f"A hook or a replaced forward on {name} takes part in the image tower: the tower runs as it is instead "
            f"of in {instead_of}.",
            stacklevel=4,
        )
    return stock_engine(base)


def stock_engine(base: PreTrainedModel) -> ImageEngine:
    """The tower as it is, in its own dtype."""
    parameter = next(getattr(base, "vision_model", base).parameters())
    name = {torch.float32: "fp32"}.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
    size = best_batch_size(base) if parameter.device.type == "cpu" else 32
    return ImageEngine("torch", name, size, lambda: _torch_tower(base, None, None), is_stock=True)


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
    torch.empty(_LARGEST_REUSED, dtype=torch.uint8)
    return partial(_torch, base if dtype is None else rewritten(base, dtype, normalisation))


def _torch(base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(getattr(base, "vision_model", base).parameters()).device
    return encode_images(base, {name: value.to(device) for name, value in inputs.items()}).float().cpu()
