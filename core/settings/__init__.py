"""All settings, typed. :mod:`core.loading` reads them, and records where each value came from."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pydantic import Field, SecretStr

from core.settings.section import Section
from core.settings.serving import AccessRules, BaseModels, Catalog, Console, Feedback, Rollout, Serve
from core.settings.streams import Collection, Ingest, Kafka, Maintain, Retention
from core.settings.trust import Trust
from core.settings.updates import Budget, Gate, Updater
from core.settings.watching import Logs, Traces, Watch


class Settings(Section):
    """All settings. ``origins`` maps each dotted name to the place its value came from."""

    home: Path = Field(Path(".ratchet"), description="Local folder, for everything that has no URL of its own.")
    ledger_url: str | None = Field(None, description="SQLAlchemy URL of the ledger; default: SQLite in home.")
    artifacts_url: str | None = Field(
        None, description="fsspec URL of adapters and reports; default: a folder in home."
    )
    lake_url: str | None = Field(
        None, description="Folder or object store URL of the Lance datasets; default: a folder in home."
    )
    server_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+",
        description="URL of the model server for all other parts; default: serve.host and serve.port.",
    )  # fmt: skip
    metrics_host: str = Field(
        "127.0.0.1", description="Address on which ingest, maintenance and the updater serve metrics."
    )
    base: BaseModels = Field(default_factory=BaseModels)
    kafka: Kafka = Field(default_factory=Kafka)
    ingest: Ingest = Field(default_factory=Ingest)
    maintain: Maintain = Field(default_factory=Maintain)
    retention: Retention = Field(default_factory=Retention)
    gc: Collection = Field(default_factory=Collection)
    serve: Serve = Field(default_factory=Serve)
    access: AccessRules = Field(default_factory=AccessRules)
    feedback: Feedback = Field(default_factory=Feedback)
    updater: Updater = Field(default_factory=Updater)
    budget: Budget = Field(default_factory=Budget)
    gate: Gate = Field(default_factory=Gate)
    trust: Trust = Field(default_factory=Trust)
    catalog: Catalog = Field(default_factory=Catalog)
    watch: Watch = Field(default_factory=Watch)
    console: Console = Field(default_factory=Console)
    rollout: Rollout = Field(default_factory=Rollout)
    logs: Logs = Field(default_factory=Logs)
    traces: Traces = Field(default_factory=Traces)
    origins: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)

    @property
    def server(self) -> str:
        """URL of the model server for processes outside of serving."""
        return self.server_url or self.serve.url

    @property
    def ledger(self) -> str:
        return self.ledger_url or f"sqlite:///{(self.home / 'ledger.db').resolve()}"

    @property
    def has_ledger(self) -> bool:
        """False if the ledger is a SQLite file that does not exist yet."""
        _, file, path = self.ledger.partition("sqlite:///")
        return not file or Path(path.partition("?")[0]).exists()

    @property
    def artifacts(self) -> str:
        return self.artifacts_url or str((self.home / "artifacts").resolve())

    @property
    def lake(self) -> str:
        return self.lake_url or str((self.home / "lake").resolve())

    @property
    def has_store(self) -> bool:
        """False if the sample store is a folder in home that does not exist yet."""
        return self.lake_url is not None or (self.home / "lake").exists()

    @property
    def update_folders(self) -> Path:
        """Work folders of unfinished updates: checkpoints, and what is computed once per sample."""
        return self.home / "updates"

    @property
    def has_operator_key(self) -> bool:
        return self.serve.operator_key is not None or (self.home / "operator.key").exists()

    def operator_key(self) -> SecretStr:
        """The operators' key; generated on first use in ``home/operator.key``, owner-readable."""
        if self.serve.operator_key is not None:
            return self.serve.operator_key
        return SecretStr(_kept_key(self.home / "operator.key"))


def _kept_key(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".operator.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            with suppress(FileExistsError):
                os.link(staging, path)  # the first of two processes wins; both then read the same key
        finally:
            staging.unlink()
    return path.read_text().strip()
