"""Embed and classify what does not fit one machine: blocks of rows, done by one process or by a Ray cluster.

    from taskres_hf.cluster import embed, predict, stored_features

See docs/scale.md.
"""

from .outputs import read_manifest, stored_features
from .running import Cluster, Written, embed, predict

__all__ = ["Cluster", "Written", "embed", "predict", "read_manifest", "stored_features"]
