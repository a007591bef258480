"""What a picture shows, as one string, and the part of a dataset that it belongs to.

The same thing drawn by another artist has the same concept, so a concept is wholly in `train` or wholly in
`test`, in every domain: nothing that a test asks for was seen in training, in any style.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from core.digests import share_of

TEST_SHARE: Final = 0.15
_ARTICLE: Final = re.compile(r"^(an?|the|some) ")
_ASIDE: Final = re.compile(r"\([^)]*\)|\[[^]]*\]")
_PEOPLE: Final = {"man": "person", "woman": "person", "men": "people", "women": "people"}


def concept_of(text: str) -> str:
    """`"A crowned crane."` -> `"crowned crane"`; man, woman and person doing a thing are one concept."""
    plain = _ASIDE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).removesuffix(": facing right")
    words = re.sub(r"[^\w]+", " ", plain).replace("_", " ").split()
    return _ARTICLE.sub("", " ".join(_PEOPLE.get(word, word) for word in words))


def flag_concept(code: str) -> str:
    """Of a country's flag, by ISO 3166 code, since sources spell country names differently."""
    return f"flag {code.casefold()}"


def split_of(concept: str) -> str:
    """`test` for about `TEST_SHARE` of all concepts, else `train`; a function of the concept alone."""
    return "test" if share_of(f"split:{concept}") < TEST_SHARE else "train"
