"""The examples of model files: valid, makeable of the models that they name, and held by the GPUs that they name."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from checkout import CHECKOUT
from containers.hardware.gpu_models import find_gpu
from pipeline.planner.asking import plan_described, refusals
from pipeline.planner.data import check_data
from pipeline.planner.evaluation import evaluation
from pipeline.planner.sources import Described, with_published
from pipeline.proposal.model_file import write
from pipeline.proposal.propose import AsIs, Target, propose
from pipeline.spec import load
from unit.pipeline import published_models

EXAMPLES = sorted((CHECKOUT / "examples").glob("*.yaml"))
# The published model that each is made of, and the GPU that its comment names.
OF = {
    "fine-tuned-s3": ("llama-3.1-8b", "L40S"),
    "gemma-3-27b": ("gemma-3-27b", "H100"),
    "gpt-oss-20b": ("gpt-oss-20b", "H100"),
    "llama-3.1-8b-lora": ("llama-3.1-8b", "L40S"),
    "llama-3.3-70b": ("llama-3.3-70b", "H100"),
    "mistral-small-24b": ("mistral-small-24b", "L40S"),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", "H100"),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_its_model_fits(path: Path) -> None:
    text, (planned, gpu) = path.read_text(), OF[path.stem]
    assert "# Not run here" in text
    assert f"for {gpu}, as `slipway init` proposes it" in text
    jsonschema_rs.validate(json.loads((CHECKOUT / "docs" / "model.schema.json").read_text()), yaml.safe_load(text))
    spec = load(path)
    check_data(spec)
    described = Described(published_models.model(planned), 0)
    if spec.is_published:
        described = with_published(described, None)
    assert refusals(described.model, spec.schemes) == {}
    plan = plan_described(spec, described, spec.schemes, [find_gpu(gpu)], lambda usual: usual, {})
    at_16_bits = ["fp16"] if described.is_compared else []
    assert [scheme.weights.scheme for scheme in plan.schemes] == [*at_16_bits, *spec.schemes]
    assert all(placement.fits for scheme in plan.schemes for placement in scheme.placements)
    assert all(task.can_decide for task in evaluation(spec).tasks)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_what_init_proposes(path: Path) -> None:
    document, (planned, gpu) = yaml.safe_load(path.read_text()), OF[path.stem]
    document["source"].pop("adapter", None)  # which nobody asks `init` for
    described, as_is = Described(published_models.model(planned), 0), None
    if load(path).is_published:
        described = with_published(described, None)
        assert described.published is not None
        as_is = AsIs(described.published, None, document["evals"]["accept_inconclusive"]["no-baseline"])
    name, source, target = document["model"], document["source"], Target("vllm-cuda13", find_gpu(gpu), "avx2")
    proposal = propose(
        name, source["uri"], source.get("revision"), described.model, "chat", target, has_chat_template=True,
        as_is=as_is,
    )  # fmt: skip
    assert document == yaml.safe_load(write(proposal))
