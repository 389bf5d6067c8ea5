"""The model's bill of materials: what is in it, and that it is the same for the same release."""

from __future__ import annotations

import json

from containers.scan import mlbom
from registry.verdict import Verdict

MODEL = mlbom.Model(
    name="demo-awq", version="sha256:aa", base="hf://org/demo", base_revision="0" * 40, licence="Apache-2.0",
    architecture="LlamaForCausalLM", quantization={"method": "awq", "bits": 4}, files={"model.safetensors": "ab" * 32},
    datasets={"calibration.jsonl": ("calibration", "cd" * 32)},
)  # fmt: skip
VERDICTS = [Verdict(gate="drift", status="pass", reason="fine", metrics={"cloze.drop": 0.00125})]


def test_it_names_base_licence_quantization_data_and_evaluation() -> None:
    told = mlbom.document(MODEL, VERDICTS, "sha256:image")
    model = told["metadata"]["component"]
    assert (told["bomFormat"], told["specVersion"], model["type"]) == ("CycloneDX", "1.6", "machine-learning-model")
    assert model["pedigree"]["ancestors"][0]["name"] == "hf://org/demo"
    assert model["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    assert {"name": "slipway:quantization:bits", "value": "4"} in model["properties"]
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "data-calibration.jsonl"}]
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "drift.cloze.drop", "value": "0.00125"}
    ]
    references = {part["bom-ref"] for part in told["components"]}
    assert set(told["dependencies"][0]["dependsOn"]) == references


def test_the_same_release_has_the_same_bill_and_another_another() -> None:
    one = mlbom.document(MODEL, VERDICTS, "sha256:image")
    assert json.dumps(one) == json.dumps(mlbom.document(MODEL, VERDICTS, "sha256:image"))
    assert one["serialNumber"] != mlbom.document(MODEL, VERDICTS, "sha256:other")["serialNumber"]
