"""Checks Ratchet's dependencies in threads with a time limit; those that hang are reported as ``slow``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from typing import Final

from core.artifacts.object_store import local_folder, open_filesystem
from core.dependencies import Dependency, DependencyState, storage_state
from core.errors import ArtifactsUnavailable, RatchetError, RecordError, StoreUnavailable
from core.ledger import Ledger
from core.log_format import redact_url
from core.settings import Settings
from serving.own_threads import BoundedCall
from streams.kafka.clients import Admin, check_rights, event_rights, ingest_rights
from streams.records.registry_client import RegistryClient
from streams.store.sample_store import SampleStore

LOOK_SECONDS: Final = 8.0
CALL_SECONDS: Final = 4.0
"""Limit of one object-store call, and of a connection to the broker."""


def look(settings: Settings, write: bool = False) -> dict[Dependency, DependencyState]:
    """The state of each dependency, within :data:`LOOK_SECONDS`. ``write``: also write and delete an object."""
    checks: dict[Dependency, Callable[[], str]] = {
        "ledger": partial(_ledger, settings),
        "artifacts": partial(_artifacts, settings, write),
        "store": partial(_store, settings, write),
        "broker": partial(_broker, settings),
    }
    if settings.kafka.schema_registry:
        checks["registry"] = partial(_registry, settings)
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # it logs a page of lines about a single state
    with ThreadPoolExecutor(len(checks)) as threads:
        return dict(zip(checks, threads.map(_state, checks.values()), strict=True))


def _state(check: Callable[[], str]) -> DependencyState:
    try:
        return DependencyState("ok", BoundedCall(check, LOOK_SECONDS)())
    except TimeoutError as error:
        return DependencyState("slow", f"{error}.", "Is it there, and does a firewall drop what is sent to it?")
    except RatchetError as error:
        return DependencyState.of(error)


def _ledger(settings: Settings) -> str:
    if not settings.has_ledger:
        return "none yet"
    with closing(Ledger.open(settings.ledger)) as ledger:
        live = ledger.live()
    return f"live release: {live.number if live else 'none yet'}"


def _artifacts(settings: Settings, write: bool) -> str:
    check_storage(settings.artifacts, "artifacts_url", ArtifactsUnavailable, write)
    return redact_url(settings.artifacts)


def _store(settings: Settings, write: bool) -> str:
    check_storage(settings.lake, "lake_url", StoreUnavailable, write)
    version = SampleStore(settings.lake).version()
    return f"{redact_url(settings.lake)}, " + (f"version {version}" if version else "which is empty")


def _broker(settings: Settings) -> str:
    with closing(Admin(settings.kafka, CALL_SECONDS)) as admin:
        check_rights(admin, [*ingest_rights(settings.kafka), *event_rights(settings.kafka)])
    return f"{settings.kafka.bootstrap} answers"


def _registry(settings: Settings) -> str:
    auth = settings.kafka.schema_registry_auth
    client = RegistryClient(settings.kafka.schema_registry, None if auth is None else auth.get_secret_value())
    with closing(client), suppress(RecordError):  # it answers, without such a schema
        client.by_id(1)
    return f"{settings.kafka.schema_registry} answers"


def check_storage(url: str, setting: str, kind: type[StoreUnavailable | ArtifactsUnavailable], write: bool) -> None:
    """Check that a folder or bucket can be read (``write``: written and deleted from). Raises ``kind`` if not."""
    shown = redact_url(url)
    try:
        filesystem, root = open_filesystem(url)
    except ImportError as error:
        raise kind(f"{shown} cannot be used: {error}.", f"Install that package, or change `{setting}`.") from error
    folder = local_folder(filesystem, root)
    if folder is not None:
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.R_OK | os.W_OK):
            raise kind(
                f"{folder} cannot be written by this user.", f"Check `{setting}` and its permissions.", "refused"
            )
        return
    bound = {"timeout": CALL_SECONDS} if filesystem.async_impl else {}
    key = f"{root}/.ratchet-check"
    steps: list[tuple[str, Callable[[], object]]] = [("read", partial(filesystem.cat_file, key, **bound))]
    if write:
        steps.append(("written", partial(filesystem.pipe_file, key, b"ratchet doctor", **bound)))
        steps.append(("deleted from", partial(filesystem.rm_file, key, **bound)))
    for doing, step in steps:
        try:
            step()
        except Exception as error:  # each store has its own exceptions
            state, cause = storage_state(error)
            if not isinstance(error, FileNotFoundError) or state == "refused":  # the bucket is missing
                fix = f"Check `{setting}`, its credentials and permissions."
                raise kind(f"{shown} cannot be {doing}: {cause}.", fix, state) from error
