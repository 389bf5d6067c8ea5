"""What an engine says of its kernels is read from its log, bounded and by its form; anything else is absent."""

from __future__ import annotations

import json

import pytest

from containers.hardware.core_pool import Cores
from containers.hardware.cpu import Cpu
from containers.sandbox.kernels import ComputedOn, find, head
from containers.sandbox.memory import MemorySampler
from containers.sandbox.sandbox import Server

TOLD = {
    "attention": "CPU_ATTN", "compute_dtype": "bfloat16", "cpu_model": "AMD EPYC 7R13 Processor",
    "instruction_set": "avx2", "kv_cache_dtype": "bfloat16", "linear_16bit": "float32",
    "linear_quantized": {"Float32WNA16LinearKernel": 28}, "threads": 2,
}  # fmt: skip


def line(told: object) -> bytes:
    return b"(EngineCore_0 pid=77) slipway kernels: " + json.dumps(told, sort_keys=True).encode() + b"\n"


def test_the_line_is_found_wherever_the_log_is_cut() -> None:
    log = b"INFO starting\n" + line(TOLD) + b"INFO Application startup complete.\n"
    found = find(head(log[at : at + 7] for at in range(0, len(log), 7)))
    assert found is not None
    assert found.model_dump() == TOLD
    assert find(line({**TOLD, "added later": 1})) == found


@pytest.mark.parametrize(
    "told",
    [
        {},
        [],
        {**TOLD, "threads": -1},
        {**TOLD, "threads": "2"},
        {**TOLD, "cpu_model": "\x1b[31mred"},
        {**TOLD, "attention": "x" * 129},
        {**TOLD, "linear_quantized": {"<script>": 1}},
        {**TOLD, "linear_quantized": {f"kernel{number}": 1 for number in range(33)}},
        {name: value for name, value in TOLD.items() if name != "compute_dtype"},
    ],
)
def test_what_is_not_of_the_form_is_absent(told: object) -> None:
    assert find(line(told)) is None
    assert find(line(told) + line(TOLD)) == find(line(TOLD))


def test_a_log_without_end_is_read_to_its_limit_alone() -> None:
    chunks = iter([b"x" * 65_536] * 65)
    assert find(head(chunks)) is None
    assert next(chunks, None) is not None
    assert find(b"slipway kernels: " + b"[" * 100_000) is None


def test_a_server_says_what_computes_its_answers() -> None:
    def server(**known: object) -> Server:
        sampler = MemorySampler(lambda: None, "test")
        return Server("http://x", 1.0, 1, None, sampler, lambda: None, **known)  # type: ignore[arg-type]

    assert server().computed_on == ComputedOn()
    assert server(gpus=("GPU-1", "GPU-2")).computed_on == ComputedOn(gpus=("GPU-1", "GPU-2"))
    assert ComputedOn.model_validate({"gpu": "GPU-1"}) == ComputedOn(gpus=("GPU-1",))
    assert ComputedOn.model_validate({"gpu": None}) == ComputedOn()
    cpu = Cpu("A CPU", "x86_64", "avx2", 2)
    alone = server(cores=Cores((0, 1)), cpu=cpu).computed_on
    assert alone == ComputedOn(cpu_model="A CPU", instruction_set="avx2", cores=(0, 1))
    told = server(cores=Cores((1,), shared=True), cpu=cpu, kernels=find(line(TOLD))).computed_on
    assert str(told) == (
        "AMD EPYC 7R13 Processor, avx2, 1 cores (1) shared with other servers, 2 threads, bfloat16 between layers, "
        "16-bit layers by float32, Float32WNA16LinearKernel for 28 layers, attention CPU_ATTN, KV cache bfloat16"
    )
    assert ComputedOn.model_validate_json(told.model_dump_json()) == told
