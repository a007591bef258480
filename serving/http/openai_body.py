"""What all bodies of the OpenAI API have in common: a field with null counts as one that was left out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator


class OpenAIBody(BaseModel):
    """An object in which null means the default, for fields that this server does not know too.

    OpenAI's API says so of each optional field, and clients rely on it: LiteLLM sends ``"encoding_format": null``.
    """

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """The object without its nulls."""
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, or an object of such nulls."""
    if isinstance(value, dict):
        return all(each is None for each in value.values())
    return value is None or value in ("", [])
