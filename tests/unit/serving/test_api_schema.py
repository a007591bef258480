from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.http.app import openapi

SCHEMA = openapi()
FILE = Path(__file__).parents[3] / "docs" / "openapi.json"
ERROR = {"$ref": "#/components/schemas/ErrorBody"}
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in SCHEMA["paths"].items()
    for method, operation in item.items()
}

operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@operations
def test_each_answer_of_a_route_has_a_schema(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    assert any(status.startswith("2") for status in responses)
    for status, response in responses.items():
        assert response["content"], status
        assert all(content.get("schema") for content in response["content"].values()), status
        assert response["description"] not in ("", "Validation Error"), status


@operations
def test_each_route_has_the_error_envelope_a_summary_and_a_description(operation: dict[str, Any]) -> None:
    assert operation["responses"]["4XX"]["content"]["application/json"]["schema"] == ERROR
    assert operation["summary"]
    assert operation["description"]


def test_each_post_has_a_typed_body() -> None:
    posts = {label: operation for label, operation in OPERATIONS.items() if label.startswith("POST")}
    for label, operation in posts.items():
        schemas = [content["schema"] for content in operation["requestBody"]["content"].values()]
        assert all(schema["type"] in ("object", "string") for schema in schemas), label
        assert operation["requestBody"]["content"]["application/json"]["schema"]["properties"], label


def test_each_object_of_an_answer_has_a_description() -> None:
    assert [name for name, schema in SCHEMA["components"]["schemas"].items() if not schema.get("description")] == []


def test_the_committed_schema_is_the_api_s() -> None:
    assert json.loads(FILE.read_text()) == SCHEMA, "write docs/openapi.json anew: make docs"
