"""What the files of an artifact must hold: one check of a config.json, one of the tensors. Imports no torch.

Nothing that passes is of another type, range or depth than the code that reads it expects, wherever it came from.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import struct
import sys
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from .storage import StoredTensor

# The files of an artifact, and the tensors in its weights.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"
RESIDUAL = "residual"
SHIFT = "base_shift"
CLASS_BIAS = "class_bias"
# Of an artifact: 2 adds the image side to `base_fingerprint`; 3 the class bias, several labels per picture and the
# settings in `AS_PUBLISHED`. What uses none of those is written as version 2, which earlier releases read; from the
# others they must keep their hands. 4 is over an image tower alone (`base_classifier`), 5 of texts (`text_encoding`).
FORMAT_VERSION, ALONE_VERSION, HEAD_VERSION, PLAIN_VERSION = 5, 4, 3, 2

_REQUIRED = (
    "base_model_name_or_path",
    "base_fingerprint",
    "projection_dim",
    "id2label",
    "alpha",
    "logit_scale",
)


def tensor_digest(tensor: StoredTensor) -> str:
    """Checksum of a tensor's dtype, shape and bytes; it finds damage, it does not prove who wrote the file."""
    return hashlib.sha256(f"{tensor.torch_name} {list(tensor.shape)} ".encode() + tensor.content).hexdigest()


def tensors_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """Checksum of all tensors of an artifact; of the residual alone where there is no other."""
    digests = [tensor_digest(tensors[name]) for name in (RESIDUAL, SHIFT, CLASS_BIAS) if name in tensors]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _broken(values: array[float]) -> bool:
    """Whether some of these fp32 numbers are NaN or infinite: all bits of the exponent are set in those alone."""
    highest = values.tobytes()[3 if sys.byteorder == "little" else 0 :: 4]
    return (b"\x7f" in highest or b"\xff" in highest) and not all(map(math.isfinite, values))


def problem_of_tensors(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Why these are not an artifact's tensors, finite floating-point matrices and a bias [K]; None if they are."""
    if RESIDUAL not in tensors or not set(tensors) <= {RESIDUAL, SHIFT, CLASS_BIAS}:
        return (
            f"it must hold exactly one tensor named {RESIDUAL!r} (and {SHIFT!r} for an enhanced base, {CLASS_BIAS!r} "
            f"for a bias); it holds {sorted(tensors)[:5]}. It is not a TaskRes artifact."
        )
    for name, tensor in tensors.items():
        values = tensor.values()
        if name == CLASS_BIAS:
            if values is None or len(tensor.shape) != 1 or _broken(values):
                return (
                    f"{CLASS_BIAS} must be K finite floating-point numbers; it is {tensor.torch_name} "
                    f"{list(tensor.shape)}, or holds NaN or infinite values. Save or download the model again."
                )
        elif values is None or len(tensor.shape) != 2:
            return (
                f"the residual must be a floating-point matrix [K, D]; it is {tensor.torch_name} {list(tensor.shape)}."
            )
        elif _broken(values):
            classes, dim = tensor.shape
            bad = sum(_broken(values[row * dim : (row + 1) * dim]) for row in range(classes))
            return (
                f"the residual holds NaN or infinite values in {bad} of {classes} classes. Training diverged or the "
                "file is damaged: train again with a lower learning rate, or download the file again."
            )
    return None


_DEEPEST = 32  # objects and lists within each other; ours have five
_LARGEST = 2**63  # of a whole number

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _printable(value: Any) -> bool:
    return isinstance(value, str) and (value.isprintable() or not value)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGEST and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(value)


def _count(value: Any) -> bool:
    return _whole(value) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _base64(value: Any) -> bool:
    try:
        return isinstance(value, str) and base64.b64decode(value, validate=True) is not None
    except (binascii.Error, ValueError):
        return False


def _finite_halves(packed: bytes) -> bool:
    return len(packed) % 2 == 0 and all(map(math.isfinite, struct.unpack(f"<{len(packed) // 2}e", packed)))


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def _list(of: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _object(of: Check = lambda value: True) -> Check:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _record(**entries: Check) -> Check:
    """An object in which each of these is null, absent or as it must be."""
    return lambda value: (
        isinstance(value, dict) and all(value.get(key) is None or check(value[key]) for key, check in entries.items())
    )


def _setting(value: Any) -> bool:
    return _text(value) or _number(value)


def _change(value: Any) -> bool:
    """What was done to the classes after training."""
    texts = _list(_text)
    return (
        isinstance(value, dict)
        and _text(value.get("change"))
        and _record(
            classes=texts,
            to=texts,
            num_images=_count,
            reembedded=lambda flag: isinstance(flag, bool),
            **{"from": _text},
        )(value)
    )


# What a downloaded file names stays in the repository: its revision, its folder.
_INSIDE = re.compile(r"(?!.*\.\.)\w[\w.+ -]*(/\w[\w.+ -]*)*")
_CODE_FOR = {"AutoConfig", "AutoModelForImageClassification"}  # what `include_code` adds code for

_MULTI_LABEL = "multi_label_classification"
# A threshold for rejecting pictures, see `rejection.Rejection`.
_REJECTION: dict[str, Check] = {
    "rate": lambda value: _positive(value) and value < 1, "threshold": _number, "pictures": _count,
    "means": lambda value: _base64(value) and _finite_halves(base64.b64decode(value)),
}  # fmt: skip

# How a text becomes an embedding, see `language.encoding.TextEncoding`.
_TEXT_ENCODING: dict[str, Check] = {
    "pooling": _one_of("mean", "cls", "max", "head"), "prompt": _text,
    "max_length": lambda value: _whole(value) and value > 0,
}  # fmt: skip

# What each key of config.json must be, where it is there and not null.
_KEYS: dict[str, Check] = {
    "rejection": lambda value: isinstance(value, dict) and all(key in value and check(value[key])
                                                               for key, check in _REJECTION.items()),
    "base_model_name_or_path": _text, "base_model_revision": _text, "base_model_type": _printable,
    "base_model_subfolder": _text, "projection_dim": lambda value: _whole(value) and value > 0,
    "base_fingerprint": _record(
        shape=_list(_count), norm=_number, sketch=_list(_number), score=_list(_number), dtype=_text,
        prompts_sha256=_text, tokens_sha256=_text,
        image=_record(sketch=_list(_number), weights=_count, dtype=_text, settings=_object(_setting)),
    ),
    "id2label": _object(_text), "label2id": _object(_count), "templates": _list(_text),
    "class_descriptions": _object(lambda value: _text(value) or _list(_text)(value)), "prompt_names": _object(_text),
    "underscores": _one_of("replace", "keep"), "prompt_average": _one_of("raw", "normalized"),
    "residual_side": _one_of("text", "image"), "alpha": _number, "logit_scale": _positive, "logit_bias": _number,
    "enhanced_base": _object(), "library_versions": _object(_text), "residual_sha256": _text,
    "processor_sha256": _text, "dtype": _text,
    "base_classifier": _one_of("head", "class_means", "class_names"),
    "text_encoding": lambda value: isinstance(value, dict) and set(value) == set(_TEXT_ENCODING)
                                   and all(check(value[key]) for key, check in _TEXT_ENCODING.items()),
    "problem_type": _one_of("single_label_classification", _MULTI_LABEL), "architectures": _list(_text),
    "auto_map": _object(),
    "few_shot": _record(shots=_count, seed=_whole, num_images=_count, indices=_list(_count)),
    "training": _record(
        method=_text, recipe=_text, engine=_text, best_epoch=_count, seed=_whole, merged=_list(_text),
        continued_from=_object(), changes=_list(_change), threshold=lambda value: _positive(value) and value < 1,
    ),
    "metrics": _record(
        noun=_one_of("picture", "text"),
        accuracy=_number, zero_shot_accuracy=_number, accuracy_interval=_list(_number), method=_text, split=_text,
        folds=_count, num_images=_count, strength=_number, per_class=_object(_object()),
        map=_number, zero_shot_map=_number, micro_f1=_number, macro_f1=_number, zero_shot_micro_f1=_number,
        zero_shot_macro_f1=_number, unmeasured_classes=_list(_text),
    ),
    "data": _record(
        labels=_record(separator=_text, columns=_list(_text)),
        id=_text, name=_text, split=_text, train_digest=_text, train_images=_count, epoch_chosen_on=_text,
        train_pictures=_record(count=_count, sha256_prefixes=_base64),
        account=_record(kind=_text, left_out=_list(lambda row: isinstance(row, dict) and {"reason", "count"} <= set(row)
                                                   and _text(row["reason"]) and _count(row["count"]))),
    ),
}  # fmt: skip


def problem_of_version(config: Mapping[str, Any]) -> str | None:
    """Why a config.json is not of a format that this library reads."""
    version = config.get("format_version", 1)
    if isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION:
        return None
    return (
        f"it has format_version {version!r:.60}; this library reads up to {FORMAT_VERSION}. It was made by a newer "
        "taskres_hf: upgrade with `pip install -U taskres_hf`."
    )


# What version 3 adds, with its range; 1 is as published.
_SETTINGS: dict[str, tuple[float, float]] = {
    "strength": (0, 1), "logit_scale_factor": (1e-6, 1e6), "normalize_weight": (False, True),
}  # fmt: skip


def problem_of_config(config: Mapping[str, Any], biased: bool = False) -> str | None:
    """Why a config.json cannot be loaded: a newer format, a key missing, a value of another type or range.

    Args:
        biased: whether the tensors hold a class bias.
    """
    if problem := problem_of_version(config):
        return problem
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        return f"it lacks {', '.join(missing)}: it is not a complete TaskRes artifact. Save it again."
    if not _is_shallow(config):
        return "it is nested too deeply. Save the artifact again."
    for key, check in _KEYS.items():
        value = config.get(key)
        if value is not None and not check(value):
            return f"{key} has the wrong type or value ({value!r:.60}). Save the artifact again."
    for key in ("base_model_revision", "base_model_subfolder"):
        if config.get(key) and not _INSIDE.fullmatch(config[key]):
            return f"{key} leads out of the repository ({config[key]!r:.60})."
    if not set(config.get("auto_map") or {}) <= _CODE_FOR:
        return f"auto_map names code for {str(config['auto_map'])!r:.60}, which no artifact has."
    names, ids = config["id2label"], config.get("label2id")
    if not names or set(names) != {str(index) for index in range(len(names))}:
        return "id2label must name the classes 0 to K-1. Save the artifact again."
    if ids is not None and ids != {name: int(index) for index, name in names.items()}:
        return "label2id is not id2label the other way round. Save the artifact again."
    rejection = config.get("rejection")
    if rejection:
        rows, rest = divmod(len(base64.b64decode(rejection["means"])), 2 * config["projection_dim"])
        if rest or not 0 < rows <= len(names):
            return "rejection holds other means than one for each class. Save the artifact again."
    return _problem_of_settings(config, biased)


def problem_of_processor(values: Mapping[str, Any]) -> str | None:
    """Why an image processor's file is refused: it names code of its own, which transformers would ask about."""
    if not _is_shallow(values):
        return "it is nested too deeply. Save the artifact again."
    if '"auto_map": ' not in json.dumps(values):
        return None
    return (
        "it names code of its own to prepare pictures with (auto_map). No artifact of this library does, and it is not "
        "run. If you know where it comes from, delete auto_map from the file."
    )


def problem_of_shapes(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str | None:
    """Why tensors are not of a config's classes and `projection_dim`."""
    biased = CLASS_BIAS in tensors
    table = [len(config["id2label"]), config["projection_dim"]]
    expected = [1, table[1]] if config.get("residual_side") == "image" else table
    shapes = [list(tensors[name].shape) for name in (RESIDUAL, SHIFT) if name in tensors]
    bias = list(tensors[CLASS_BIAS].shape) if biased else table[:1]
    if shapes[0] == expected and shapes[1:] in ([], [table]) and bias == table[:1]:
        return None
    return (
        f"the residual has shape {shapes[0]}{f', the class bias {bias}' if biased else ''}; {CONFIG} speaks of "
        f"{table[0]} classes and projection_dim {table[1]}. The two files do not belong together."
    )


def _is_shallow(value: Any) -> bool:
    layer = [value]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in layer if isinstance(item, (dict, list))]
        layer = [item for items in inner for item in items]
        if not layer:
            return True
    return False


def _problem_of_settings(config: Mapping[str, Any], biased: bool) -> str | None:
    for key, (low, high) in _SETTINGS.items():
        value = config.get(key, type(high)(1))
        kind = isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(high, bool)
        if not kind or not low <= value <= high:
            return (
                f"{key} must be {'true or false' if high is True else f'from {low:g} to {high:g}'}; it is "
                f"{value!r:.60}. Save the artifact again."
            )
    used = [key for key in _SETTINGS if config.get(key, 1) != 1] + [CLASS_BIAS] * biased
    used += ["problem_type"] * (config.get("problem_type") == _MULTI_LABEL)
    if problem := _problem_of_kind(config, used):
        return problem
    if used and config.get("format_version", 1) <= PLAIN_VERSION:
        return (
            f"it has {', '.join(used)}, and a format_version of before there were such: earlier versions of the "
            "library would overlook them. Set them on the model and save it."
        )
    return None


def _problem_of_kind(config: Mapping[str, Any], used: list[str]) -> str | None:
    """Why a config is of no one kind: over a dual encoder, over an image tower alone, of texts."""
    rows, encoding, version = (
        config.get("base_classifier"),
        config.get("text_encoding"),
        config.get("format_version", 1),
    )
    if (rows in ("head", "class_means") and encoding is None) != (version == ALONE_VERSION):
        return (
            f"format_version {ALONE_VERSION} is for classifiers over an image tower alone, which base_classifier says "
            "of it, and the two differ. Save the artifact again."
        )
    lacks = rows is None if encoding is not None else rows == "class_names"
    if (encoding is not None) != (version == FORMAT_VERSION) or lacks:
        return (
            f"format_version {FORMAT_VERSION} is for classifiers of texts, which text_encoding and base_classifier say "
            "of it, and they differ. Save the artifact again."
        )
    if rows is None:
        return None
    if encoding is not None and (encoding["pooling"] == "head") != (rows == "head"):
        return "text_encoding and base_classifier differ in whether there is a head. Save the artifact again."
    fixed = {"problem_type"} | (set() if rows == "class_names" else {"logit_scale_factor", "normalize_weight"})
    if set(used) & fixed or config.get("residual_side", "text") != "text":
        kind = "over an image tower alone" if encoding is None else "of texts"
        return f"a classifier {kind} has no {', '.join(used)} or image side. Save it again."
    return None
