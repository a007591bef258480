"""Data sets that people have, read as a stream: :func:`detect` finds the format, :func:`read_dataset` the rows.

Each format is a module: ``shards`` (WebDataset, img2dataset), ``parquet`` (Hugging Face, img2dataset),
``imagefolder``, ``sidecars``, ``coco``, ``vqa``, ``llava``, and ``index_files`` for Ratchet's own. All yield
:class:`~streams.folders.DatasetRow`: a sample, or the error that names file, row, field and fix. Memory does not grow
with the number of rows.
"""

from __future__ import annotations

from streams.datasets.detection import FORMATS, detect, read_dataset
from streams.datasets.source import Format

__all__ = ["FORMATS", "Format", "detect", "read_dataset"]
