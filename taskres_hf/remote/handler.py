"""A few-shot classifier for Hugging Face Inference Endpoints; needs what requirements.txt names, and nothing else.

    EndpointHandler(path)({"inputs": picture, "parameters": {"top_k": 3}})  ->  [{"label": ..., "score": ...}, ...]

A picture is a PIL image, the bytes of a file, or those bytes in base64 (also as a `data:` address). Of a list of
pictures the answer is a list of answers. Addresses and paths are not followed.
"""

import base64
import binascii
import io
import json
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # others of Pillow's start programs, or are rare
_BATCH = 16
_TOP_K = 5


class EndpointHandler:
    """Loads what lies in the folder `path` once, and answers requests."""

    def __init__(self, path=""):
        folder = Path(path)
        self.labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self.processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=providers)

    def __call__(self, data):
        """Labels with their probabilities, best first; where pictures may have several labels, each by itself.

        Args:
            data: `{"inputs": picture or list of pictures, "parameters": {"top_k": 5}}`, or `inputs` alone.

        Raises:
            ValueError: no picture, more than Pillow's limit of pixels, or an unknown or bad parameter.
        """
        whole = isinstance(data, dict)
        if whole and "inputs" not in data:
            raise ValueError(f"The request has no 'inputs', a picture in base64 or a list of them; got {list(data)}.")
        inputs, parameters = (data["inputs"], data.get("parameters") or {}) if whole else (data, {})
        if not isinstance(parameters, dict) or set(parameters) - {"top_k"}:
            raise ValueError(f"'parameters' may hold 'top_k' only; got {parameters!r:.200}.")
        top_k = parameters.get("top_k", _TOP_K)
        if type(top_k) is not int or top_k < 1:
            raise ValueError(f"'top_k' must be a whole number of 1 or more; got {top_k!r:.50}.")
        several = isinstance(inputs, (list, tuple))
        answers = self._answers([_picture(item) for item in (inputs if several else [inputs])], top_k)
        return answers if several else answers[0]

    def _answers(self, pictures, top_k):
        answers = []
        for start in range(0, len(pictures), _BATCH):
            inputs = self.processor(images=pictures[start : start + _BATCH], return_tensors="np")
            pixels = np.asarray(inputs["pixel_values"], dtype=np.float32)
            for row in self.session.run(["probabilities"], {"pixel_values": pixels})[0]:
                best = np.argsort(-row, kind="stable")[:top_k]
                answers.append([{"label": self.labels[index], "score": float(row[index])} for index in best])
        return answers


def _picture(item):
    """An RGB picture, upright, as it was in training."""
    if isinstance(item, str):
        text = item.partition(",")[2] if item.startswith("data:") else item
        try:
            item = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"A picture given as text must be in base64; got {item[:40]!r}.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(item, (bytes, bytearray)):
                item = Image.open(io.BytesIO(item), formats=_FORMATS)
            if not isinstance(item, Image.Image):
                raise TypeError(f"got a {type(item).__name__}")
            if item.mode == "F":
                raise TypeError("its pixels are floating-point numbers of unknown range")
            return load_image(item)
    except Exception as error:  # Pillow raises many types on what is no picture, or a damaged one
        raise ValueError(f"An input is no picture that can be read: {error}") from error
