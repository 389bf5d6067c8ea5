"""What an image is, as a release records it, for tests that build none."""

from __future__ import annotations

import json

from containers.image.build import ImageRecord

DIGEST = "sha256:" + "ab" * 32
ENTRY_POINT = ["/opt/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
ARGUMENTS = ["--model", "/model", "--served-model-name", "demo"]


def image_record(**changes: object) -> ImageRecord:
    """The record of an image of the demo; ``changes`` are of its keys."""
    document = {
        "reference": f"slipway/demo-gptq@{DIGEST}", "digest": DIGEST, "pushed": False, "tag": "slipway:demo-gptq",
        "image_id": DIGEST, "base": "debian", "base_digest": DIGEST, "pins_digest": DIGEST, "wheels_digest": DIGEST,
        "model_digest": DIGEST, "runtime": "vllm-cpu", "runtime_image_id": DIGEST, "minimum_cuda": None,
        "minimum_driver": None, "size_bytes": 10**9, "model_bytes": 1000, "port": 8000, "user": 65534, "labels": {},
        "manifest": "{}", "configuration": json.dumps({"config": {"Entrypoint": ENTRY_POINT, "Cmd": ARGUMENTS}}),
    }  # fmt: skip
    return ImageRecord.model_validate({**document, **changes})
