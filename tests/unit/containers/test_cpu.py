"""What a CPU can do is read from /proc/cpuinfo in the forms that kernels give it, and is put into words that help."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from containers.hardware import cpu
from containers.hardware.cpu import INSTRUCTION_SETS, Cpu, describe, this_cpu

# Flags as kernels wrote them of these CPUs, shortened: those of x86-64-v2, which all have, and then each one's own.
BASE = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx "
    "pdpe1gb rdtscp lm constant_tsc rep_good nopl nonstop_tsc cpuid pni pclmulqdq ssse3 cx16 pcid sse4_1 sse4_2 x2apic "
    "movbe popcnt aes xsave hypervisor lahf_lm"
)
V3 = f"{BASE} fma avx f16c rdrand abm fsgsbase bmi1 avx2 smep bmi2 erms invpcid"
ZEN_3 = f"{V3} rdseed adx smap clflushopt clwb sha_ni xsaveopt xsavec xgetbv1 xsaves clzero wbnoinvd arat rdpid"
CASCADE_LAKE = (
    f"{V3} mpx avx512f avx512dq rdseed adx smap clflushopt clwb avx512cd avx512bw avx512vl xsaveopt xsavec arat "
    "avx512_vnni arch_capabilities"
)
ZEN_5 = (
    f"{V3} avx512f avx512dq adx smap avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl xsaveopt xsavec "
    "xgetbv1 xsaves avx_vnni avx512_bf16 clzero arat avx512vbmi umip avx512_vbmi2 gfni vaes avx512_vnni avx512_bitalg"
)
SAPPHIRE_RAPIDS = (
    f"{V3} avx512f avx512dq rdseed adx smap avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl avx_vnni "
    "avx512_bf16 avx512vbmi umip avx512_vbmi2 gfni avx512_vnni serialize amx_bf16 avx512_fp16 amx_tile amx_int8"
)
KNIGHTS_LANDING = f"{V3} rdseed adx avx512f avx512pf avx512er avx512cd"
CORTEX = """processor\t: 0
BogoMIPS\t: 38.40
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd03
CPU revision\t: 4
"""


def processor(name: str, flags: str, number: int = 0) -> str:
    """One processor's part of /proc/cpuinfo."""
    return (
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: {name}\n"
        f"stepping\t: 7\ncpu MHz\t\t: 2596.122\ncache size\t: 1024 KB\nfpu\t\t: yes\nwp\t\t: yes\nflags\t\t: {flags}\n"
        "bugs\t\t: spectre_v1 spectre_v2\nbogomips\t: 5192.24\npower management:\n\n"
    )


@pytest.mark.parametrize(
    ("name", "flags", "found", "bfloat16"),
    [
        ("QEMU Virtual CPU version 2.5+", BASE, "none", False),
        ("AMD EPYC 7R13 Processor", ZEN_3, "avx2", False),
        ("Intel(R) Xeon Phi(TM) CPU 7250 @ 1.40GHz", KNIGHTS_LANDING, "avx2", False),
        ("Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz", CASCADE_LAKE, "avx512", False),
        ("AMD EPYC", ZEN_5, "avx512_bf16", True),
        ("Intel(R) Xeon(R) Platinum 8480+", SAPPHIRE_RAPIDS, "amx", True),
    ],
)
def test_the_instruction_set_is_the_best_that_the_kernels_can_use(
    name: str, flags: str, found: str, bfloat16: bool
) -> None:
    seen = describe(processor(name, flags) + processor(name, flags, 1), "x86_64", 2)
    assert (seen.model, seen.instruction_set, seen.bfloat16, seen.cores) == (name, found, bfloat16, 2)
    assert (seen.refusal is None) == (found != "none")


def test_a_feature_that_one_processor_lacks_is_not_counted(tmp_path: Path) -> None:
    mixed = processor("Hybrid", ZEN_5) + processor("Hybrid", ZEN_3, 1)
    assert describe(mixed, "x86_64", 2).instruction_set == "avx2"


def test_a_limit_takes_away_and_never_adds() -> None:
    assert describe(processor("AMD EPYC", ZEN_5), "x86_64", 2, "avx2").instruction_set == "avx2"
    assert describe(processor("QEMU", BASE), "x86_64", 2, "avx2").instruction_set == "none"


def test_another_architecture_is_refused_with_what_to_do() -> None:
    arm = describe(CORTEX, "aarch64", 4)
    assert (arm.instruction_set, arm.model) == ("none", "unknown")
    assert arm.refusal == (
        "the CPU runtimes are for x86-64, and this machine is aarch64 (unknown): release on an x86-64 machine with AVX2"
    )


def test_a_name_is_bounded_and_shows_no_control_characters() -> None:
    seen = describe(processor("\x1b[31mevil" + "x" * 500, ZEN_3), "x86_64", 1)
    assert seen.model.startswith("[31mevil")
    assert len(seen.model) == 128


def test_this_machine_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = this_cpu()
    assert seen.architecture == platform.machine()
    assert seen.cores >= 1
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "absent")
    assert this_cpu().instruction_set == "none"


def test_every_set_says_what_it_means() -> None:
    told = {Cpu("x", "x86_64", name, 1).meaning for name in INSTRUCTION_SETS}
    assert len(told) == len(INSTRUCTION_SETS)
