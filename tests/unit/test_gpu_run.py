"""The prepared run on a GPU: what it leaves whatever happens, and parts that a stand-in for NVML can answer."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from pathlib import Path

import pynvml
import pytest
import stand_in_nvml
from stand_in_nvml import StandInGpu

from benchmarks.gpu import wheels
from benchmarks.gpu.__main__ import main, run
from benchmarks.gpu.document import Gate, GpuRun, Part
from benchmarks.gpu.parts import PARTS, Context, PartFailed, PartSkipped, gate
from containers.image import gpu_compatibility
from pipeline.settings import Settings


@pytest.fixture
def context(tmp_path: Path) -> Context:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path), "SLIPWAY_LOCKS": str(tmp_path)})
    return Context(settings, GpuRun(started="now", dry_run=False, seconds=0, carried_bytes=0), dry_run=False)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVML's answers come from this file: one H100, a driver for CUDA 13.0."""
    for name in [name for name in dir(pynvml) if name.startswith("nvml")]:
        monkeypatch.setattr(pynvml, name, getattr(pynvml, name))
    file = tmp_path / "nvml.json"
    stand_in_nvml.write(file, [StandInGpu("GPU-a")])
    stand_in_nvml.install(file)
    return file


def test_the_gate_accepts_the_runtimes_and_refuses_all_that_is_made_up(nvml: Path, context: Context) -> None:
    found = gate(context)
    problems = {each.image: each.problems for each in found.requirements}
    assert problems.pop("vllm-cpu") == problems.pop("vllm-cuda12") == problems.pop("vllm-cuda13") == ()
    assert problems["a driver that is one newer"] == (
        "made up needs NVIDIA driver 581.95.05 or later, but this host has 580.95.05",
    )
    assert len(problems) == 4
    assert all(problems.values())
    assert found.second_reservation is not None
    assert "GPU-a is reserved" in found.second_reservation


def test_a_gate_that_lets_everything_pass_fails_the_part(
    nvml: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_compatibility, "problems", lambda _needs, _gpu: [])
    with pytest.raises(PartFailed, match="wrong answers: a driver that is one newer, kernels of the next") as caught:
        gate(context)
    assert isinstance(caught.value.found, Gate)


def test_without_a_gpu_its_parts_are_skipped(nvml: Path, context: Context) -> None:
    stand_in_nvml.write(nvml, [])
    with pytest.raises(PartSkipped, match="NVML finds no GPU"):
        gate(context)


def test_every_part_leaves_an_entry_and_the_document_is_whole_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`machine` fails for want of torch in this environment; `memory` gets no time."""
    monkeypatch.setitem(PARTS, "memory", dataclasses.replace(PARTS["memory"], limit=0))
    out = tmp_path / "gpu.json"
    assert not run(out, dry_run=False, names=["machine", "memory", "kernels of awq by autoawq", "vllm"])
    parts = GpuRun.model_validate_json(out.read_text()).parts
    assert [each.status for each in parts] == ["failed", "failed", "skipped", "skipped"]
    assert parts[0].reason == "ModuleNotFoundError: No module named 'torch'"
    assert str(parts[1].reason).startswith("it was stopped after 0 s")
    assert parts[2].reason == "it was not quantized"
    assert capsys.readouterr().out.count("\n") == len(parts)


def test_what_no_time_is_left_for_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.LIMIT_SECONDS", 0)
    assert run(tmp_path / "gpu.json", dry_run=False, names=["gate"])
    found = GpuRun.model_validate_json((tmp_path / "gpu.json").read_text())
    assert found.parts == (Part(part="gate", status="skipped", seconds=0, reason="no time was left"),)


def test_what_is_carried_is_pinned_with_hashes_and_leaves_torch_to_the_machine() -> None:
    pins = wheels.newer()
    assert all("--hash=sha256:" in pin for pin in pins.values())
    assert {"autoawq", "auto-gptq", "gptqmodel", "llmcompressor", "docker", "pydantic"} <= pins.keys()
    assert not [name for name in pins if re.match("torch$|triton|nvidia-(?!ml-py)", name)]


def test_a_folder_is_left_out_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "gekko-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("gekko/bin/solver", "gekko/gekko.py"):
            archive.writestr(name, name)
    wheels.cut(wheel, ("gekko/bin/",))
    assert zipfile.ZipFile(wheel).namelist() == ["gekko/gekko.py"]
    assert list(tmp_path.iterdir()) == [wheel]


def test_parts_are_named_after_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "run", "--dry-run", "--out", str(out), "vllm", "compiled kernels"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    document = GpuRun.model_validate_json(out.read_text())
    assert document.dry_run
    assert [each.part for each in document.parts] == ["vllm", "compiled kernels"]
