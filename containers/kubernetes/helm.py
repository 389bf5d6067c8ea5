"""A bundle as a Helm chart: the same objects, and as values what a cluster's operator decides.

The objects are those of the Kustomize base with what kustomize would add (labels, images, the gateway's ConfigMap), so
both forms of a release run the same. What was measured is no value: a release that is served otherwise is another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import yaml

from containers.kubernetes.numbers import Number
from containers.kubernetes.objects import KubernetesObject
from containers.kubernetes.values import TemplateValues

# The values by the placeholder that stands for each while objects are made, and how a template writes it.
_VALUES = {
    "replicas": ".Values.replicas",
    "most_replicas": ".Values.autoscaling.maxReplicas",
    "cpu_request": ".Values.resources.cpu | quote",
    "repository": ".Values.image.repository",
    "gateway_image": ".Values.gateway.image | quote",
    "gateway_replicas": ".Values.gateway.replicas",
    "redis_image": ".Values.redis.image | quote",
    "monitoring_namespace": ".Values.monitoring.namespace",
}
_NUMBERS = ("replicas", "most_replicas", "cpu_request")
_GATEWAY_FILES = ("gateway.json", "routes.json", "discover.py")
_CHECKSUM = "gateway_checksum"
_TEMPLATES = {
    "engine": ("base/engine.yaml", None),
    "gateway": ("base/gateway.yaml", None),
    "redis": ("base/redis.yaml", None),
    "network": ("base/network.yaml", None),
    "monitors": ("monitoring/monitors.yaml", "monitoring"),
    "autoscaling": ("autoscaling/hpa.yaml", "autoscaling"),
}
"""Each template's Kustomize file, and the value that turns it on."""
_DIGEST = r"@sha256:[0-9a-f]{64}$"


def _placeholder(name: str) -> str:
    return f"__{name}__"


def with_placeholders(values: TemplateValues) -> TemplateValues:
    """Return the templates' values with placeholders for those of the chart."""
    numbers = {key: replace(values.n[key], value=_placeholder(key)) for key in _NUMBERS}
    return replace(
        values,
        n={**values.n, **numbers},
        image=f"{_placeholder('repository')}@{values.image_digest}",
        monitoring_namespace=_placeholder("monitoring_namespace"),
    )


def chart(files: Mapping[str, str], values: TemplateValues) -> dict[str, str]:
    """Return the chart's files by path, from the Kustomize files that were made with placeholders.

    Args:
        files: the files of a Kustomize bundle by path, made from `with_placeholders`.
        values: the templates' values themselves.
    """
    name = values.name
    images = {"slipway-gateway": _placeholder("gateway_image"), "redis": _placeholder("redis_image")}
    made = {
        f"templates/{stem}.yaml": _template([_adapted(each, values, images) for each in _objects(files[path])], switch)
        for stem, (path, switch) in _TEMPLATES.items()
    }
    rules = [_labelled(each, values) for each in _objects(files["monitoring/prometheusrule.yaml"])]
    of_gateway = {"app.kubernetes.io/name": f"{name}-gateway"}
    shown = {
        "dashboard": ("dashboard.json", {"grafana_dashboard": "1"}), "dcgm-counters": ("dcgm-counters.csv", {}),
    }  # fmt: skip
    monitoring = [
        _config_map(f"{name}-{title}", f"files/monitoring/{file}", labels, values)
        for title, (file, labels) in shown.items()
    ]
    return {
        **made,
        "templates/config.yaml": _config_map(f"{name}-gateway", "files/gateway/*", of_gateway, values),
        "templates/dashboard.yaml": _switched("---\n".join(monitoring), "monitoring"),
        # Its annotations are templates of Prometheus: Helm must not read them.
        "templates/rules.yaml": _switched('{{ .Files.Get "files/rules.yaml" }}\n', "monitoring"),
        "templates/NOTES.txt": _notes(values),
        "files/rules.yaml": "---\n".join(map(_dumped, rules)),
        **{f"files/gateway/{each}": files[f"base/{each}"] for each in _GATEWAY_FILES},
        **{f"files/monitoring/{file}": files[f"monitoring/{file}"] for file, _ in shown.values()},
        "Chart.yaml": _dumped({
            "apiVersion": "v2", "name": name, "type": "application", "version": f"{values.version}.0.0",
            "appVersion": values.version, "description": f"{values.line}, {values.digest}",
        }),
        "values.yaml": _values_file(values),
        "values.schema.json": json.dumps(_schema(), indent=1) + "\n",
        **{path: text for path, text in files.items() if path == "adapter.yaml" or path.startswith("policies/")},
    }  # fmt: skip


def _config(pattern: str) -> str:
    """What Helm makes of the chart's files with such a path: the data of a ConfigMap."""
    return f'(.Files.Glob "{pattern}").AsConfig'


def _config_map(name: str, pattern: str, labels: Mapping[str, str], values: TemplateValues) -> str:
    metadata = {"name": name, "labels": dict(labels)}
    head = _labelled({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, values)
    return f"{_dumped(head)}data:\n{{{{ {_config(pattern)} | indent 2 }}}}\n"


def _objects(text: str) -> Iterator[KubernetesObject]:
    return iter(yaml.safe_load_all(text))


def _labels(values: TemplateValues) -> dict[str, str]:
    """The labels of pods; those of objects have the version too (`labels/kustomization.yaml`)."""
    return {
        "app.kubernetes.io/part-of": values.name,
        "app.kubernetes.io/instance": values.name,
        "app.kubernetes.io/managed-by": "Helm",
    }


def _labelled(found: KubernetesObject, values: TemplateValues) -> KubernetesObject:
    labels = {**found["metadata"].get("labels", {}), **_labels(values), "app.kubernetes.io/version": values.version}
    return {**found, "metadata": {**found["metadata"], "labels": labels}}


def _adapted(found: KubernetesObject, values: TemplateValues, images: Mapping[str, str]) -> KubernetesObject:
    """An object with what kustomize would add to it."""
    found = _labelled(found, values)
    if found["kind"] != "Deployment":
        return found
    pod = found["spec"]["template"]
    pod["metadata"]["labels"] |= _labels(values)
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())]:
        container["image"] = images.get(container["image"], container["image"])
    if found["metadata"]["name"] == f"{values.name}-gateway":
        found["spec"]["replicas"] = _placeholder("gateway_replicas")
        pod["metadata"]["annotations"] = {"checksum/config": _placeholder(_CHECKSUM)}
    return found


def _template(objects: list[KubernetesObject], switch: str | None) -> str:
    text = "---\n".join(map(_dumped, objects))
    for name, expression in {**_VALUES, _CHECKSUM: f"{_config('files/gateway/*')} | sha256sum"}.items():
        text = text.replace(_placeholder(name), f"{{{{ {expression} }}}}")
    # The autoscaler sets the number of replicas: a number here would reset it at every upgrade.
    text = re.sub(
        r"^  replicas: \{\{ \.Values\.replicas \}\}\n",
        lambda found: f"{{{{- if not .Values.autoscaling.enabled }}}}\n{found[0]}{{{{- end }}}}\n",
        text, flags=re.MULTILINE,
    )  # fmt: skip
    return text if switch is None else _switched(text, switch)


def _switched(text: str, switch: str) -> str:
    return f"{{{{- if .Values.{switch}.enabled }}}}\n{text}{{{{- end }}}}\n"


def _dumped(document: Mapping[str, object]) -> str:
    return str(yaml.safe_dump(dict(document), sort_keys=False, width=1000, allow_unicode=True))


def _values_file(values: TemplateValues) -> str:
    def number(key: str, show: Callable[[object], str] = str) -> str:
        found: Number = values.n[key]
        return f"{show(found.value)} # {found.why}"

    redis = f"@{values.redis_digest}" if values.redis_digest else f":{values.redis_tag}"
    gateway = f"{values.gateway_name}@{values.gateway_digest}" if values.gateway_known else ""
    return f"""\
# {values.line} version {values.version}, {values.digest}
# Written by `slipway bundle --format helm`. What was measured with this release is no value.
image:
  repository: {values.repository} # a copy is as good: the digest is part of the release
replicas: {number("replicas")}
resources:
  cpu: {number("cpu_request", json.dumps)}
gateway:
  image: {json.dumps(gateway)} # REPOSITORY@sha256:…, as `slipway image gateway` pushed it
  replicas: 2 # a choice: one may fail
redis:
  image: {json.dumps(values.redis_name + redis)} # it keeps only limits
autoscaling:
  enabled: false # needs prometheus-adapter with the rule of adapter.yaml, in this folder
  maxReplicas: {number("most_replicas")}
monitoring:
  enabled: false # needs the Prometheus operator
  namespace: {values.monitoring_namespace} # Prometheus' own
"""


def _schema() -> dict[str, object]:
    """The JSON schema (draft 7, which Helm reads) of the values."""

    def closed(**properties: object) -> dict[str, object]:
        return {
            "type": "object", "additionalProperties": False, "required": sorted(properties), "properties": properties,
        }  # fmt: skip

    count, switch = {"type": "integer", "minimum": 1}, {"type": "boolean"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **closed(
            image=closed(repository={"type": "string", "pattern": "^[^@\\s]+$"}),
            replicas=count,
            resources=closed(cpu={"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?m?$"}),
            gateway=closed(image={"type": "string", "pattern": f"^[^@\\s]+{_DIGEST}"}, replicas=count),
            redis=closed(image={"type": "string", "pattern": "^\\S+$"}),
            autoscaling=closed(enabled=switch, maxReplicas=count),
            monitoring=closed(enabled=switch, namespace={"type": "string", "pattern": "^[a-z0-9-]+$"}),
        ),
    }


def _notes(values: TemplateValues) -> str:
    name = values.name
    return f"""\
{values.line}, version {values.version}, starts as {name}-engine, behind {name}-gateway.
The gateway waits for its API keys (only hashes):
  kubectl -n {{{{ .Release.Namespace }}}} create secret generic {name}-keys --from-file=keys.json
"""
