"""Checkpoints of the published TaskRes code, turned into artifacts without unpickling anything.

Such a file is a zip archive of raw numbers and one pickle that says which numbers are which matrix. The archive's sizes
and checksums are checked, the pickle's instructions are followed as data (a name stays a name, a call stays a record of
the call), and the two matrices are read from the archive. So a file cannot run code, cannot take more memory than it is
long, and cannot be damaged without notice. PyTorch's own reader does less: it believes the sizes that the
pickle states.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError, BaseMismatchError
from ..modeling_taskres import TaskResCLIPForImageClassification

_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
# Tensors, and the optimiser and scheduler objects that the published trainer stores. Nothing of these is run either.
_KNOWN = re.compile(
    r"torch\.(_utils\._rebuild_\w+|\w*Storage|float\w*|bfloat16|complex\w*|int\w*|sparse_\w+|Size|device"
    r"|serialization\._get_layout|optim\.\w+\.\w+|optim\.lr_scheduler\.\w+)"
)
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}  # fmt: skip
_LITERALS = frozenset(
    ("BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
)
_LONGEST_PICKLE = 1 << 20  # bytes, followed within seconds; that of a published checkpoint has a few thousand
_MOST_MEMBERS = 10_000
_RESIDUAL, _BASE = "text_feature_residuals", "base_text_features"
_ROUNDING = 5e-3  # the published code rounds text embeddings to fp16; relative to a row's length
_TIE = 1e-6  # two classes of one name have one text embedding


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """The residual [K, D] and, where stored, the base classifier [K, D] of a published checkpoint, in fp32.

    Args:
        path: `prompt_learner/model.pth.tar-<epoch>` as the published trainer writes it.

    Raises:
        ArtifactError: the file is missing, damaged, unpacks to more than its own size, holds anything but tensors,
            numbers and known names, or is no TaskRes checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file." if path.exists() else f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            description = _check_archive(path, archive)
            content = _Reader(path, description).content
            state = content.get("state_dict", content) if isinstance(content, dict) else {}
            if not isinstance(state, dict) or state.get(_RESIDUAL) is None:
                keys = [str(key)[:40] for key in state][:5] if isinstance(state, dict) else "no state_dict"
                raise ArtifactError(f"{path} is no TaskRes checkpoint: it has no matrix {_RESIDUAL!r}, but {keys}.")
            residual = _matrix(archive, _RESIDUAL, state[_RESIDUAL])
            base = None if state.get(_BASE) is None else _matrix(archive, _BASE, state[_BASE])
    except ArtifactError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OverflowError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged or was not written by torch 1.6 or later ({error}), and is refused. Copy it again, or "
            "save it anew with today's torch."
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    if base is not None and base.shape != residual.shape:
        raise ArtifactError(f"{path}: {_BASE!r} does not have the residual's shape {list(residual.shape)}.")
    return residual, base


def _check_archive(path: Path, archive: zipfile.ZipFile) -> bytes:
    """The pickle of an archive whose sizes and checksums are right."""
    size, members = path.stat().st_size, archive.infolist()
    unpacked = sum(member.file_size for member in members)
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or unpacked > size or len(members) > _MOST_MEMBERS:
        raise ArtifactError(
            f"{path} is refused: it has {size:,} bytes and unpacks to {unpacked:,} in {len(members):,} parts. "
            "Checkpoints are stored without compression; this is none."
        )
    names = [member.filename.split("/", 1)[-1] for member in members]
    if len(set(names)) < len(names):
        raise ArtifactError(f"{path} is refused: it has two parts of one name, so what it holds cannot be told.")
    if (bad := archive.testzip()) is not None:
        raise ArtifactError(f"{path} is damaged: the checksum of its part {bad!r} is wrong. Copy it again.")
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _LONGEST_PICKLE:
        raise ArtifactError(f"{path} is no checkpoint: it must have one short data.pkl; it has {len(pickles)}.")
    return archive.read(pickles[0])


@dataclass(frozen=True, eq=False)
class _Named:
    """A name that unpickling would import."""

    name: str


@dataclass(frozen=True, eq=False)
class _Call:
    """A call, or a new object, that unpickling would make."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Numbers:
    """A storage: ("storage", type, key in the archive, device, count)."""

    facts: Any


class _Reader:
    """Follows the instructions of a pickle as data: builds dicts, lists and tuples, and records names and calls.

    Attributes:
        content: what the pickle describes.

    Raises:
        ArtifactError: the pickle is damaged, or has a name other than those of tensors, optimisers and schedulers.
    """

    def __init__(self, path: Path, pickled: bytes) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.lower: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(pickled):
                self._follow(opcode.name, argument)
            self.content = self.stack.pop()
        except ArtifactError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError):
            raise ArtifactError(
                f"{path} is damaged: what describes its tensors cannot be read. Copy it again."
            ) from None

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.lower.append(stack)
            self.stack = []
        elif name in ("TUPLE", "SETITEMS", "APPENDS"):
            self.stack = self.lower.pop()
            self._collect(name, stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEM", "APPEND"):
            items = [stack.pop() for _ in range(2 if name == "SETITEM" else 1)][::-1]
            self._collect(f"{name}S", items)
        elif name == "GLOBAL":
            stack.append(_Named(self._known(argument.replace(" ", "."))))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop().name
            stack.append({} if function in _DICTS else _Call(function, tuple(arguments)))
        elif name == "BINPERSID":
            stack.append(_Numbers(stack.pop()))
        elif name == "BUILD":
            stack.pop()  # the state of an object that is never made
        elif name not in ("PROTO", "STOP"):
            self._known(f"by the instruction {name}")

    def _collect(self, name: str, items: list[Any]) -> None:
        if name == "TUPLE":
            self.stack.append(tuple(items))
        elif name == "APPENDS":
            self.stack[-1].extend(items)
        else:
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _known(self, name: str) -> str:
        if name not in _DICTS and not _KNOWN.fullmatch(name):
            raise ArtifactError(
                f"{self.path} is refused: it holds more than tensors and numbers, and loading it could run code. It "
                f"names {name[:80]!r}."
            )
        return name


def _matrix(archive: zipfile.ZipFile, name: str, described: Any) -> Tensor:
    """A stored matrix in fp32, if it is a dense one of finite real numbers that the archive really holds."""
    path = archive.filename
    if isinstance(described, _Call) and described.name == _PARAMETER and described.arguments:
        described = described.arguments[0]
    if not isinstance(described, _Call) or described.name != _TENSOR or len(described.arguments) < 4:
        kind = described.name if isinstance(described, _Call) else type(described).__name__
        raise ArtifactError(f"{path}: {name!r} must be a dense matrix; it is {kind}.")
    numbers, offset, shape, strides = described.arguments[:4]
    facts = numbers.facts if isinstance(numbers, _Numbers) else ()
    if not isinstance(facts, tuple) or len(facts) != 5 or not isinstance(facts[1], _Named):
        raise ArtifactError(f"{path} is damaged: {name!r} names no numbers. Copy it again.")
    if facts[1].name not in _DTYPES:
        raise ArtifactError(f"{path}: {name!r} must hold real floating-point numbers; it is of {facts[1].name}.")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(_whole(size) and size for size in shape):
        raise ArtifactError(f"{path}: {name!r} must be a matrix [K, D]; it has the shape {shape!r}.")
    if not isinstance(strides, tuple) or len(strides) != 2 or not all(_whole(step) and step for step in strides):
        raise ArtifactError(f"{path}: {name!r} claims one number for many places of {list(shape)}, and is refused.")
    dtype = _DTYPES[facts[1].name]
    files = {member.filename.split("/", 1)[-1]: member for member in archive.infolist()}
    member = files.get(f"data/{facts[2]}")
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    count = 0 if member is None else member.file_size // dtype.itemsize
    if member is None or not _whole(offset) or offset + last >= count or shape[0] * shape[1] > count:
        raise ArtifactError(f"{path}: {name!r} claims the shape {list(shape)}; the file holds {count} numbers for it.")
    if "byteorder" in files and archive.read(files["byteorder"]).strip() != b"little":
        raise ArtifactError(f"{path} was written on a machine of another byte order; save it on a usual one.")
    flat = torch.frombuffer(bytearray(archive.read(member)), dtype=dtype, count=count)
    tensor = flat.as_strided(shape, strides, offset)
    if not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(f"{path}: {name!r} holds NaN or infinite values.")
    return tensor.float().contiguous()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def import_checkpoint(
    path: str | os.PathLike[str],
    base_model: str,
    class_names: Sequence[str],
    templates: str | Sequence[str] | None = None,
    alpha: float = 0.5,
    *,
    underscores: str = "keep",
    enhanced_base: bool = False,
    keep_base: bool = False,
    **kwargs: Any,
) -> TaskResCLIPForImageClassification:
    """A published checkpoint as a model of this library; save it with `save_pretrained`.

    The base classifier stored in the checkpoint is compared with ours, class by class. Equal up to the rounding of
    fp16, ours is taken; the logits then differ by what that rounding was worth (up to 0.03 was seen).

    Args:
        path: see `read_checkpoint`.
        base_model, class_names, templates, **kwargs: as in `from_base`; class names in the order of training.
        alpha: not stored in such checkpoints; 0.5 for all datasets but Flowers102 (1.0).
        underscores: `"keep"`, as the published code prompts.
        enhanced_base: the checkpoint was trained on an enhanced base (TaskRes*): what its base classifier has beyond
            ours is stored as the base's shift.
        keep_base: store the checkpoint's own base classifier as a shift of ours, for logits equal to 2e-5.

    Raises:
        ArtifactError: unsafe, damaged or no TaskRes checkpoint, or another number of classes or embedding size.
        BaseMismatchError: the stored rows belong to other classes, another order or another base, or to an enhanced
            base and `enhanced_base` is not set.
    """
    residual, base = read_checkpoint(path)
    if len(class_names) != len(residual):
        raise ArtifactError(f"{path} has {len(residual)} classes; {len(class_names)} names were given.")
    if base is None and (enhanced_base or keep_base):
        raise ArtifactError(f"{path} holds no base classifier {_BASE!r} to keep. Import it without.")
    model = TaskResCLIPForImageClassification.from_base(
        base_model, class_names, templates, alpha, underscores=underscores, **kwargs
    )
    head = model.classifier
    if residual.shape != head.residual.shape:
        raise ArtifactError(
            f"{path} has embeddings of length {residual.shape[1]}, {base_model!r} of {head.residual.shape[1]}: it was "
            "made for another base."
        )
    if base is not None:
        own = head.base.cpu()
        _check_rows(base, own, model.class_names, enhanced_base)
        if enhanced_base or keep_base:
            head.shift = (base - own).to(head.base)
            model.config.enhanced_base = {"source": "imported" if enhanced_base else "imported, rounded to fp16"}
    with torch.no_grad():
        head.residual.copy_(residual)
    model.config.training = {"recipe": "imported", "source": os.path.basename(os.fspath(path))}
    return model


def _check_rows(base: Tensor, own: Tensor, names: Sequence[str], enhanced: bool) -> None:
    """Refuse stored rows [K, D] that are not the text embeddings of the classes they are said to belong to."""
    gap = (base - own).norm(dim=1) / own.norm(dim=1)
    apart = torch.nonzero(gap > _ROUNDING).flatten().tolist()
    if not apart:
        return
    similarity = F.normalize(base, dim=1) @ F.normalize(own, dim=1).T
    best, nearest = similarity.max(dim=1)
    wrong = [row for row in range(len(base)) if float(similarity[row, row]) < float(best[row]) - _TIE]
    examples = "; ".join(f"the row of {names[row]!r} is nearest to {names[int(nearest[row])]!r}" for row in wrong[:5])
    if len(wrong) > 0.1 * len(base):
        raise BaseMismatchError(
            f"Only {100 - 100 * len(wrong) / len(base):.0f} % of the checkpoint's base rows are nearest to the text "
            f"embedding of their own class ({examples}): class names, their order, templates, underscores or base "
            "model are not those of its training."
        )
    taken = set(nearest[wrong].tolist())
    if wrong and (not enhanced or taken & set(wrong)):
        raise BaseMismatchError(
            f"{len(wrong)} of {len(base)} rows of the checkpoint's base belong to another class: {examples}. The class "
            "names are not in the order of its training, or are written otherwise; put them right."
        )
    if not enhanced:
        shown = ", ".join(f"{names[row]} ({float(gap[row]):.2g})" for row in apart[:5])
        raise BaseMismatchError(
            f"{len(apart)} of {len(base)} rows of the checkpoint's base are not the text embeddings of their classes "
            f"(relative difference, rounding allows {_ROUNDING:g}): {shown}. If it was trained on an enhanced base "
            "(TaskRes*), say so with enhanced_base=True (--enhanced-base); else templates, class names or base model "
            "are not those of its training."
        )
