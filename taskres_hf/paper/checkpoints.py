"""Checkpoints of the published TaskRes code, turned into artifacts without unpickling anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError, BaseMismatchError
from ..modeling_taskres import TaskResCLIPForImageClassification

# The published trainer stores its scheduler, and with it the optimiser, as objects. Only these names are let through,
# and what they name is replaced by an empty shell: no code of a checkpoint, or of torch's optimisers, runs.
_SHELLS = (
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.optim.lr_scheduler.MultiStepLR",
    "torch.optim.lr_scheduler.StepLR",
)
_RESIDUAL, _BASE = "text_feature_residuals", "base_text_features"
_ROUNDING = 5e-3  # the published code rounds text embeddings to fp16


class _Shell:
    """Stands in for an optimiser or scheduler object; holds its state and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """Stands in for `defaultdict` and for the `dict` named as its factory."""
    return {}


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """The residual [K, D] and, where stored, the base classifier [K, D] of a published checkpoint, in fp32.

    Args:
        path: `prompt_learner/model.pth.tar-<epoch>` as the published trainer writes it.

    Raises:
        ArtifactError: the file is missing, holds anything but tensors, numbers and known shells, or is no TaskRes
            checkpoint.
    """
    allowed: list[Any] = [(type("_Shell", (_Shell,), {}), name) for name in _SHELLS]
    allowed += [(_plain_dict, "collections.defaultdict"), (_plain_dict, "builtins.dict")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtifactError(f"There is no file {path}.") from None
    except Exception as error:  # torch raises many types on files it does not trust
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{os.fspath(path)} is damaged or holds more than tensors, and is refused: loading it could run code. "
            f"({reason})"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    residual, base = (state.get(key) for key in (_RESIDUAL, _BASE))
    if not isinstance(residual, Tensor) or residual.ndim != 2:
        keys = list(state)[:5] if isinstance(state, dict) else type(state).__name__
        raise ArtifactError(f"{path} is no TaskRes checkpoint: it has no matrix {_RESIDUAL!r}, but {keys}.")
    if base is not None and (not isinstance(base, Tensor) or base.shape != residual.shape):
        raise ArtifactError(f"{path}: {_BASE!r} does not have the residual's shape {list(residual.shape)}.")
    for name, tensor in ((_RESIDUAL, residual), (_BASE, base)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path}: {name!r} holds NaN or infinite values.")
    return residual.float(), None if base is None else base.float()


def import_checkpoint(
    path: str | os.PathLike[str],
    base_model: str,
    class_names: Sequence[str],
    templates: str | Sequence[str] | None = None,
    alpha: float = 0.5,
    *,
    underscores: str = "keep",
    **kwargs: Any,
) -> TaskResCLIPForImageClassification:
    """A published checkpoint as a model of this library; save it with `save_pretrained`.

    The base classifier stored in the checkpoint is compared with ours: equal up to fp16 rounding, it is dropped;
    otherwise (an enhanced base) the difference is kept as the base's shift.

    Args:
        path: see `read_checkpoint`.
        base_model, class_names, templates, **kwargs: as in `from_base`; class names in the order of training.
        alpha: not stored in such checkpoints; 0.5 for all datasets but Flowers102 (1.0).
        underscores: `"keep"`, as the published code prompts.

    Raises:
        ArtifactError: unsafe, damaged or no TaskRes checkpoint, or another number of classes or embedding size.
        BaseMismatchError: the stored rows belong to other classes, another order or another base.
    """
    residual, base = read_checkpoint(path)
    if len(class_names) != len(residual):
        raise ArtifactError(f"{path} has {len(residual)} classes; {len(class_names)} names were given.")
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
        similarity = F.normalize(base, dim=1) @ F.normalize(head.base.cpu(), dim=1).T
        agree = float((similarity.argmax(dim=1) == torch.arange(len(base))).float().mean())
        if agree < 0.9:
            raise BaseMismatchError(
                f"Only {100 * agree:.0f} % of the checkpoint's base rows are nearest to the text embedding of "
                "their own class: class names, their order, templates or base model are not those of its training."
            )
        shift = base - head.base.cpu()
        if float(shift.norm() / head.base.norm().cpu()) > _ROUNDING:
            head.shift = shift.to(head.base)
            model.config.enhanced_base = {"source": "imported"}
    with torch.no_grad():
        head.residual.copy_(residual)
    model.config.training = {"recipe": "imported", "source": os.path.basename(os.fspath(path))}
    return model
