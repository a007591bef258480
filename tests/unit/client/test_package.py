from __future__ import annotations

import inspect
import re

import ratchet_client
from core import errors as server_errors
from ratchet_client import errors


def test_every_error_of_the_tree_is_exported_and_drawn_and_those_of_the_server_have_the_same_base() -> None:
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    drawn = set(re.findall(r"^[ │├└─]*([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)) - {"Every", "Errors"}
    assert kinds == drawn == {name for name in ratchet_client.__all__ if name in vars(errors)}
    theirs = [kind for kind in vars(server_errors).values() if inspect.isclass(kind)]
    assert errors.RatchetError in theirs and all(issubclass(kind, errors.RatchetError) for kind in theirs)
