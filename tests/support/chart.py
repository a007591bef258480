"""The chart with what every installation has to say, and with everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ops.testing.chart import CHART, Object, chart, merged, of_kind, pods, profile, render_chart

__all__ = ["CHART", "Object", "chart", "merged", "of_kind", "pods", "profile", "render"]
ROOT = Path(__file__).parents[2]
PROFILES = ("cpu", "gpu", "multigpu")
NEEDED: dict[str, Any] = {
    "ledger": {"existingSecret": {"name": "ratchet-ledger"}},
    "objectStore": {"artifacts": "s3://models/ratchet", "lake": "s3://models/lake"},
    "kafka": {"bootstrap": "kafka-1:9092,kafka-2:9092"},
    "operatorKey": {"existingSecret": {"name": "ratchet-operator"}},
}
"""What every installation has to say."""
EVERYTHING: dict[str, Any] = {
    "objectStore": {"endpoint": "http://seaweedfs:8333", "existingSecret": {"name": "ratchet-s3"}},
    "kafka": {"existingSecret": {"name": "ratchet-kafka"}},
    "bases": {"source": "volume", "existingClaim": "bases"},
    "settings": {
        "kafka": {"partitions": 6}, "gate": {"suites": ["/data/suites"]}, "updater": {"workers": 4},
        "console": {
            "oidc": {"issuer": "https://id.example", "client_id": "ratchet", "console_url": "https://c.example",
                     "readers": ["*"]},
        },
    },
    "serving": {
        "gcsFaultTolerance": {
            "enabled": True,
            "redisAddress": "redis:6379",
            "existingSecret": {"name": "redis", "usernameKey": "user"},
        }
    },
    "ingest": {
        "storage": {"storageClass": "fast"},
        "splitKey": {"existingSecret": {"name": "ratchet-split"}},
        "keda": {"enabled": True, "sasl": "scram_sha512", "tls": "enable"},
    },
    "console": {"oidc": {"existingSecret": {"name": "ratchet-oidc"}}},
    "updater": {
        "storage": {"existingClaim": "updater"}, "data": {"existingClaim": "suites"}, "workers": {"enabled": True},
    },
    "ingress": {"enabled": True, "className": "nginx", "host": "a.example", "consoleHost": "c.example"},
    "podAnnotations": {"example.org/team": "ml"},
    "runtimeClassName": "nvidia",
    "caBundle": {"configMap": "company-ca"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraVolumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
    "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    "networkPolicy": {"egress": {"cloudIdentity": [{"cidr": "169.254.169.254/32", "port": 80}]}},
    "monitoring": {
        "podMonitors": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"},
        "runbooks": "https://git.example/runbooks",
    },
}  # fmt: skip
"""Every option that adds an object or a part of one."""


def render(*layers: Any, name: str = "live", namespace: str = "ml") -> list[Object]:
    """All objects of a release. Raises HelmValuesError, HelmRenderError."""
    return render_chart(merged(NEEDED, *layers), name, namespace)
