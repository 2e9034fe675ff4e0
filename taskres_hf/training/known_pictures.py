"""Which pictures a residual was trained on: remembered in its config by their content."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.account import duplicates, shorten
from ..data.labelled import LabelledImages
from ..embedding.features import ImageFeatures

Name = Callable[[int], str]  # a picture's position to what a person calls it

_BYTES = 5  # of each SHA-256: two different pictures among a million share them once in 10^6 cases
_MOST = 20_000  # pictures named, 133 kB in the config


def remember(digests: Sequence[str]) -> dict[str, Any]:
    """The training pictures for `config.data["train_pictures"]`.

    Args:
        digests: N SHA-256 digests in hexadecimal.

    Returns:
        `count`, the number of different pictures, and `sha256_prefixes`: the first five bytes of each digest, sorted,
        in base64. Of more than 20,000 pictures only those with the smallest digests are named.
    """
    prefixes = sorted({bytes.fromhex(digest)[:_BYTES] for digest in digests})
    return {"count": len(prefixes), "sha256_prefixes": base64.b64encode(b"".join(prefixes[:_MOST])).decode("ascii")}


def known_rows(data: ImageFeatures, provenance: Mapping[str, Any] | None) -> tuple[list[int], bool]:
    """Positions of pictures that the residual was trained on, and whether those are all.

    Args:
        data: N pictures. provenance: `config.data` of the classifier.

    Returns:
        The positions; False where the training pictures were too many to name each.
    """
    provenance = provenance or {}
    if provenance.get("train_digest") == data.digest:
        return list(range(len(data))), True
    stored = provenance.get("train_pictures")
    if not isinstance(stored, Mapping) or not data.digests:
        return [], True
    packed = base64.b64decode(str(stored.get("sha256_prefixes", "")))
    known = {packed[start : start + _BYTES] for start in range(0, len(packed), _BYTES)}
    rows = [row for row, digest in enumerate(data.digests) if bytes.fromhex(digest)[:_BYTES] in known]
    return rows, len(known) >= int(stored.get("count", 0))


def picture_names(images: LabelledImages | None) -> Name:
    """What to call each picture in a message: its file, else its row."""

    def name(position: int) -> str:
        if images is None:
            return f"row {position}"
        cell = images.source(position)
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return str(path) if isinstance(path, str) and path else f"row {images.indices[position]}"

    return name


def warn_of_conflicts(data: ImageFeatures, name: Name) -> int:
    """Name pictures that are there under several labels; their number."""
    groups = duplicates(data.digests, data.labels.tolist()).conflicting if data.digests else []
    if groups:
        listed = shorten(
            " and ".join(f"{name(row)} as {data.class_names[int(data.labels[row])]!r}" for row in group)
            for group in groups
        )
        warnings.warn(
            f"{len(groups)} pictures are there under more than one label: {listed}. Decide what each is, or leave it "
            "out; with both labels it only blurs the classes.",
            stacklevel=5,
        )
    return len(groups)
