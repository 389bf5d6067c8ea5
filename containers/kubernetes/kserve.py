"""A bundle for KServe: the engine as an InferenceService, in place of a Deployment, a Service and a gateway of ours."""

from __future__ import annotations

import yaml

from containers.kubernetes.values import TemplateValues


def inference_service(engine: str, values: TemplateValues) -> str:
    """Return an InferenceService whose predictor is the pod of the bundle's engine.

    It runs in KServe's mode for plain Deployments, with the number of replicas that the release needs and no
    autoscaler of KServe's: those scale on CPU or on requests in the proxy, which say little of how busy a model is.

    Args:
        engine: the file of a Kustomize bundle with the engine's objects.
        values: the templates' values.
    """
    (deployment,) = (each for each in yaml.safe_load_all(engine) if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    numbers = values.n
    document = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": values.name,
            "labels": {
                "app.kubernetes.io/part-of": values.name,
                "app.kubernetes.io/managed-by": "slipway",
                "app.kubernetes.io/version": values.version,
            },
            "annotations": {
                **deployment["metadata"]["annotations"],
                "serving.kserve.io/deploymentMode": "RawDeployment",
                "serving.kserve.io/autoscalerClass": "none",
            },
        },
        "spec": {
            "predictor": {
                "labels": pod["metadata"]["labels"],
                "minReplicas": numbers["replicas"].value,
                "timeout": numbers["request_timeout"].value,
                "deploymentStrategy": deployment["spec"]["strategy"],
                **pod["spec"],
                # The name by which KServe knows the model's own container.
                "containers": [{**container, "name": "kserve-container"}],
            }
        },
    }
    account = {
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": pod["spec"]["serviceAccountName"]},
        "automountServiceAccountToken": False,
    }  # fmt: skip
    why = "".join(f"# {key.replace('_', ' ')}: {number}, {number.why}\n" for key, number in numbers.items())
    head = f"# {values.line} version {values.version}, {values.digest}\n# Where its numbers come from:\n{why}"
    return head + "---\n".join(yaml.safe_dump(each, sort_keys=False, width=1000) for each in (account, document))
