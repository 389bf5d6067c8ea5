from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from checkout import CHECKOUT
from homes import DEMO
from pipeline.compatibility.safetensors_headers import read_model
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError, PlanError, QuantizeError, UnsupportedModelError, WorkerFailed
from pipeline.quantization.quantize import QuantizationRecord, backend_of, quantize
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages import quantized
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft
from registry import counting
from registry.errors import UntrustedFileError
from registry.manifest import FileRecord
from unit.pipeline import checkpoints

AWQ = {"method": "awq", "backend": "autoawq", "group_size": 32}
GPTQ = {"method": "gptq", "backend": "gptqmodel", "group_size": 32}
QUANTIZERS = CHECKOUT / "pipeline" / "quantization" / "quantizers"


class Worker:
    """Stands in for a worker: writes a checkpoint of the right shapes, as carelessly as the real ones do."""

    def __init__(self, *, bits: int | None = None) -> None:
        self.bits = bits
        self.requests: list[dict[str, Any]] = []

    def __call__(self, environment: str, script: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        assert script.is_file()
        assert folder.is_dir()
        self.requests.append({**request, "environment": environment})
        method, bits = request["method"], self.bits or request["bits"]
        output = checkpoints.write_quantized(Path(request["output"]), method, bits, request["group_size"])
        (output / "quant_log.csv").write_text("seconds\n1.5\n")
        (output / "config.json").write_text('{"transformers_version": "made up"}')
        (output / "model.safetensors").chmod(0o600)
        stated = checkpoints.quantization_config(method, request["bits"], request["group_size"])
        return {"device": "cpu", "calibration": {"tokens": 1024, "cut": 1, "empty": 0}, "quantization_config": stated}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write_source(tmp_path / "source")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(8)))
    return path


def run(
    tmp_path: Path, source: Path, calibration: Path, scheme: dict[str, Any], worker: Worker, **more: int
) -> QuantizationRecord:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    plan = {"samples": 8, "max_tokens": 256, **more}
    return quantize(
        source,
        calibration,
        plan["samples"],
        plan["max_tokens"],
        Scheme.model_validate(scheme),
        output,
        worker,
        scratch,
        lambda _: None,
    )


def test_the_checkpoint_is_the_sources_own_but_for_its_weights(tmp_path: Path, source: Path, calibration: Path) -> None:
    record = run(tmp_path, source, calibration, AWQ, Worker())
    output = tmp_path / "output"
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in output.iterdir())
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "awq"
    assert config == checkpoints.config()
    assert record.calibration is not None
    assert (record.calibration.tokens, record.calibration.cut, record.calibration.empty) == (1024, 1, 0)
    assert len(record.calibration.sha256) == 64
    assert record.bytes < record.source_bytes
    assert record.layers == len(checkpoints.linears())


def test_the_record_says_how_many_tokens_reached_each_expert(tmp_path: Path, source: Path, calibration: Path) -> None:
    class Mixture(Worker):
        def __call__(self, environment: str, script: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
            found = super().__call__(environment, script, request, folder)
            return {**found, "experts": {"model.layers.0.mlp.experts": [700, 324]}}

    record = run(tmp_path, source, calibration, AWQ, Mixture())
    assert record.model_dump(mode="json")["experts"] == {"model.layers.0.mlp.experts": [700, 324]}
    assert "experts" not in run(tmp_path / "dense", source, calibration, AWQ, Worker()).model_dump(mode="json")


def test_a_minimum_for_experts_is_not_met_where_none_was_counted(tmp_path: Path, calibration: Path) -> None:
    expert = {"model.layers.0.mlp.experts.0.up_proj.weight": np.ones((64, 64), np.float16)}
    config = checkpoints.config() | {"model_type": "qwen3_moe"}
    dense = {name: weight for name, weight in checkpoints.unquantized().items() if ".mlp." not in name}
    source = checkpoints.write(tmp_path / "source", dense | expert, config)
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        QuantizeError, match=r"`calibration\.min_expert_tokens` is 10, but the backend counted no tokens"
    ):
        quantize(
            source, calibration, 8, 256, Scheme.model_validate(GPTQ), tmp_path / "output", Worker(),
            tmp_path / "scratch", print, min_expert_tokens=10,
        )  # fmt: skip


def test_a_worker_whose_result_is_not_valid_is_named_with_the_key(
    tmp_path: Path, source: Path, calibration: Path
) -> None:
    class Forgetful(Worker):
        def __call__(self, environment: str, script: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
            return {**super().__call__(environment, script, request, folder), "calibration": {"tokens": 0}}

    with pytest.raises(WorkerFailed, match=r"`autoawq` wrote a result that is not valid: `calibration\.tokens`"):
        run(tmp_path, source, calibration, AWQ, Forgetful())


def test_a_worker_that_breaks_its_promise_is_caught(tmp_path: Path, source: Path, calibration: Path) -> None:
    with pytest.raises(CheckpointError, match="at 4 bits in groups of 32"):
        run(tmp_path, source, calibration, GPTQ, Worker(bits=8))


def test_a_single_file_of_another_name_is_found_by_an_index(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen 3.5's small models have their weights in `model.safetensors-00001-of-00001.safetensors`."""
    for place in (CHECKOUT / "pipeline" / "workers", QUANTIZERS):
        monkeypatch.syspath_prepend(place)
    monkeypatch.setitem(sys.modules, "slipway_counting", counting)
    data_free = importlib.import_module("pipeline.quantization.quantizers.data_free")
    data_free.write_index(source)
    assert not list(source.glob("*.index.json"))
    before = read_model(source)
    (source / "model.safetensors").rename(source / "model.safetensors-00001-of-00001.safetensors")
    data_free.write_index(source)
    assert read_model(source).keys() == before.keys()


def test_the_request_is_whole_and_seeded(tmp_path: Path, source: Path, calibration: Path) -> None:
    worker = Worker()
    run(tmp_path, source, calibration, GPTQ | {"bits": 2, "desc_act": False}, worker)
    (request,) = worker.requests
    assert request["environment"] == "gptqmodel"
    assert request["seed"] == 0
    assert request["bits"] == 2
    assert request["symmetric"] is True
    assert Path(request["source"]) == source
    assert all(Path(request[key]).is_absolute() for key in ("source", "output", "calibration"))


def test_the_remedy_for_autoawq_is_on_unless_it_is_switched_off(
    tmp_path: Path, source: Path, calibration: Path
) -> None:
    worker = Worker()
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    run(tmp_path / "with", source, calibration, AWQ, worker)
    run(tmp_path / "without", source, calibration, AWQ | {"clone_saved_weights": False}, worker)
    assert [request["clone_saved_weights"] for request in worker.requests] == [True, False]


def test_an_archived_backend_reads_a_new_configuration_in_its_own_words(tmp_path: Path, calibration: Path) -> None:
    config = checkpoints.config()
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}
    source = checkpoints.write(tmp_path / "source", checkpoints.unquantized(), config)
    worker = Worker()
    run(tmp_path, source, calibration, AWQ, worker)
    view = Path(worker.requests[0]["source"])
    seen = json.loads((view / "config.json").read_text())
    assert seen["rope_theta"] == 500000.0
    assert seen["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert seen["torch_dtype"] == "float16"
    assert (view / "model.safetensors").samefile(source / "model.safetensors")
    made = json.loads((tmp_path / "output" / "config.json").read_text())
    assert made["rope_parameters"] == config["rope_parameters"]
    assert "rope_theta" not in made


@pytest.mark.parametrize("scheme", [AWQ, GPTQ])
@pytest.mark.parametrize("left", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, None])
def test_what_a_source_has_left_over_reaches_neither_worker_nor_checkpoint(
    tmp_path: Path, calibration: Path, scheme: dict[str, Any], left: object
) -> None:
    config = checkpoints.config() | {"quantization_config": left, "auto_map": {"AutoConfig": "configuration.Tiny"}}
    source = checkpoints.write(tmp_path / "source", checkpoints.unquantized(), config)
    worker = Worker()
    run(tmp_path, source, calibration, scheme, worker)
    seen = json.loads((Path(worker.requests[0]["source"]) / "config.json").read_text())
    made = json.loads((tmp_path / "output" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & seen.keys()
    assert "auto_map" not in made
    assert made["quantization_config"]["quant_method"] == scheme["method"]


@pytest.mark.parametrize(
    ("text", "samples", "reason"),
    [
        ("", 8, "holds 0 samples"),
        ('{"text": "a"}\n', 2, "holds 1 samples, but `calibration.samples` is 2"),
        ('{"txt": "a"}\n', 1, "line 1: `text` is missing: expected an object with `text`, found `txt`"),
        ("not json\n", 1, "line 1: no JSON"),
    ],
)
def test_calibration_that_will_not_do_is_refused_before_a_worker_starts(
    tmp_path: Path, source: Path, text: str, samples: int, reason: str
) -> None:
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text(text)
    worker = Worker()
    with pytest.raises(QuantizeError) as caught:
        run(tmp_path, source, calibration, AWQ, worker, samples=samples)
    assert reason in str(caught.value)
    assert not worker.requests


def test_longer_samples_than_the_model_has_positions_are_refused(
    tmp_path: Path, source: Path, calibration: Path
) -> None:
    with pytest.raises(QuantizeError, match="the model's longest context is 512 tokens"):
        run(tmp_path, source, calibration, AWQ, Worker(), max_tokens=513)


def test_a_group_size_that_does_not_divide_the_model_is_refused(
    tmp_path: Path, source: Path, calibration: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"`group_size` 128 does not divide the 64 inputs.* use 32 or 64"):
        run(tmp_path, source, calibration, AWQ | {"group_size": 128}, Worker())


def test_a_quantized_source_is_refused(tmp_path: Path, calibration: Path) -> None:
    source = checkpoints.write_quantized(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        run(tmp_path, source, calibration, AWQ, Worker())


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (AWQ | {"bits": 3}, "`autoawq` writes awq with 4 `bits`, not 3"),
        (GPTQ | {"bits": 5}, "2, 3, 4 or 8"),
        (GPTQ | {"group_size": 48}, "`group_size`"),
        (AWQ | {"backend": "autogptq"}, "use `autoawq` or `gptqmodel`"),
        (GPTQ | {"backend": "autoawq"}, "use `autogptq` or `gptqmodel`"),
        (AWQ | {"desc_act": True}, "`desc_act` applies only to gptq"),
        (GPTQ | {"clone_saved_weights": False}, "applies only to the backend `autoawq`"),
        (AWQ | {"group_sise": 64}, "group_sise"),
        ({"method": "awq"}, "backend"),
    ],
)
def test_a_scheme_that_nothing_can_make_is_refused(scheme: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Scheme.model_validate(scheme)
    assert reason in str(caught.value)


@pytest.mark.parametrize("backend", ["autoawq", "gptqmodel", "autogptq"])
def test_every_backend_names_code_and_pins_that_exist(backend: str) -> None:
    method = "awq" if backend == "autoawq" else "gptq"
    found = backend_of(Scheme.model_validate({"method": method, "backend": backend}))
    assert found.script.is_file()
    pins = Path(__file__).parents[3] / "requirements" / f"{found.environment}.txt"
    assert "--hash=sha256:" in pins.read_text()


def test_a_schemes_key_does_not_change_with_a_default_that_nobody_sets() -> None:
    assert "clone_saved_weights" not in Scheme.model_validate(AWQ).model_dump()
    assert Scheme.model_validate(AWQ | {"clone_saved_weights": False}).model_dump()["clone_saved_weights"] is False


def test_a_link_in_the_checkpoint_changes_no_other_file(tmp_path: Path, source: Path, calibration: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("private")
    key.chmod(0o600)

    class Attacker(Worker):
        def __call__(self, environment: str, script: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
            result = super().__call__(environment, script, request, folder)
            (Path(request["output"]) / "model.safetensors").unlink()
            (Path(request["output"]) / "model.safetensors").symlink_to(key)
            return result

    with pytest.raises(UntrustedFileError, match=r"model\.safetensors"):
        run(tmp_path, source, calibration, AWQ, Attacker())
    assert key.stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "output").iterdir())


def test_a_quantization_that_the_disk_has_no_room_for_is_refused_before_its_worker_starts(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    context = StageContext(load(DEMO.with_suffix(".yaml")), "gptq", settings, print)
    weights = {"model.safetensors": FileRecord(sha256="0" * 64, size=shutil.disk_usage(tmp_path).total)}
    source = Artifact("source", "0", "0", tmp_path, weights, {}, {}, 0.0, 0.0, "", cached=True)
    draft = ArtifactDraft(folder=tmp_path / "files", scratch=tmp_path / "scratch")
    needed = re.escape(f"{3 * source.size_bytes / 1e9:,.1f} GB")
    with pytest.raises(PlanError, match=rf"^quantizing `demo-gptq` needs {needed}: .* GB are free for {tmp_path}"):
        quantized.make(context, {"source": source}, draft)
