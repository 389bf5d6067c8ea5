"""Prompt tokens per second of linear layers on this CPU: ours, torch's own loops, and vLLM's kernels where it has them.

    .venv/bin/python benchmarks/cpu_kernels.py

Runs inside the CPU runtime, once with all that the CPU has and once held to AVX2 (and once with AVX-512 but without its
bfloat16, for oneDNN alone). One thread; the fastest of many runs by the process's own CPU time, so that what else the
machine does counts little. A prompt goes through all linear layers of a model, 256 tokens at a time; attention, norms
and sampling are left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOKENS = 256
SECONDS = 0.4
GROUP = 64
# (inputs, outputs): how many of them, as vLLM fuses them.
MODELS: Mapping[str, Mapping[tuple[int, int], int]] = {
    "demo (4.2M)": {(256, 512): 4, (256, 256): 4, (256, 1536): 4, (768, 256): 4, (256, 2048): 1},
    "SmolLM2 (135M)": {(576, 960): 30, (576, 576): 30, (576, 3072): 30, (1536, 576): 30, (576, 49152): 1},
}
CPUS = {
    "as it is": {},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"SLIPWAY_CPU_ISA": "avx2"},
}
Layer = Callable[[Any], Any]


def main() -> None:
    """Run it inside the runtime for each kind of CPU that this one can be, and print a table."""
    from containers.engine.engine import connect
    from containers.image import profile
    from containers.image.assembly import ran
    from containers.image.layers import Member, archive
    from containers.image.runtime import build_runtime
    from pipeline.settings import Settings

    settings = Settings.read()
    client = connect(settings.docker_host, settings.home)
    image = build_runtime(client, profile.load("vllm-cpu"), settings.home, print).image_id
    command = ["/opt/venv/bin/python", "/cpu_kernels.py", "inside"]
    files = archive([Member("cpu_kernels.py", Path(__file__))])
    most = settings.cpu.instruction_set
    kinds = {
        kind: variables for kind, variables in CPUS.items() if kind == "as it is" or most.startswith(("avx512", "amx"))
    }
    print(f"{settings.cpu.model}, {most}; prompt tokens per second of linear layers, one thread")
    for kind, variables in kinds.items():
        lines: list[str] = []
        environment = {"OMP_NUM_THREADS": "1", "HOME": "/tmp", **variables}  # noqa: S108 - inside the container
        with ran(
            client, image, command, what="the benchmark", home=settings.home, progress=lines.append, files=files,
            environment=environment,
        ):  # fmt: skip
            found = next(json.loads(line.partition("found: ")[2]) for line in lines if "found: " in line)
        for model, speeds in found.items():
            ours = speeds["float32, 16-bit"]
            for name, speed in speeds.items():
                print(f"{kind:26} {model:16} {name:26} {speed:10,.0f}  {speed / ours:5.2f} of ours")


def inside() -> None:
    """Measure, where torch and vLLM are."""
    import slipway_kernels
    import torch

    slipway_kernels.register()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for model, layers in MODELS.items():
        spent: dict[str, float] = {}
        for (inputs, outputs), count in layers.items():
            x = torch.randn(TOKENS, inputs, dtype=torch.bfloat16)
            for name, layer in kernels(inputs, outputs).items():
                spent[name] = spent.get(name, 0) + count * fastest(layer, x)
        found[model] = {name: TOKENS / seconds for name, seconds in spent.items()}
    print("found:", json.dumps(found))


def kernels(inputs: int, outputs: int) -> dict[str, Layer]:
    """Every kernel that can multiply a layer of this size here."""
    import torch
    from slipway_kernels import float32
    from slipway_kernels.packed import Float32PackedLinearKernel
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear import CPUWNA16LinearKernel, MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    plain = float32.linear(weight)
    found: dict[str, Layer] = {
        "float32, 16-bit": lambda x: plain(x, None),
        "torch, 16-bit": lambda x: torch.nn.functional.linear(x, weight),
    }
    try:
        handler = ops.create_onednn_mm(weight.t(), 32)
        found["vLLM's oneDNN, 16-bit"] = lambda x: ops.onednn_mm(handler, x, None)
    except RuntimeError:  # oneDNN has no bfloat16 on this CPU
        pass
    shape = (inputs, outputs)
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, GROUP, zero_points=False)
    chosen = {"float32, 4-bit": Float32PackedLinearKernel}
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):  # noqa: SLF001 - where vLLM's operators are
        chosen["vLLM's, 4-bit"] = CPUWNA16LinearKernel
    for name, kernel in chosen.items():
        found[name] = packed(kernel(config, "qweight", "scales"), inputs, outputs)
    return found


def packed(kernel: Any, inputs: int, outputs: int) -> Layer:  # noqa: ANN401 - of vLLM
    """A layer of GPTQ's, loaded by a kernel of vLLM's kind."""
    import torch

    layer = torch.nn.Module()
    words = torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int32)
    layer.qweight = torch.nn.Parameter(words, requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.rand(inputs // GROUP, outputs, dtype=torch.bfloat16), requires_grad=False)
    for parameter, axis in ((layer.qweight, 0), (layer.scales, None)):
        parameter.input_dim, parameter.output_dim, parameter.packed_dim = 0, 1, axis
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def fastest(layer: Layer, x: Any) -> float:  # noqa: ANN401 - a tensor
    """Seconds of CPU time that the fastest of many calls takes."""
    best, until = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < until:
        began = time.process_time()
        layer(x)
        best = min(best, time.process_time() - began)
    return best


if __name__ == "__main__":
    inside() if sys.argv[1:] == ["inside"] else main()
