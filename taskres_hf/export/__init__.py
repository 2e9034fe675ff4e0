"""A trained classifier for where this library is not: ONNX, OpenVINO, torch, plain transformers, a browser, the Hub."""

from .exporting import FORMATS, PRECISIONS, export

__all__ = ["FORMATS", "PRECISIONS", "export"]
