"""Engines, the forms a frozen image tower can run in: runs it in the fastest the machine has, and says which that was.

`engine`: `"torch"`, `"openvino"`, `"onnxruntime"`, or `"auto"`. `precision`: `"fp32"`, `"bf16"`, `"int8"`, or `"auto"`.
Automatic choices never change what an answer means, only its last bits: bf16 in torch is chosen where the tower is
large enough to gain and the processor was found to multiply it faster than fp32 (or the GPU does so natively), else
fp32. Whether another form gives the stock tower's embeddings, and on a CPU whether it is faster here, is tried. int8,
in torch, is faster yet and rounds more: it is the user's explicit choice. What ran is recorded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...encoders import encode_images, family_of, picture_size
from ...errors import ArtifactError, ConfigurationError, MissingExtraError
from ...machine import is_faster
from ...storage import cache_root, read_sealed, staging_folder, umask, warn_not_kept, write_sealed
from .devices import DeviceTower, device_of, is_accelerator, largest_batch, multiplies_bf16
from .onednn import int8_variant, onednn
from .rewriting import best_batch_size, image_weights_digest, int8_obstacle, rewritten, watched_module

_FORMAT = 5  # of converted towers kept on disk
_SHEET = "sha256.json"  # the checksums of a converted tower's files


@dataclass(frozen=True)
class ImageEngine:
    """A way to run the tower: call it with pixel values [B, 3, H, W] to get embeddings [B, D] fp32 on the CPU.

    Attributes:
        engine, precision: what was chosen. batch_size: pictures a pass at which it is fastest.
        prepare: converts the tower and returns what runs it; called when the first pictures come.
        is_stock: whether it is the tower as it is, so that there is nothing to compare it with.
        variant: what else, of this machine, its embeddings depend on by more than last bits; or nothing.
    """

    engine: str
    precision: str
    batch_size: int
    prepare: Callable[[], Callable[[Mapping[str, Tensor]], Tensor]]
    is_stock: bool = False
    variant: str = ""

    def get_ready(self) -> None:
        """Convert the tower now rather than when the first pictures come."""
        _ = self._run

    @cached_property
    def _run(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return self.prepare()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._run(inputs)

    @property
    def beside(self) -> DeviceTower | None:
        """The tower where it runs on an accelerator; it is converted for that. None on the CPU."""
        return self._run if isinstance(self._run, DeviceTower) else None

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


class Tower(nn.Module):
    """Pixel values to embeddings, as one module to convert."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = rewritten(base)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode_images(self.base, {"pixel_values": pixel_values})


def converted_tower(engine: str, name: str, base: PreTrainedModel, convert: Callable[[Path], None]) -> Path:
    """A file of a converted tower, kept in the cache folder for the next time.

    Args:
        engine: folder to keep it in. name: of the file that opens it. convert: writes this file, given its path, and
            what belongs to it into the same folder.

    A folder of files that is damaged is made again; one that cannot be kept lasts as long as the process.
    """
    folder = cache_root() / engine / f"{image_weights_digest(base)[:24]}-{_FORMAT}"
    if folder.is_dir():
        if _is_whole(folder):
            return folder / name
        warnings.warn(f"The converted tower in {folder} is damaged and is made again.", stacklevel=2)
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder.parent, folder.name) as staging:
            convert(staging / name)
            write_sealed(staging / _SHEET, {file.name: file_sha256(file) for file in staging.iterdir()})
            staging.chmod(0o777 & ~umask())
            os.rename(staging, folder)
    except (ArtifactError, OSError) as error:
        if not folder.is_dir():  # or another process was faster
            warn_not_kept(folder.parent, "The converted tower is", error)
            folder = _for_this_process(name, base, convert)
    return folder / name


def _for_this_process(name: str, base: PreTrainedModel, convert: Callable[[Path], None]) -> Path:
    """A folder with the converted tower that lasts as long as its base."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="taskres-"))
        weakref.finalize(base, shutil.rmtree, folder, ignore_errors=True)
        convert(folder / name)
    except OSError as error:
        raise ArtifactError(
            f"There is no room for the converted tower, neither in the cache folder nor in {tempfile.gettempdir()} "
            f"({error.strerror or error}). Make room, or run engine='torch', which needs no files."
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        sums = read_sealed(folder / _SHEET)
        return bool(sums) and all(file_sha256(folder / name) == value for name, value in sums.items())
    except (ArtifactError, OSError):
        return False


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def write_openvino(
    module: nn.Module, size: tuple[int, int], file: Path, half: bool = False, output_names: Sequence[str] = ()
) -> None:
    """Convert a module of pixel values [B, 3, H, W] to OpenVINO's format, with weights in fp32 or fp16.

    What `openvino.convert_model` does, without its reports of usage: some thirty, each sent by a fork of this process,
    unless the user has opted out.
    """
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns about branches that do not depend on the pixels
        traced = TorchScriptPythonDecoder(module, example_input=torch.zeros(1, 3, *size))
        model = frontend.convert(frontend.load(traced))
    model.reshape([-1, 3, *size])
    for output, name in zip(model.outputs, output_names, strict=False):
        output.get_tensor().set_names({name})
    openvino.save_model(model, file, compress_to_fp16=half)


def _openvino_tower(openvino: Any, base: PreTrainedModel, precision: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    height, width = picture_size(base)
    core = openvino.Core()

    def convert(file: Path) -> None:
        write_openvino(Tower(base).eval(), (height, width), file)

    model = core.read_model(converted_tower("openvino", "tower.xml", base, convert))
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )

    lock = threading.Lock()  # it holds one request, and runs that with all threads

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with lock:
            return torch.from_numpy(compiled(_pixels(inputs))[0].copy())

    return run


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


def onnx_tower(base: PreTrainedModel) -> Path:
    """The tower as an ONNX file: `pixel_values` [B, 3, H, W] to `image_embeds` [B, D], in the tower's dtype."""

    def convert(file: Path) -> None:
        with torch.no_grad():
            write_onnx(Tower(base), torch.zeros(2, 3, *picture_size(base)), file, "pixel_values", ["image_embeds"])

    return converted_tower("onnx", "tower.onnx", base, convert)


def write_onnx(module: nn.Module, example: Tensor, file: Path, input_name: str, output_names: list[str]) -> None:
    """Convert a module of one input, whose first dimension may be of any size, to an ONNX file."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every torchvision operator it misses
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), str(file), input_names=[input_name], output_names=output_names, dynamo=True,
            external_data=False, verbose=False, dynamic_shapes=({0: batch},),
        )  # fmt: skip


def _onnxruntime_tower(onnxruntime: Any, base: PreTrainedModel) -> Callable[[Mapping[str, Tensor]], Tensor]:
    file = onnx_tower(base)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": _pixels(inputs)})[0])

    return run


def _pixels(inputs: Mapping[str, Tensor]) -> Any:
    """Pixel values of any dtype, as the tower in fp32 takes them."""
    return inputs["pixel_values"].detach().float().cpu().numpy()


ENGINES = ("auto", "torch", "openvino", "onnxruntime")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
_LARGEST_REUSED = 31 << 20  # bytes; glibc's limit is 32 MiB
_LARGE = 512  # width of a tower from which bf16 pays


def make_engine(base: PreTrainedModel, engine: str = "auto", precision: str = "auto") -> ImageEngine:
    """The engine for a base.

    Args:
        base: the dual encoder, on its device. engine, precision: see the module.

    Raises:
        ConfigurationError: an unknown name, or a combination that does not exist.
        MissingExtraError: the engine's package is not installed.
    """
    if engine not in ENGINES or precision not in PRECISIONS:
        raise ConfigurationError(
            f"`engine` must be one of {ENGINES} and `precision` one of {PRECISIONS}; got {engine!r}, {precision!r}."
        )
    tower = getattr(base, "vision_model", base)
    parameter, device = next(tower.parameters()), device_of(base)
    on_cpu = not is_accelerator(device)
    half = parameter.dtype in (torch.bfloat16, torch.float16)  # the user chose a dtype for the base: keep it
    clip_like = family_of(base).clip_layers
    wide = _is_wide(base)
    if precision == "auto" and engine != "onnxruntime":
        pays = wide and not half and (is_faster(torch.bfloat16) if on_cpu else multiplies_bf16(device))
        precision = "bf16" if pays else "fp32"
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
            f"{parameter.dtype}, on {device}. Use engine='torch'."
        )
    watched = engine_of_watched(base, f"{engine}-{precision}")
    if watched is not None:
        return watched
    if engine == "torch":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
        return ImageEngine(
            "torch",
            precision,
            best_batch_size(base) if on_cpu else largest_batch(base, device),
            lambda: _torch_tower(base, dtype),
            variant=int8_variant() if precision == "int8" else "",
        )
    return openvino_engine(base, precision) if engine == "openvino" else onnxruntime_engine(base, precision)


def candidates(base: PreTrainedModel, precision: str = "auto") -> list[tuple[str, str]]:
    """Engine and precision of what may be chosen automatically for a base beside the tower as it is.

    What is installed, fits and changes no more than last bits; the quickest to get ready first. `precision` "fp32"
    leaves bf16 out. OpenVINO's bf16 moves accuracies more than torch's, and `torch.compile` was slower than the
    rewritten tower where it was tried, so neither is among them.
    """
    parameter = next(getattr(base, "vision_model", base).parameters())
    if is_accelerator(device_of(base)) or parameter.dtype != torch.float32:
        return []
    found = [("torch", "fp32")]
    if precision == "auto" and _is_wide(base) and is_faster(torch.bfloat16):
        found.append(("torch", "bf16"))
    if family_of(base).clip_layers:
        packages = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxscript")}
        found += [(name, "fp32") for name, needed in packages.items() if all(map(importlib.util.find_spec, needed))]
    return found


def _is_wide(base: PreTrainedModel) -> bool:
    return bool(getattr(getattr(base.config, "vision_config", None), "hidden_size", 0) >= _LARGE)


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
    device = device_of(base)
    size = largest_batch(base, device) if is_accelerator(device) else best_batch_size(base)
    return ImageEngine("torch", name, size, lambda: _torch_tower(base, None), is_stock=True)


def _check_int8(base: PreTrainedModel, engine: str, fp32_on_cpu: bool) -> None:
    if engine != "torch":
        raise ConfigurationError(f"precision='int8' runs in engine='torch'; got engine={engine!r}.")
    obstacle = int8_obstacle(base) if fp32_on_cpu else "the base is not in fp32 on a CPU"
    if obstacle:
        raise ConfigurationError(
            f"precision='int8' does not run with this base ({base.config.model_type!r}): {obstacle}. "
            "Use precision='auto'."
        )


def _torch_tower(base: PreTrainedModel, dtype: torch.dtype | None) -> Callable[[Mapping[str, Tensor]], Tensor]:
    tower, device = base if dtype is None else rewritten(base, dtype), device_of(base)
    if is_accelerator(device):
        return DeviceTower(base, partial(encode_images, tower), device)
    # glibc keeps pieces as large as the largest that was given back, and asks the system anew for larger ones: slow.
    torch.empty(_LARGEST_REUSED, dtype=torch.uint8)
    return partial(_torch, tower)


def _torch(base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    device = device_of(base)
    return encode_images(base, {name: value.to(device) for name, value in inputs.items()}).float().cpu()
