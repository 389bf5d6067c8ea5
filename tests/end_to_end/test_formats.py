"""The demo in the formats of compressed-tensors, whole: served where vLLM's CPU engine has kernels, and otherwise
evaluated without a server, and then never promoted here.

They find FP16's answers and all that does not depend on a scheme in the first release's home.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.drift.mixture import FILE, UNQUANTIZED, read_mixture
from evals.drift.pairs import read_drift
from evals.load.evidence import read_load_evidence
from homes import DEMO, Slipway
from pipeline.compatibility.scheme import Scheme
from pipeline.settings import Settings

FP8, INT8 = "ChannelWiseTorchFP8ScaledMMLinearKernel", "CPUInt8ScaledMMLinearKernel"
OURS, VLLM = "Float32PackedLinearKernel", "CPUWNA16LinearKernel"
# vLLM multiplies fused layers: four in each of the demo's four layers.
LINEARS = 16
FP8_CACHE = {"method": "fp8", "kv_cache": "fp8"}
# Of cores that other tests use too: what is looked for is a server that answers, and what it computes with.
SLO = {"p95_latency_ms": 60_000, "p95_ttft_ms": 60_000, "error_rate": 0.0}

Write = Callable[..., Path]
Release = Mapping[str, Any]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the demo's model file with one scheme of llm-compressor, which has its method's name."""

    def written(scheme: Mapping[str, Any], **evals: str) -> Path:
        document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
        document["schemes"] = {scheme["method"]: {"backend": "llmcompressor", **scheme}}
        document["evals"] |= evals
        document["load"]["slo"] = SLO
        path = tmp_path / "demo.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return written


def released(slipway: Slipway, model: Path, status: int, **variables: str) -> tuple[Release, list[str]]:
    """What `slipway release --json` printed of the one scheme, and its lines of progress."""
    done = slipway("release", model, "--json", **variables)
    assert done.returncode == status, done.stderr
    (release,) = json.loads(done.stdout)["releases"]
    return release, done.stderr.splitlines()


def gates(release: Release) -> dict[str, tuple[str, str]]:
    return {gate["name"]: (gate["status"], gate["reason"]) for gate in release["gates"]}


def pulled(release: Release, slipway: Slipway, folder: Path) -> Path:
    """The evidence of a promoted release, once pull has verified it."""
    assert release["outcome"] == "promoted", release
    done = slipway("pull", f"demo-{release['scheme']}", folder / "pulled")
    assert done.returncode == 0, done.stderr
    return folder / "pulled" / "release" / "evidence"


def check_served(evidence: Path, kernels: Mapping[str, int]) -> None:
    """What multiplied the layers, and that nothing was left out of the evaluation."""
    load, drift = read_load_evidence(evidence), read_drift(evidence)
    assert load.server.not_applied == []
    assert load.server.computed_on is not None
    assert load.server.computed_on.kernels is not None
    assert load.server.computed_on.kernels.linear_quantized == kernels
    assert load.memory.expected is not None
    assert not load.memory.expected.off
    assert drift.not_computed == ()
    assert drift.divergence is not None
    # Measured: 0.0004 to 0.004 nats.
    assert drift.divergence.mean < 0.02


def test_fp8_is_made_without_text_and_served_on_every_cpu(slipway: Slipway, write: Write, tmp_path: Path) -> None:
    release, _ = released(slipway, write({"method": "fp8"}), status=0)
    check_served(pulled(release, slipway, tmp_path), {FP8: LINEARS})


# Two sizes, since a checkpoint that was evaluated on one CPU is not evaluated on another.
@pytest.mark.long
@pytest.mark.parametrize(
    ("scheme", "isa", "kernel"),
    [
        ({"method": "w8a8"}, None, INT8),
        (FP8_CACHE, None, FP8),
        ({"method": "w4a16", "group_size": 64}, None, VLLM),
        ({"method": "w4a16", "group_size": 32}, "avx2", OURS),
    ],
    ids=["w8a8", "FP8 cache", "w4a16", "w4a16 held to AVX2"],
)
def test_a_format_is_served_by_the_kernel_that_this_cpu_has(
    scheme: dict[str, Any],
    isa: str | None,
    kernel: str,
    slipway: Slipway,
    write: Write,
    machine: Settings,
    tmp_path: Path,
) -> None:
    if (kernel == VLLM or scheme == FP8_CACHE) and machine.cpu.instruction_set == "avx2":
        pytest.skip("needs AVX-512: with AVX2 our kernel serves w4a16, and vLLM has no FP8 cache")
    limit = {} if isa is None else {"SLIPWAY_CPU_ISA": isa}
    release, _ = released(slipway, write(scheme), status=0, **limit)
    check_served(pulled(release, slipway, tmp_path), {kernel: LINEARS})


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "formats"), [(5, ["w4a16", "w8a8", "fp8"]), (6, ["w4a16", "fp8"])], ids=["5 bits", "6 bits without INT8"]
)
def test_a_mixture_is_served_with_the_kernel_of_each_layers_format(
    bits: float, formats: list[str], slipway: Slipway, write: Write, machine: Settings, tmp_path: Path
) -> None:
    model = write({"method": "mixed", "budget": {"bits_per_weight": bits}, "formats": formats})
    release, _ = released(slipway, model, status=0)
    evidence = pulled(release, slipway, tmp_path)
    mixture = read_mixture(evidence / FILE)
    assert mixture.bytes <= mixture.budget_bytes
    chosen = Counter(group.chosen.partition("-")[0] for group in mixture.groups.values())
    assert len(chosen) > 1
    packed_by = OURS if machine.cpu.instruction_set == "avx2" else VLLM
    kernels = {"w4a16": packed_by, "w8a8": INT8, "fp8": FP8}
    check_served(evidence, {kernels[name]: count for name, count in chosen.items() if name != UNQUANTIZED})


@pytest.mark.long
@pytest.mark.parametrize("method", ["fp8-block", "nvfp4", "mxfp4"])
def test_a_format_without_a_kernel_is_evaluated_without_a_server_and_not_promoted(
    method: str, slipway: Slipway, write: Write, machine: Settings
) -> None:
    scheme = Scheme.model_validate({"method": method, "backend": "llmcompressor"})
    lacking = scheme.unsupported(machine.cpu.instruction_set)
    release, lines = released(slipway, write({"method": method}, engine="hf"), status=3 if lacking else 0)
    drift, reason = gates(release)["drift"]
    assert drift == "pass", reason
    assert reason.endswith(f"the loss of the weights alone, without {scheme.quantized_at_run_time[0]}")
    if lacking is None:
        assert release["outcome"] == "promoted"
        return
    assert release["outcome"] == "refused"
    assert gates(release)["load"] == ("inconclusive", lacking)
    first = f"{method} can't be served on this machine ({lacking}): `load` will be inconclusive"
    assert lines.index(first) < next(place for place, line in enumerate(lines) if " source " in line)
