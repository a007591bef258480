"""Demo data: real, freely licensed image-text sets that package registries ship.

    >>> from streams.demo import DOMAINS, prepare_domain
    >>> folder = prepare_domain("noto", Path(".ratchet"))
    >>> items = read_folder(folder, split="train")

Each builder says which rows a set has; `domain` draws and writes them; `packages` brings the archives;
`preparation` does several at once, in processes.
"""

from streams.demo.domain import DomainInfo
from streams.demo.domains import DOMAINS, prepare_domain
from streams.demo.packages import Package, PackageError
from streams.demo.preparation import DemoData, Preparation
from streams.demo.questions import QUESTIONS, prepare_questions

__all__ = [
    "DOMAINS",
    "QUESTIONS",
    "DemoData",
    "DomainInfo",
    "Package",
    "PackageError",
    "Preparation",
    "prepare_domain",
    "prepare_questions",
]
