"""Which pictures a residual was trained on: remembered in its config by their content."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ..embedding.features import ImageFeatures

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
