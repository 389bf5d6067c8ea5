"""The Grafana dashboard of a release: latency, errors, queue and replicas, with the limits as lines."""

from __future__ import annotations

import json
from collections.abc import Mapping

from containers.kubernetes.numbers import Number

_WIDTH, _HEIGHT = 8, 8


def dashboard(name: str, version: str, numbers: Mapping[str, Number]) -> str:
    """Return the dashboard as JSON, for Grafana 10 and later; its data source is a variable."""
    gateway, engine = f'{{job="{name}-gateway"}}', f'{{job="{name}-engine"}}'
    bucket = f"sum by (le) (rate(slipway_gateway_request_seconds_bucket{gateway}[5m]))"
    first = f"sum by (le) (rate(slipway_gateway_first_token_seconds_bucket{gateway}[5m]))"
    requests, tokens = f"slipway_gateway_requests_total{gateway}", f"slipway_gateway_tokens_total{gateway}"
    errors = f'slipway_gateway_requests_total{{job="{name}-gateway",status=~"5.."}}'
    quantiles = [(f"p{share}", f"histogram_quantile(0.{share}, {bucket})") for share in (50, 95, 99)]
    panels = [
        _panel("Latency", "s", quantiles, numbers["p95_seconds"]),
        _panel("First token", "s", [(f"p{share}", f"histogram_quantile(0.{share}, {first})") for share in (50, 95)]),
        _panel("Requests a second", "reqps", [("{{status}}", f"sum by (status) (rate({requests}[5m]))")]),
        _panel(
            "Errors", "percentunit", [("share", f"(sum(rate({errors}[5m])) or vector(0)) / sum(rate({requests}[5m]))")],
            numbers["error_budget"],
        ),
        _panel("Waiting at the gateway", "short", [("{{model}}", f"slipway_gateway_queue_length{gateway}")],
               numbers["queue_alert"]),
        _panel("Tokens a second", "short", [("{{kind}}", f"sum by (kind) (rate({tokens}[5m]))")]),
        _panel("Requests in flight per replica", "short", [("{{pod}}", "slipway:requests_outstanding")],
               numbers["in_flight"]),
        _panel("KV cache in use", "percentunit", [("{{pod}}", "slipway:kv_cache_used")]),
        _panel("Replicas that answer", "short", [("up", f"sum(slipway_gateway_replica_up{gateway})")]),
        _panel("GPU memory in use (constant)", "percentunit", [("{{pod}}", "slipway:gpu_memory_used")],
               numbers["gpu_memory_share"]),
        _panel("Preemptions a second", "short", [("{{pod}}", f"rate(vllm:num_preemptions_total{engine}[5m])")]),
        _panel("Marked by a rescan", "short", [("marked", f'slipway_release_marked{{release="{name}"}}')]),
    ]  # fmt: skip
    for place, panel in enumerate(panels):
        panel["id"] = place + 1
        panel["gridPos"] = {"h": _HEIGHT, "w": _WIDTH, "x": _WIDTH * (place % 3), "y": _HEIGHT * (place // 3)}
    document = {
        "title": f"{name} v{version}",
        "uid": f"slipway-{name}"[:40],
        "tags": ["slipway"],
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def _panel(title: str, unit: str, lines: list[tuple[str, str]], limit: Number | None = None) -> dict[str, object]:
    """Return a chart; a limit is a dashed line, and its source is the panel's description."""
    steps: list[dict[str, object]] = [{"color": "green", "value": None}]
    if limit is not None:
        steps.append({"color": "red", "value": float(limit.value)})
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "type": "timeseries",
        "title": title,
        "description": "" if limit is None else f"{limit}: {limit.why}",
        "datasource": source,
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "custom": {"thresholdsStyle": {"mode": "dashed" if limit is not None else "off"}},
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "legendFormat": legend, "expr": expression}
            for place, (legend, expression) in enumerate(lines)
        ],
    }
