"""Expressions that more than one panel asks."""

from __future__ import annotations

API = 'route!~"/metrics|/health/.*"'
"""Requests of clients: not those of Prometheus and of probes."""

AVAILABILITY = (
    f'1 - (sum(increase(ratchet_http_requests_total{{{{{API}, status=~"5.."}}}}{{0}})) or vector(0))'
    f" / (sum(increase(ratchet_http_requests_total{{{{{API}}}}}{{0}})) > 0)"
)
"""Share of answers that were no 5xx within the range that is put in."""

DISAGREE = "max(ratchet_release_live) - min(ratchet_release_live)"
"""0 when all replicas serve the same release."""

LAG = "sum(max by (partition) (ratchet_ingest_lag_records))"
"""Two processes that share the partitions may both remember one."""

GAIN = "max by (family) (ratchet_release_gain_ratio)"

QUARANTINED_SHARE = (
    "(sum(increase(ratchet_ingest_quarantined_total[$__range])) or vector(0))"
    " / (sum(increase(ratchet_ingest_records_total[$__range])) > 0)"
)


def latency(quantile: float, window: str, by: str = "", where: str = API) -> str:
    """Quantile of the seconds of API requests."""
    labels = f"le, {by}" if by else "le"
    inner = f"sum by ({labels}) (rate(ratchet_http_request_seconds_bucket{{{where}}}{window}))"
    return f"histogram_quantile({quantile:g}, {inner})"


def quantile(share: float, metric: str, by: str = "", window: str = "[$__rate_interval]") -> str:
    """Quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({metric}_bucket{window})))"


def mean(metric: str, by: str = "", window: str = "[$__rate_interval]") -> str:
    """Mean of a histogram; NaN, which is drawn as a gap, while nothing is observed."""
    over = f"sum by ({by}) " if by else "sum"
    return f"{over}(rate({metric}_sum{window})) / {over}(rate({metric}_count{window}))"
