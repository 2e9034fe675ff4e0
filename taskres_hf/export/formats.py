"""One function a format: writes a fused classifier into a folder, and gives back what runs the file that was written.

Conversions are those of torch, OpenVINO, ONNX and ONNX Runtime; nothing here knows an operator.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..embedding.engines.choose import onnx_tower, write_onnx, write_openvino
from ..encoders import picture_size
from ..errors import ConfigurationError, MissingExtraError
from ..storage import write_bytes, write_tensors
from .fused import FusedClassifier as FusedClassifier  # for those who take a Run

Run = Callable[[Tensor], Tensor]  # pixel values [B, 3, H, W] fp32 to logits [B, K] fp32
OUTPUTS = ["logits", "probabilities"]
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
# Families whose image tower is a class of transformers by itself, and its output that is the image embedding.
_VISION_CLASSES = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "metaclip_2": ("MetaClip2VisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
}
_REQUIREMENTS = "onnxruntime>=1.20\ntransformers>=5.2\nnumpy>=1.24\npillow>=10.4\n"


def _check_installed(extra: str) -> None:
    """Raises MissingExtraError where a package of the extra is not there."""
    try:
        for package in _NEEDED[extra]:
            import_module(package)
    except ImportError as error:
        raise MissingExtraError(f'This export needs its packages: pip install "taskres_hf[{extra}]".') from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What converters say about branches, operators and opset versions is for those who write converters."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def write_onnx_file(fused: FusedClassifier, file: Path, precision: str) -> Run:
    """`pixel_values` [B, 3, H, W] fp32 to `logits` [B, K] and `probabilities` [B, K] fp32 as one ONNX file.

    The tower is converted once and kept in the cache folder: another classifier over the same base takes a second.
    int8 are the weights of the tower's products and, at run time, what is multiplied with them (ONNX Runtime's dynamic
    quantisation); the classifier itself stays in fp32.
    """
    _check_installed("onnx")
    import onnx

    with _quiet():
        tower = onnx.load(str(onnx_tower(fused.base)))
        head_file = file.with_name("head.onnx")
        example = torch.zeros(2, fused.head.linear.in_features, dtype=fused.base.dtype)
        write_onnx(fused.head, example, head_file, "image_embeds", OUTPUTS)
        head = onnx.compose.add_prefix(onnx.load(str(head_file)), "head/", rename_inputs=False, rename_outputs=False)
        head_file.unlink()
        whole = onnx.compose.merge_models(tower, head, io_map=[("image_embeds", "image_embeds")])
        del whole.opset_import[1:]  # merging names the same set of operators once a part
        whole.producer_name = "taskres_hf"
        onnx.checker.check_model(whole)
        if precision == "int8":
            _quantised(whole, file)
        else:
            onnx.save(whole, str(file))
    return onnx_runner(file)


def _quantised(whole: Any, file: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = file.with_name("plain.onnx")
    head = [node.name for node in whole.graph.node if node.name.startswith("head/")]
    onnx.save(whole, str(plain))
    try:
        quantize_dynamic(
            str(plain), str(file), op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8,
            nodes_to_exclude=[*head, *(f"{name}_MatMul" for name in head)],  # a Gemm becomes a MatMul of that name
        )  # fmt: skip
    finally:
        plain.unlink()


def onnx_runner(file: Path) -> Run:
    """What runs an exported ONNX file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


def to_onnx(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """`model.onnx`."""
    return write_onnx_file(fused, folder / "model.onnx", precision)


def to_openvino(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """`model.xml` and `model.bin`; with fp16 the weights are stored in fp16."""
    _check_installed("openvino")
    import openvino

    file = folder / "model.xml"
    with _quiet():
        write_openvino(fused, picture_size(fused.base), file, precision == "fp16", OUTPUTS)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: torch.from_numpy(compiled(pixels.numpy())["logits"].copy())


def to_torch(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """`model.pt2`, a program of `torch.export`: calling it gives logits and probabilities."""
    file = folder / "model.pt2"
    batch = torch.export.Dim("batch", min=1, max=4096)
    with _quiet():
        program = torch.export.export(
            fused, (torch.zeros(2, 3, *picture_size(fused.base)),), dynamic_shapes=({0: batch},), strict=False
        )
        content = io.BytesIO()
        torch.export.save(program, content)
        write_bytes(file, content.getvalue())  # on a full disk torch's own writer ends the process
        loaded = torch.export.load(file).module()

    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = loaded(pixels)[0]
        return logits

    return run


def to_linear(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """The image tower as a model of transformers, `head.safetensors` with a linear layer, and a script that uses both.

    Raises:
        ConfigurationError: transformers has no class for this base's image tower with its projection.
    """
    import transformers

    base, head = fused.base, fused.head
    if base.config.model_type not in _VISION_CLASSES:
        raise ConfigurationError(
            f"transformers has no class for the image tower of {base.config.model_type!r} and its projection alone; "
            f"format 'linear' is for {', '.join(_VISION_CLASSES)}. Use 'onnx' or 'torch'."
        )
    name, output = _VISION_CLASSES[base.config.model_type]
    config = base.config.vision_config
    if hasattr(base.config, "projection_dim"):  # the tower's own may be another, unused one
        config.projection_dim = base.config.projection_dim
    vision = getattr(transformers, name)(config).to(base.dtype)
    known = base.state_dict()
    known |= {
        key.removeprefix("vision_model."): value for key, value in known.items()
    }  # some classes have no such level
    vision.load_state_dict({key: known[key] for key in vision.state_dict()})
    vision.save_pretrained(folder)
    tensors = {"weight": head.linear.weight, "bias": head.linear.bias}
    more = {"offset": head.offset, "threshold": None if head.threshold is None else torch.tensor(head.threshold)}
    tensors |= {name: tensor for name, tensor in more.items() if tensor is not None}
    write_tensors(folder / "head.safetensors", tensors)
    script = _template("classify.py").decode()
    script = script.replace("CLIPVisionModelWithProjection", name).replace("image_embeds", output)
    write_bytes(folder / "classify.py", script.encode())
    loaded = getattr(transformers, name).from_pretrained(folder).eval()

    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = head(loaded(pixels.to(loaded.dtype))[output])[0]
        return logits

    return run


def to_handler(fused: FusedClassifier, folder: Path, precision: str) -> Run:
    """`model.onnx`, and `handler.py` and `requirements.txt` for Inference Endpoints."""
    write_bytes(folder / "handler.py", _template("handler.py"))
    write_bytes(folder / "requirements.txt", _REQUIREMENTS.encode())
    return to_onnx(fused, folder, precision)


def _template(name: str) -> bytes:
    return resources.files("taskres_hf").joinpath("remote").joinpath(name).read_bytes()
