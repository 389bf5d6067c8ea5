"""Linear layers in the CPU runtime, with all that this CPU has and held to AVX2: their results, and what ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docker
import pytest

from containers.hardware.cpu import this_cpu
from containers.image import profile
from containers.image.assembly import ran
from containers.image.layers import Member, archive, plain_files
from containers.image.runtime import build_runtime
from evals.drift import packed
from evals.drift.mixture import UNQUANTIZED
from homes import DEMO
from pipeline.compatibility.scheme import Scheme
from pipeline.settings import Settings
from unit.pipeline import compressed

CHECK = Path(__file__).with_name("kernels_check.py")
# Schemes and kernels of vLLM 0.32 for what our workers write, where a CPU has one; None is one of the next line.
COMPRESSED = {
    "fp8": ("CompressedTensorsW8A8Fp8", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
    "fp8-block": ("CompressedTensorsW8A8Fp8", "CPUFp8BlockScaledMMKernel"),
    "w8a8": ("CompressedTensorsW8A8Int8", "CPUInt8ScaledMMLinearKernel"),
    "w4a16": ("CompressedTensorsWNA16", None),
    "nvfp4": ("CompressedTensorsW4A4Fp4", None),
    "mxfp4": ("CompressedTensorsW4A4Mxfp4", None),
}
OURS, VLLM = "Float32PackedLinearKernel", "CPUWNA16LinearKernel"
# One process, so that vLLM is imported once for all models.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HOME": "/tmp", "VLLM_HOST_IP": "127.0.0.1"}  # noqa: S108 - inside the container


@pytest.fixture(scope="module")
def runtime(engine: docker.DockerClient, machine: Settings) -> str:
    """The CPU runtime, without a model."""
    return build_runtime(engine, profile.load("vllm-cpu"), machine.home, print).image_id


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint in each format of compressed-tensors, and a mixture, as our workers configure them."""
    root = tmp_path_factory.mktemp("compressed")
    alike = {method: compressed.write(root / method, method) for method in COMPRESSED}
    return {**alike, "mixed": compressed.write_mixed(root / "mixed", compressed.MIXED)}


@pytest.fixture(scope="module", params=[None, "avx2"], ids=["as it is", "held to AVX2"])
def found(
    request: pytest.FixtureRequest,
    engine: docker.DockerClient,
    machine: Settings,
    runtime: str,
    checkpoints: dict[str, Path],
) -> dict[str, Any]:
    """What `kernels_check.py` prints, what the engine said of its kernels (``said``), and what the CPU may use."""
    if request.param == machine.cpu.instruction_set:
        pytest.skip("needs AVX-512: as it is, this CPU is one without")
    limit = request.param or machine.cpu_limit
    files = archive(
        [
            Member("check/kernels_check.py", CHECK),
            Member("check/packed.py", Path(packed.__file__)),
            *plain_files(DEMO / "model", "check/model"),
            *plain_files(DEMO / "adapters" / "tests", "check/adapter"),
            Member("check/adapter.jsonl", DEMO / "adapters" / "tests.jsonl"),
            *(member for name, path in checkpoints.items() for member in plain_files(path, f"check/compressed/{name}")),
        ]
    )
    lines: list[str] = []
    command = ["/opt/venv/bin/python", "/check/kernels_check.py"]
    environment = {**ONE_PROCESS, "SLIPWAY_CPU_ISA": limit or ""}
    home = machine.home
    with ran(
        engine, runtime, command, what="the check", home=home, progress=lines.append, files=files,
        environment=environment,
    ):  # fmt: skip
        marked = {mark: [line.split(mark)[1] for line in lines if mark in line] for mark in ("checked: ", "kernels: ")}
    assert marked["checked: "], lines[-20:]
    said = [json.loads(line) for line in marked["kernels: "]]
    return {**json.loads(marked["checked: "][0]), "said": said, "isa": this_cpu(limit).instruction_set}


def test_the_variable_chooses_the_build_of_the_kernels(found: dict[str, Any]) -> None:
    build = {"avx2": "_C_AVX2", "avx512": "_C_AVX512"}.get(found["isa"], "_C")
    assert found["builds"] == [f"{build}.abi3.so"]


def test_a_packed_layer_is_as_exact_as_its_arithmetic(found: dict[str, Any]) -> None:
    assert len(found["layers"]) == 36
    for layer in found["layers"]:
        # What vLLM's own kernel takes is left to it, where its build has it.
        own = layer["bits"] == 4 and layer["shape"] == [256, 96] and found["isa"] != "avx2"
        assert layer["kernel"] == (VLLM if own else OURS), layer
        assert layer["rounded" if own else "float32"] < 1, layer
        # Nothing is left of the packed weights beside the float32 copy.
        assert own or not layer["left"], layer


@pytest.mark.parametrize("method", COMPRESSED)
def test_vllm_reads_each_configuration_and_has_a_kernel_where_we_say_so(found: dict[str, Any], method: str) -> None:
    (layer,) = found["compressed"][method].values()
    lacking = Scheme.model_validate({"method": method, "backend": "llmcompressor"}).unsupported(found["isa"])
    if lacking is not None:
        assert "Failed to find a kernel" in layer["refused"], layer
        return
    is_served_in_its_format(layer, method, found["isa"])


def test_vllm_serves_each_layer_of_a_mixture_in_its_own_format(found: dict[str, Any]) -> None:
    layers = found["compressed"]["mixed"]
    assert layers.keys() == {name for name, method in compressed.MIXED.items() if method != UNQUANTIZED}
    for name, layer in layers.items():
        is_served_in_its_format(layer, compressed.MIXED[name], found["isa"])


def is_served_in_its_format(layer: dict[str, Any], method: str, isa: str) -> None:
    scheme, kernel = COMPRESSED[method]
    packed_by = VLLM if isa != "avx2" else OURS
    assert (layer["scheme"], layer["kernel"]) == (scheme, kernel or packed_by)
    # Inputs of eight bits cost up to 0.03; other scales or another order of the weights cost 0.5 and more.
    assert layer["error"] < (0.005 if method == "w4a16" else 0.05)


def test_a_16_bit_layer_is_as_exact_as_its_arithmetic_and_kept_once(found: dict[str, Any]) -> None:
    native = found["isa"] in {"avx512_bf16", "amx"}
    for layer in found["plain"]:
        assert layer["float32"] < 1, layer
        assert not layer["left"], layer
        if layer["kind"] == "torch.bfloat16":
            assert (layer["kernel"] != "float32") == native, layer


def test_the_engine_serves_every_packed_layout_and_says_what_it_runs(found: dict[str, Any]) -> None:
    assert set(found["answers"].values()) == {'__":\n           '}
    assert (len(found["answers"]), len(found["said"])) == (4, 5)
    packed_by = VLLM if found["isa"] != "avx2" else OURS
    ran_by = [{}, {packed_by: 16}, {packed_by: 16}, {OURS: 16}, {packed_by: 16}]
    assert [line["linear_quantized"] for line in found["said"]] == ran_by
    for line in found["said"]:
        assert list(line) == sorted(line)
        assert line["instruction_set"] == found["isa"]
        assert (line["linear_16bit"] == "float32") == (found["isa"] not in {"avx512_bf16", "amx"})
        assert line["threads"] >= 1
        assert {line["compute_dtype"], line["kv_cache_dtype"]} == {"bfloat16"}
        assert line["attention"] == "CPU_ATTN"


def test_an_adapter_on_packed_layers_gives_what_its_matrices_say(found: dict[str, Any]) -> None:
    adapted = found["adapted"]
    assert adapted["with"] < adapted["without"] - 0.05, adapted
    # What bfloat16 rounds away; the adapter itself changes a token by several times as much.
    assert adapted["off"] < 0.05, adapted
    assert abs(adapted["with"] - adapted["exact"]) < 0.01, adapted


def test_an_engine_without_the_plugin_does_not_start(found: dict[str, Any]) -> None:
    not_loaded, broken = found["refused"]
    assert "vLLM has not loaded the plugin `slipway_kernels`" in not_loaded
    assert "slipway_kernels.packed" in broken
