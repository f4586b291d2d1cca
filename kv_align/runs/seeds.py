"""One seed for each purpose, derived from the run's, so that drawing more for one of them shifts no other.

Imports no torch.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed of 63 bits for (seed, purpose), the same on every machine."""
    digest = hashlib.blake2b(f"kv-align {seed} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
