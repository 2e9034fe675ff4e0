"""Whether an artifact is what it claims: deriving it again, and accepting an edit."""

from .signing import sign
from .verifying import verify

__all__ = ["sign", "verify"]
