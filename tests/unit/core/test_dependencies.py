from __future__ import annotations

import pickle

import pytest
from prometheus_client import REGISTRY

from core.dependencies import Dependency, DependencyState, answered, current, noted, storage_state
from core.errors import (
    ArtifactsUnavailable,
    BrokerError,
    Fenced,
    LedgerUnavailable,
    OutageState,
    RatchetError,
    RecordError,
    RecordTooLarge,
    RegistryUnavailable,
    StoreError,
    StoreFull,
    StoreUnavailable,
)

LANCE = "LanceError(IO): Generic S3 error: Error performing list request: Error performing GET {} in 4.1ms"
XML = (
    '- Server returned non-2xx status code: {}: <?xml version="1.0"?>\n<Error><Code>{}</Code><Message>{}</Message>'
    "<RequestId>VmeAOepEQ81</RequestId></Error>, /home/runner/work/lance/rust/lance-io/src/object_store.rs:1576:42"
)


@pytest.mark.parametrize(
    ("error", "name", "state"),
    [
        (StoreUnavailable("m", "f"), "store", "away"),
        (StoreFull("m", "f"), "store", "full"),
        (ArtifactsUnavailable("m", "f", "refused"), "artifacts", "refused"),
        (BrokerError("m", "f", "slow"), "broker", "slow"),
        (RegistryUnavailable("m", "f"), "registry", "away"),
        (LedgerUnavailable("m", "f"), "ledger", "away"),
    ],
)
def test_an_error_is_of_one_dependency_until_it_answers(
    error: RatchetError, name: Dependency, state: OutageState
) -> None:
    assert noted(pickle.loads(pickle.dumps(error))) == name
    assert current()[name] == DependencyState(state, "m", "f")
    assert exported(name) == {state}
    answered([name])
    assert current()[name] == DependencyState("ok")
    assert exported(name) == {"ok"}


def exported(name: str) -> set[str]:
    return {
        sample.labels["state"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "ratchet_dependency_state" and sample.labels["dependency"] == name and sample.value
    }


def test_an_error_of_a_record_or_a_sender_or_one_that_is_no_outage_changes_no_state() -> None:
    errors: list[RatchetError] = [RecordError("schema", "m"), Fenced("m"), RecordTooLarge("m")]
    assert [noted(error) for error in errors] == [None] * 3
    answered(["store"])
    assert noted(StoreError("version 3 is not kept any more.")) == "store"
    assert current()["store"].state == "ok"
    assert DependencyState.of(StoreError("the store was made by another version.")).state == "refused"


@pytest.mark.parametrize(
    ("error", "state", "cause"),
    [
        (
            OSError(LANCE.format("http://127.0.0.1:9/lake?list-type=2") + ", after 3 retries, max_retries: 3,"
                    " retry_timeout: 180s  - HTTP error: error sending request, /home/runner/lance.rs:12:3"),
            "away", "http://127.0.0.1:9: HTTP error: error sending request",
        ),
        (
            OSError(LANCE.format("http://h/none?a=2") + XML.format("404 Not Found", "NoSuchBucket", "It is not")),
            "refused", "NoSuchBucket: It is not",
        ),
        (
            OSError(LANCE.format("http://h/b") + XML.format("403 Forbidden", "SignatureDoesNotMatch", "x " * 900)),
            "refused", "SignatureDoesNotMatch: " + "x " * 138 + "…",
        ),
        (PermissionError("Access Denied"), "refused", "Access Denied"),
        (OSError("LanceError(IO): No space left on device (os error 28)"), "full", None),
        (OSError(XML.format("507", "XMinioStorageFull", "Storage backend has reached its minimum")), "full", None),
        (TimeoutError(), "slow", "it does not answer in time"),
    ],
)  # fmt: skip
def test_a_storage_error_becomes_a_state_and_one_line(error: Exception, state: OutageState, cause: str | None) -> None:
    told = storage_state(error)
    assert told[0] == state
    assert cause in (None, told[1])
    assert len(told[1]) <= 302 and "\n" not in told[1] and "<" not in told[1]
