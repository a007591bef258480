"""Artifacts (adapters, bases, gate reports) behind one URL: a folder, or any object store that fsspec knows.

>>> artifacts = Artifacts("s3://models/ratchet")
>>> artifacts.put_directory(Path("adapter"), "adapters/clip-0123456789ab")
>>> artifacts.fetch("adapters/clip-0123456789ab")
PosixPath('/tmp/ratchet-artifacts-1000/.../adapters/clip-0123456789ab')
"""

from core.artifacts.artifacts import Artifacts
from core.artifacts.folder import directory_digest

__all__ = ["Artifacts", "directory_digest"]
