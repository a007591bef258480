"""The whole product in its own processes: stream, learn, gate, swap, roll back, and resume after a crash."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from core.addresses import free_port
from core.artifacts import Artifacts, directory_digest
from core.child_process import processor_seconds
from core.ledger import Ledger
from core.ledger.rows import IndexRow, UpdateRow, VerdictRow
from core.waiting import StoodStill, wait_for_progress
from demo.load.traffic import Traffic
from ops.alerts import as_yaml, prometheus_config
from ops.cli.context import Context
from ops.cli.main import app
from ops.cli.metrics import targets_of
from ops.cli.supervisor import Supervisor
from ratchet_client import Client, data_uri
from serving.engines.clip_base import load_base
from streams.publish.folders import read_folder
from streams.store.sample_store import SampleStore
from tests.support.dashboards import EXPRESSIONS
from tests.support.kafka import produce
from tests.support.pages import ROOT
from tests.support.prometheus import Alertmanager, Prometheus, alertmanager, impatient_rules, prometheus
from tests.support.shapes import shapes
from tests.support.tiny import tiny_adapter, tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from updater.families import spaces_of

pytestmark = [pytest.mark.timeout(900)]

SPLIT_KEY = "e2e"
TRIGGER = 420
"""Of the 540 samples published first, this key leaves 428 to train on and 112 fresh ones (a random key 35 to 160, and
the gate asks for 50). An update begins when nearly all have come: screening may hold a few."""
PAGES = {
    "RatchetServingAbsent", "RatchetIngestAbsent", "RatchetUpdaterAbsent", "RatchetBrokerDown",
    "RatchetReleaseDisagreement",
}  # fmt: skip
EXAMPLE = [
    target["expr"]
    for panel in json.loads((ROOT / "examples" / "grafana" / "team.json").read_text())["panels"]
    for target in panel["targets"]
]
RECIPE = {
    "name": "quick",
    "rank": 8,
    "alpha": 32,
    "batch_size": 48,
    "objectives": [{"name": "contrastive"}, {"name": "feature_distillation", "over": ["reference", "replay"]}],
    "schedule": {"kind": "infinite", "peak": 0.01, "constant": 0.01, "warmup_steps": 5, "cooldown_steps": 0},
    "max_steps": 80,
}


@dataclass
class Installation:
    context: Context
    parts: Supervisor
    client: Client
    ledger: Ledger
    store: SampleStore
    monitor: Prometheus
    pager: Alertmanager
    refused: int = 0

    def ratchet(self, *words: str) -> str:
        done = CliRunner().invoke(app, ["--config", str(self.context.file), *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def history(self) -> str:
        ledger = self.ledger
        return "\n".join(
            [f"release {row.number}, {row.clip}: {row.reason}" for row in ledger.releases()]
            + [f"{row.id} {row.state}: {row.error}" for row in ledger.updates(5)]
            + [f"audit of {row.release} passed: {row.passed}, {row.summary}" for row in ledger.release_audits()]
            + [f"held: {held.reason}" for held in [ledger.held()] if held]
        )

    def use_everything(self) -> None:
        produce(self.context.settings.kafka, [(b"no record", [])])
        self.refused += 1
        picture = next((self.context.settings.home / "data" / "old" / "img").iterdir()).read_bytes()
        self.client.search(text="a red circle")
        self.client.vqa(picture, "what is this?")
        self.client.classify([picture], ["a circle", "a square"])
        turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture)}}]}
        body = {"model": "vlm", "messages": [turn], "max_tokens": 4, "stream": True}
        assert httpx.post(f"{self.client.url}/v1/chat/completions", json=body, timeout=60).text.endswith("[DONE]\n\n")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    home = tmp_path_factory.mktemp("house")
    tiny_base(home)
    tiny_vlm_base(home)
    shapes(home / "data" / "new", copies=45)
    shapes(home / "data" / "old", copies=60, seed=1)
    (home / "quick.yaml").write_text(yaml.safe_dump(RECIPE))
    (home / "suites").mkdir()
    suite = {"task": "classification", "data": str(home / "data" / "old"), "label": "label", "margin": 0.02}
    (home / "suites" / "old.yaml").write_text(yaml.safe_dump(suite))
    settings_file = {
        "home": str(home),
        "base": {"clip": "tiny", "vlm": "tiny-vlm"},
        "kafka": {"bootstrap": f"127.0.0.1:{free_port()}", "batch_seconds": 0.5},
        "serve": {"port": free_port(), "encoder_replicas": 1, "vlm_engine": "transformers", "vlm_max_rank": 8},
        "ingest": {"metrics_port": free_port(), "split_key": SPLIT_KEY, "processes": 1},
        "maintain": {"metrics_port": free_port(), "seconds": 1.0},
        "updater": {
            "metrics_port": free_port(), "min_new_samples": TRIGGER, "recipe": str(home / "quick.yaml"),
            "reference": [str(home / "data" / "old")], "threads": 1,
        },
        "gate": {
            "suites": [str(home / "suites")], "detect": 0.2, "mean_margin": 0.02, "audit_every": 1,
            "trusted_sources": ["*"],
        },
        "watch": {"seconds": 1.0},
        "feedback": {"audit_share": 1.0},
        # Repeated inputs are answered from the cache, so they are compared at once or never. This update changes much,
        # and the guard would roll it back.
        "rollout": {"compare_share": 1.0, "min_agreement": 0.0},
    }  # fmt: skip
    file = home / "ratchet.yaml"
    file.write_text(yaml.safe_dump(settings_file))
    context = Context(file, [])
    settings = context.settings
    watched = home / "watched"
    with (
        Supervisor(context, ["broker", "serve", "ingest", "maintain", "trainer"]) as parts,
        alertmanager(watched) as pager,
    ):
        rules = impatient_rules(watched / "rules.yml", seconds=1)
        config = prometheus_config(targets_of(settings, "127.0.0.1"), alertmanagers=[pager.address], rules=[str(rules)])
        with prometheus(watched, as_yaml(config)) as monitor:
            parts.wait_until_ready()
            client = Client(settings.serve.url, settings.operator_key().get_secret_value(), retries=0)
            ledger, store = Ledger.open(settings.ledger), SampleStore(settings.lake)
            yield Installation(context, parts, client, ledger, store, monitor, pager)


def wait(condition: Callable[[], bool], explain: Callable[[], object] = str) -> None:
    try:
        wait_for_progress(condition, explain, work=lambda: processor_seconds(os.getpid()), busy_seconds=500, pause=0.2)
    except StoodStill as error:
        raise AssertionError(str(error)) from None


def descendants(pid: int) -> list[int]:
    """Return all descendants: Ray puts them into their own process groups."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] + [each for child in found for each in descendants(int(child))]


def test_an_update_goes_from_the_stream_into_service_and_back_under_load(installation: Installation) -> None:
    settings = installation.context.settings
    items = list(read_folder(settings.home / "data" / "old"))
    probes = {"images": [item.bytes() for item in items[::100]], "texts": sorted({item.text for item in items})}
    with Traffic(installation.client.url, settings=settings, rate=5.0, **probes) as traffic:
        assert "540 samples" in installation.ratchet("publish", str(settings.home / "data" / "new"))
        wait(lambda: installation.store.count() == 540)
        assert installation.client.live() == 1

        wait(lambda: bool(installation.ledger.verdicts(1)))
        verdict = installation.ledger.verdicts(1)[0]
        assert verdict.outcome == "passed", verdict.summary
        wait(lambda: installation.client.live() == 2)
        wait(lambda: installation.client.status()["catalog"]["coverage"] == 1.0)
        hits = installation.client.search(text="a red circle", k=5)
        assert sum("red" in hit["text"] for hit in hits) >= 4
        wait(lambda: 2 in traffic.releases())

        out = installation.ratchet("releases", "rollback", "--reason", "to see the old one")
        assert "release 3 is live everywhere: clip base" in out
        assert len(installation.client.search(text="a red circle", k=5)) == 5
        installation.ratchet("releases", "create", "--clip", verdict.adapter, "--reason", "better")
        wait(lambda: 4 in traffic.releases())
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    assert {1, 2, 4} <= set(report.releases)
    for command in (("status",), ("releases", "list"), ("releases", "show", "2"), ("gate", "report")):
        assert installation.ratchet(*command)


def test_every_panel_and_every_rule_speaks_of_a_running_ratchet(installation: Installation) -> None:
    wait(lambda: installation.monitor.healthy_targets() == {"serve", "ingest", "maintain", "update"})
    index = IndexRow(name="found", url="postgresql://db/shop", source="photos", id_field="id", image_field="url")
    installation.ledger.add_index(index, actor="test")

    silent = {
        f"{each.dashboard}, {each.panel}: {each.expr}": each.expr for each in EXPRESSIONS if "ray_" not in each.expr
    }  # Ray's own metrics are off by default
    silent |= {f"examples/grafana/team.json: {expr}": expr for expr in EXAMPLE}
    silent |= {rule["name"]: rule["name"] for rule in installation.monitor.rules() if rule["type"] == "recording"}

    def all_have_spoken() -> bool:
        installation.use_everything()  # again and again: a rate needs growth between two scrapes
        for what in [what for what, expr in silent.items() if installation.monitor.has_data(expr)]:
            del silent[what]
        return not silent

    wait(all_have_spoken, explain=lambda: list(silent))
    for rule in installation.monitor.rules():
        assert rule["health"] == "ok", rule
        installation.monitor.query(rule["query"])
        for name in re.findall(r"\bratchet_\w+", rule["query"]):
            assert installation.monitor.query(f"count({name})"), f"{rule['name']} asks for {name}, which nobody exports"
    wait(lambda: not PAGES & set(installation.pager.alerts()), explain=installation.pager.alerts)
    wait(lambda: sum(installation.store.offsets().values()) == 540 + installation.refused)
    installation.ledger.remove_index("found", actor="test")


def force_a_drift(installation: Installation) -> str:
    """Release noise as if a verdict had let it pass; returns the adapter's name."""
    settings, ledger = installation.context.settings, installation.ledger
    base, folder = load_base(settings.home, settings.base.clip), settings.home / "noise"
    name = tiny_adapter(base, folder, seed=5, scale=50.0)
    Artifacts(settings.artifacts).put_directory(folder, f"adapters/{name}")
    ledger.register_adapter(name, "clip", base.digest, *spaces_of(base, folder), {}, digest=directory_digest(folder))
    last = ledger.updates(1, "clip")[0]
    update = UpdateRow(
        id="drift", family="clip", state="done", recipe=last.recipe, seed=0, store_version=last.store_version,
        data_from=last.data_to, data_to=last.data_to, incumbent=last.adapter, adapter=name, cost={},
    )  # fmt: skip
    summary = {"suites": {}, "reasons": ["forced"]}
    verdict = VerdictRow(
        update_id=update.id, adapter=name, outcome="passed", report_key="reports/drift", summary=summary
    )
    with ledger.database.write() as session:  # in one transaction: the trainer goes on with an update that is not done
        session.add(update)
        session.flush()
        session.add(verdict)
    ledger.propose("update", clip=name, vlm=None, actor="updater", reason="forced", update_id="drift")
    return name


@pytest.mark.long
def test_a_drift_that_a_verdict_let_pass_is_found_by_the_audit_and_taken_back(installation: Installation) -> None:
    ledger, settings = installation.ledger, installation.context.settings
    wait(lambda: bool(ledger.release_audits("clip")), explain=installation.history)
    assert ledger.release_audits("clip")[0].passed, installation.history()
    items = list(read_folder(settings.home / "data" / "old"))
    probes = {"images": [item.bytes() for item in items[::100]], "texts": sorted({item.text for item in items})}
    installation.ratchet("releases", "resume", "--reason", "the rollback was a try")
    with Traffic(installation.client.url, settings=settings, rate=5.0, **probes) as traffic:
        name = force_a_drift(installation)
        wait(lambda: ledger.failed_audit("clip") is not None, explain=installation.history)
        failed, held = ledger.failed_audit("clip"), ledger.held()
        assert failed is not None and failed.adapter == name and held is not None
        assert f"the audit of release {failed.release} failed: " in held.reason
        assert f"since release {failed.reference_release}" in held.reason
        wait(lambda: "RatchetAuditFailed" in installation.pager.alerts(), explain=installation.pager.alerts)
        assert failed.advice in " ".join(installation.ratchet("status").split())
        back = ["releases", "rollback", "--family", "clip", "--to", str(failed.reference_release), "--reason", "drift"]
        assert "is live everywhere" in installation.ratchet(*back)
        wait(lambda: "RatchetAuditFailed" not in installation.pager.alerts(), explain=installation.pager.alerts)
        installation.ratchet("releases", "resume", "--reason", "taken back")
    report = traffic.report()
    assert (report.failed, report.mixed) == (0, 0), report.problems
    assert {failed.release, failed.release + 1} <= set(report.releases)


@pytest.mark.long
def test_after_a_crash_of_everything_it_goes_on_where_it_was(installation: Installation) -> None:
    live, stored, offsets = installation.client.live(), installation.store.count(), installation.store.offsets()
    [before] = installation.client.embed(["a red circle"])
    for name in ("serve", "ingest"):
        process = installation.parts.part(name).process
        assert process is not None
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not installation.client.is_ready()
    wait(
        lambda: {"RatchetServingAbsent", "RatchetIngestAbsent"} <= set(installation.pager.alerts()),
        explain=installation.pager.alerts,
    )
    paged = installation.pager.alerts()["RatchetServingAbsent"]
    assert paged["labels"]["severity"] == "page"
    assert paged["annotations"]["runbook_url"] == "https://example.com/docs/runbooks/RatchetServingAbsent.md"
    installation.ledger.hold("test", "a row that is written while everything is down")
    wait(lambda: installation.parts.restart_dead() or installation.client.is_ready())
    assert installation.client.live() == live
    [after] = installation.client.embed(["a red circle"])
    assert after.tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert (installation.store.count(), installation.store.offsets()) == (stored, offsets)

    folder = shapes(installation.context.settings.home / "data" / "late", copies=1, seed=9)
    installation.ratchet("publish", str(folder))
    wait(lambda: installation.store.count() == stored + 12)
    installation.ledger.resume("test", "over")
