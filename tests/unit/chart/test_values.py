"""A wrong value stops the install, and names itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python import HelmError

from tests.support.chart import CHART, NEEDED, PROFILES, ROOT, chart, merged, profile

WRONG: list[tuple[str, Any, list[str]]] = [
    ("a name that does not exist", {"serving": {"worker": {"replicas": 2}}}, ["/serving", "worker"]),
    ("no ledger", {"ledger": {"existingSecret": {"name": ""}}}, ["/ledger/existingSecret/name"]),
    ("a secret as a value", {"ledger": {"url": "postgresql://me:secret@db/x"}}, ["/ledger", "url"]),
    ("a secret among the settings", {"settings": {"ledger_url": "postgresql://x"}}, ["/settings", "ledger_url"]),
    ("the split's key as a value", {"settings": {"ingest": {"split_key": "k"}}}, ["/settings/ingest", "split_key"]),
    ("a setting that does not exist", {"settings": {"serve": {"prt": 1}}}, ["/settings/serve", "prt"]),
    ("a setting out of range", {"settings": {"gate": {"alpha": 0.7}}}, ["/settings/gate/alpha", "0.5"]),
    ("a port that the chart sets", {"settings": {"serve": {"port": 9000}}}, ["/settings/serve", "port"]),
    ("a local folder as a store", {"objectStore": {"lake": "/var/lake"}}, ["/objectStore/lake", "s3|gs|az"]),
    ("a broker without a port", {"kafka": {"bootstrap": "kafka"}}, ["/kafka/bootstrap"]),
    ("two trainers", {"updater": {"replicas": 2}}, ["/updater", "replicas"]),
    ("two that maintain", {"maintain": {"replicas": 2}}, ["/maintain", "replicas"]),
    ("a claim that pods of ingest would share", {"ingest": {"storage": {"existingClaim": "x"}}}, ["/ingest/storage"]),
    (
        "too many replicas on a node",
        {"serving": {"actors": {"vlm": {"maxPerNode": 101}}}},
        ["/serving/actors/vlm/maxPerNode"],
    ),
    ("no worker", {"serving": {"workers": {"replicas": 0}}}, ["/serving/workers/replicas", "minimum"]),
    (
        "a worker without room for the replicas",
        {
            "settings": {"base": {"vlm": ""}, "serve": {"ingress_replicas": 2}},
            "serving": {"workers": {"replicas": 1, "resources": {"requests": {"cpu": "200m"}}}},
        },
        ["serving.workers has no room", "1.2 CPUs", "1 worker(s) have 1 each"],
    ),
    ("text for a number", {"ingest": {"replicas": "two"}}, ["/ingest/replicas", "integer"]),
    ("an image that is not built", {"image": {"flavour": "rocm"}}, ["/image/flavour", "cpu", "gpu"]),
    ("a container without a bound", {"console": {"resources": {"limits": None}}}, ["/console/resources", "limits"]),
    ("a quantity with a wrong unit", {"updater": {"sharedMemory": "1GB"}}, ["/updater/sharedMemory"]),
    ("fault tolerance without Redis", {"serving": {"gcsFaultTolerance": {"enabled": True}}}, ["redisAddress"]),
    ("a volume without a claim", {"bases": {"source": "volume"}}, ["/bases/existingClaim"]),
    ("an ingress without a host", {"ingress": {"enabled": True}}, ["/ingress/host"]),
    (
        "an ingress for anybody",
        {"networkPolicy": {"ingress": {"controller": []}}},
        ["/networkPolicy/ingress/controller"],
    ),
    ("CAs in two places", {"caBundle": {"configMap": "a", "secret": "b"}}, ["/caBundle/secret"]),
    ("a variable without a name", {"extraEnv": [{"value": "x"}]}, ["/extraEnv/0", "name"]),
    ("a variable that KubeRay refuses", {"extraEnv": [{"name": "REDIS_PASSWORD", "value": "x"}]}, ["/extraEnv/0/name"]),
    ("an open peer", {"networkPolicy": {"ingress": {"clients": [{}]}}}, ["/networkPolicy/ingress/clients/0"]),
]


@pytest.mark.parametrize(("wrong", "names"), [(wrong, names) for _, wrong, names in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_value_is_refused_by_name(wrong: Any, names: list[str]) -> None:
    with pytest.raises(HelmError) as caught:
        chart().render(merged(NEEDED, wrong), name="live")
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_every_installation_has_to_say_is_asked_for(missing: str) -> None:
    with pytest.raises(HelmError, match=f"/{missing}"):
        chart().render({name: value for name, value in NEEDED.items() if name != missing}, name="live")


def paths(values: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the sections of values.yaml stand, and the last value of each."""
    for name, value in values.items():
        if isinstance(value, dict) or name == [*values][-1]:
            yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def test_values_that_an_older_chart_did_not_have_are_missed_by_name() -> None:
    """`helm upgrade --reuse-values` goes on with the defaults of the chart before, without what is new in this one."""
    silent = set()
    for path in paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        without: Any = None  # Helm removes what is null
        for name in reversed(path):
            without = {name: without}
        try:
            chart().render(merged(NEEDED, without), name="live")
        except HelmError as error:
            if f"missing property '{path[-1]}'" in str(error):
                continue
        silent.add(path[-1])
    assert silent <= {"maxPerNode", "grafana_dashboard"}  # may be left out


def test_the_example_of_the_deployers_page_is_a_valid_one_and_refusals_read_as_it_says() -> None:
    page = (ROOT / "docs" / "deployer.md").read_text()
    example = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert example.keys() >= NEEDED.keys()
    for name in PROFILES:
        assert chart().render(merged(profile(name), example), name="ratchet")
    with pytest.raises(HelmError) as caught:
        chart().render(merged(example, {"serving": {"workers": {"replicas": 0}}}), name="ratchet")
    shown = page.partition("names itself (`")[2].partition("`")[0]
    assert shown in str(caught.value)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_set_nothing_that_an_installation_has_to_say(name: str) -> None:
    assert profile(name).keys().isdisjoint(NEEDED)
