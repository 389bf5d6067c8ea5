"""Bundles for KServe: the engine as an InferenceService, or as an LLMInferenceService behind llm-d's scheduler.

Either stands in place of a Deployment, a Service and a gateway of ours, and runs the pod of the bundle's own engine.
The number of replicas is the one that the release needs, without an autoscaler of KServe's: those scale on CPU or on
requests in the proxy, which say little of how busy a model is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from containers.errors import ContainerError
from containers.image.build import ImageRecord
from containers.kubernetes.values import TemplateValues

_LABEL = "slipway/engine"


def inference_service(engine: str, values: TemplateValues) -> str:
    """Return an InferenceService, in KServe's mode for plain Deployments.

    Args:
        engine: the file of a Kustomize bundle with the engine's objects.
        values: the templates' values.
    """
    deployment = _deployment(engine)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    predictor = {
        "labels": pod["metadata"]["labels"],
        "minReplicas": values.n["replicas"].value,
        "timeout": values.n["request_timeout"].value,
        "deploymentStrategy": deployment["spec"]["strategy"],
        **pod["spec"],
        # The name by which KServe knows the model's own container.
        "containers": [{**container, "name": "kserve-container"}],
    }
    modes = {"serving.kserve.io/deploymentMode": "RawDeployment", "serving.kserve.io/autoscalerClass": "none"}
    return _written("v1beta1", "InferenceService", {"predictor": predictor}, deployment, values, modes)


def llm_inference_service(engine: str, values: TemplateValues, image: ImageRecord) -> str:
    """Return an LLMInferenceService, which puts the Gateway API and llm-d's scheduler before the engine.

    KServe merges its default pod into this one, and selects pods by labels of its own. So the command is the image's
    entry point, which KServe's would replace, and none of our labels is one of KServe's. `parallelism` is left out: it
    is for KServe's command; the image's arguments say how many GPUs share the model.

    Args:
        engine: the file of a Kustomize bundle with the engine's objects.
        values: the templates' values.
        image: the record of the release's image.

    Raises:
        ContainerError: the record has no entry point.
    """
    name = values.name
    deployment = _deployment(engine.replace(f"app.kubernetes.io/name: {name}-engine", f"{_LABEL}: {name}"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    command, arguments = _command(image)
    main = {"args": arguments, **container, "name": "main", "command": command}
    spec = {
        "model": {"uri": f"oci://{values.image}", "name": values.model},
        "storageInitializer": {"enabled": False},  # the image has the weights
        "replicas": values.n["replicas"].value,
        "labels": {key: pod["metadata"]["labels"][key] for key in (_LABEL, "app.kubernetes.io/version")},
        "rolloutStrategy": deployment["spec"]["strategy"]["rollingUpdate"],
        "router": {"gateway": {}, "route": {}, "scheduler": {}},
        "template": {**pod["spec"], "containers": [main]},
    }
    return _written("v1alpha2", "LLMInferenceService", spec, deployment, values)


def _deployment(engine: str) -> dict[str, Any]:
    (found,) = (each for each in yaml.safe_load_all(engine) if each["kind"] == "Deployment")
    return dict(found)


def _command(image: ImageRecord) -> tuple[Sequence[str], Sequence[str]]:
    """Return the image's entry point and the arguments that it runs with by itself."""
    settings = json.loads(image.configuration).get("config", {})
    if not settings.get("Entrypoint"):
        raise ContainerError("the record of the release's image (image.json) names no entry point: release again")
    return settings["Entrypoint"], settings.get("Cmd") or []


def _written(
    version: str,
    kind: str,
    spec: Mapping[str, Any],
    deployment: Mapping[str, Any],
    values: TemplateValues,
    annotations: Mapping[str, str] | None = None,
) -> str:
    """Return a file with the engine's service account and the document, under the sources of its numbers."""
    account = {
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": deployment["spec"]["template"]["spec"]["serviceAccountName"]},
        "automountServiceAccountToken": False,
    }  # fmt: skip
    document = {
        "apiVersion": f"serving.kserve.io/{version}",
        "kind": kind,
        "metadata": {
            "name": values.name,
            "labels": {
                "app.kubernetes.io/part-of": values.name,
                "app.kubernetes.io/managed-by": "slipway",
                "app.kubernetes.io/version": values.version,
            },
            "annotations": {**deployment["metadata"]["annotations"], **(annotations or {})},
        },
        "spec": spec,
    }
    why = "".join(f"# {key.replace('_', ' ')}: {number}, {number.why}\n" for key, number in values.n.items())
    head = f"# {values.line} version {values.version}, {values.digest}\n# Where its numbers come from:\n{why}"
    return head + "---\n".join(yaml.safe_dump(each, sort_keys=False, width=1000) for each in (account, document))
