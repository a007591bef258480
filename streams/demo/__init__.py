"""Demo data: real, freely licensed image-text sets that package registries ship.

    >>> from streams.demo import DOMAINS, prepare_domain
    >>> folder = prepare_domain("noto", Path(".ratchet"))
    >>> items = read_folder(folder, split="train")

Each builder says which rows a set has; `domain` draws and writes them; `packages` brings the archives.
"""

from streams.demo.domain import DomainInfo
from streams.demo.domains import DOMAINS, prepare_domain
from streams.demo.packages import Package, PackageError
from streams.demo.questions import QUESTIONS, prepare_questions

__all__ = ["DOMAINS", "QUESTIONS", "DomainInfo", "Package", "PackageError", "prepare_domain", "prepare_questions"]
