"""Stand-ins for packages that Understudy needs and a bare machine with a card may lack. For the smoke test only.

The checksums of weight versions and checkpoints are xxh3-64. Where xxhash is missing they are another hash here, which is as
good within one process. A campaign has no such stand-in: it refuses to start without the package.
"""

import hashlib
import sys
import types
from importlib.util import find_spec
from typing import Any


class Blake2:
    """The part of xxhash.xxh3_64 that is used, as blake2b of 8 bytes."""

    def __init__(self, data: Any = b""):
        self._hash = hashlib.blake2b(data, digest_size=8)

    def update(self, data: Any) -> None:
        """More bytes."""
        self._hash.update(data)

    def intdigest(self) -> int:
        """64 bits."""
        return int.from_bytes(self._hash.digest(), "big")

    def hexdigest(self) -> str:
        """The same in hexadecimal."""
        return self._hash.hexdigest()


def fill_in() -> list[str]:
    """Puts a stand-in in the place of xxhash if it is not installed; returns the names of what is missing."""
    if "xxhash" not in sys.modules and find_spec("xxhash") is None:
        module: Any = types.ModuleType("xxhash")
        module.xxh3_64 = Blake2
        module.xxh3_64_intdigest = lambda data: Blake2(data).intdigest()
        module.xxh3_64_hexdigest = lambda data: Blake2(data).hexdigest()
        sys.modules["xxhash"] = module
    return ["xxhash"] if getattr(sys.modules.get("xxhash"), "xxh3_64", None) is Blake2 else []
