"""The page of the HTTP API: every call with its parameters, bodies, answers and errors, from ``docs/openapi.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "openapi.json"
HEAD = """# HTTP API

The server gives the same description as OpenAPI 3.1 at `/openapi.json`, and a page to try calls out at `/docs`. How
to use the calls, with examples: [the guide for clients](../client.md). Every call takes a header `x-request-id`, and
every answer has one: [request ids](../client/errors.md#request-ids).
"""
ERRORS = """## Errors

Every call may also return one of these; each has the [error object](#errorbody) as its body. 429 and 503
carry `Retry-After` (seconds).
"""


def page() -> str:
    """The page."""
    schema = json.loads(FILE.read_text())
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, item in schema["paths"].items()
        for method, operation in item.items()
    ]
    tags = dict.fromkeys(operation["tags"][0] for _, operation in operations)
    common = _common([operation for _, operation in operations])
    lines = [HEAD, ERRORS, *_statuses(common)]
    for tag in tags:
        lines.append(f"\n## {tag}\n")
        for label, operation in operations:
            if operation["tags"][0] == tag:
                lines += _operation(label, operation, common)
    lines.append("\n## Objects\n")
    for name, each in sorted(schema["components"]["schemas"].items()):
        lines += [f"\n### {name}\n", f"{each.get('description', '')}\n", *_fields(each)]
    return "\n".join(lines)


def _common(operations: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers that all calls but those of health and metrics have."""
    first, *others = [each["responses"] for each in operations if "401" in each["responses"]]
    return {
        status: response
        for status, response in first.items()
        if all(each.get(status, {}).get("description") == response["description"] for each in others)
    }


def _operation(label: str, operation: dict[str, Any], common: dict[str, Any]) -> Iterator[str]:
    yield f"\n### `{label}`\n"
    yield f"**{operation['summary']}.** {operation['description']}\n"
    content = operation.get("requestBody", {}).get("content", {})
    json_body = content.get("application/json", {}).get("schema")
    if json_body is not None:
        json_body = json_body.get("anyOf", [json_body])[0]  # the others are lists of it
    fields = set() if json_body is None else set(json_body.get("properties", {}))
    own = [each for each in operation.get("parameters", []) if "$ref" not in each]  # the others are of every call
    parameters = [each for each in own if each["name"] not in fields]
    if parameters:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        for each in parameters:
            need = "; required" if each.get("required") and each["in"] != "path" else ""
            schema = each["schema"]
            yield f"| `{each['name']}` | {each['in']} | {_kind(schema)}{need} | {_meaning({**schema, **each})} |"
        yield ""
    if json_body is not None:
        yield f"Body: {', '.join(f'`{kind}`' for kind in content)}. {json_body.get('description', '')}\n"
        yield from _fields(json_body)
        for example in json_body.get("examples", [])[:1]:
            yield f"```json\n{json.dumps(example, ensure_ascii=False)}\n```\n"
    others = {status: each for status, each in operation["responses"].items() if common.get(status) != each}
    yield from _statuses(others)


def _statuses(responses: dict[str, Any]) -> Iterator[str]:
    yield "| status | body | |\n|---|---|---|"
    for status, response in sorted(responses.items()):
        bodies = [
            f"{_kind(content['schema'])}{'' if kind == 'application/json' else f' (`{kind}`)'}"
            for kind, content in response["content"].items()
        ]
        text = response["description"]
        yield f"| {status} | {', '.join(bodies)} | {'' if text == 'Successful Response' else _cell(text)} |"
    yield ""


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    properties = schema.get("properties")
    if not properties:
        return
    required = set(schema.get("required", []))
    yield "| field | type | |\n|---|---|---|"
    for name, each in properties.items():
        yield f"| `{name}`{'' if name in required else ' (optional)'} | {_kind(each)} | {_meaning(each)} |"
    yield ""


def _meaning(schema: dict[str, Any]) -> str:
    text = _cell(schema.get("description") or "")
    default = schema.get("default")
    return text if default is None else f"{text} Default: `{json.dumps(default, ensure_ascii=False)}`.".strip()


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if kinds := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_kind(each) for each in kinds))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {_kind(schema['additionalProperties'])}"
    if kind == "object" and schema.get("properties"):
        return f"object ({', '.join(f'`{name}`' for name in schema['properties'])})"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {_number(schema[name])}" for name, sign in signs if name in schema]
    if "maxLength" in schema:
        bounds.append(f"at most {schema['maxLength']:,} characters")
    return f" ({', '.join(bounds)})" if bounds else ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
