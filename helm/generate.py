"""Writes what the chart has from elsewhere: ``make chart``. A test says when it is stale.

Helm reads files of its chart only, so alerts and dashboards are copied into it, and the schema of ratchet's settings
becomes a part of the schema of the chart's values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from core.settings import Settings

HERE = Path(__file__).parent
CHART = HERE / "ratchet"
SECRET = (
    "ledger_url", "serve.operator_key", "kafka.client", "kafka.oauth.client_secret", "kafka.schema_registry_auth",
    "ingest.split_key", "console.oidc.client_secret",
)  # fmt: skip
"""Come from Secrets: a value of the chart ends in a ConfigMap."""
SET_BY_CHART = (
    "home", "origins", "artifacts_url", "lake_url", "metrics_host", "kafka.bootstrap", "serve.host", "serve.port",
    "ingest.metrics_port", "maintain.metrics_port", "updater.metrics_port", "console.host", "console.port",
    "server_url",
)  # fmt: skip


def generate(root: Path = HERE.parent) -> dict[Path, str]:
    """Every generated file of the chart with its text."""
    files = {CHART / "values.schema.json": json.dumps(values_schema(), indent=1) + "\n"}
    for source, target in (("ops/alerts/*.yaml", "alerts"), ("ops/dashboards/json/*.json", "dashboards")):
        files |= {CHART / "files" / target / path.name: path.read_text() for path in sorted(root.glob(source))}
    return files


def existing() -> set[Path]:
    """The generated files that are there."""
    return {*(CHART / "files").rglob("*.*"), CHART / "values.schema.json"}


def values_schema() -> dict[str, Any]:
    """``schema.yaml`` with the settings put in, and with all that ``values.yaml`` has required."""
    schema: dict[str, Any] = yaml.safe_load((HERE / "schema.yaml").read_text())
    _require(schema, yaml.safe_load((CHART / "values.yaml").read_text()))
    schema["properties"]["settings"] = settings_schema()
    return schema


def _require(schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Values of an older chart (``helm upgrade --reuse-values``) lack what is new, which a template would trip over."""
    properties = schema.get("properties", {})
    if properties and values:
        schema["required"] = [name for name in values if name in properties]
    for name, value in values.items():
        if isinstance(value, dict) and name in properties:
            _require(properties[name], value)


def settings_schema() -> dict[str, Any]:
    """What may stand in ``settings``: everything of ``ratchet.yaml`` but secrets and what the chart sets itself."""
    whole = Settings.model_json_schema()
    found: dict[str, Any] = _plain(whole, whole.get("$defs", {}))
    for name in (*SECRET, *SET_BY_CHART):
        *sections, leaf = name.split(".")
        place = found
        for section in sections:
            place = place["properties"].get(section, {"properties": {}})
        place["properties"].pop(leaf, None)
    return found


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    """Without references, titles and defaults: shorter, and Helm names the place of an error by the value's path."""
    if isinstance(schema, list):
        return [_plain(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    left_out = {"title", "default", "format", "$defs", "writeOnly"}
    return {
        key: {name: _plain(each, definitions) for name, each in value.items()}
        if key == "properties"
        else _plain(value, definitions)
        for key, value in schema.items()
        if key not in left_out
    }


def main() -> None:
    """Write all, and remove what has no source any more."""
    files = generate()
    for path in existing() - files.keys():
        path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
