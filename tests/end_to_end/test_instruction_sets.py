"""The release's checkpoints as a CPU without AVX-512 serves them, on a machine that has it.

Without it every other test runs on AVX2 already, and the run's last lines say so.
"""

from __future__ import annotations

import pytest

from evals.drift.pairs import read_drift
from homes import DEMO, Slipway
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.context import StageContext
from pipeline.stages.drift import judge
from pipeline.stages.run import run_until


@pytest.fixture
def spec() -> ModelSpec:
    """The demo, asked a little of its suite: what is looked for is a kernel that computes something else."""
    demo = load(DEMO.with_suffix(".yaml"))
    tasks = {name: task.model_copy(update={"items": 40}) for name, task in demo.evals.tasks.items()}
    evals = demo.evals.model_copy(update={"tasks": tasks, "again": 0, "layers": False})
    return demo.model_copy(update={"evals": evals})


@pytest.mark.parametrize("scheme", ["awq", "gptq"])
def test_a_cpu_without_avx512_answers_nearly_as_fp16_does(
    scheme: str, spec: ModelSpec, slipway: Slipway, machine: Settings
) -> None:
    """FP16 is asked once for both, in the same mode."""
    if machine.cpu.instruction_set == "avx2":
        pytest.skip("needs AVX-512: here every other test ran without")
    context = StageContext(spec, scheme, Settings.read({**slipway.variables, "SLIPWAY_CPU_ISA": "avx2"}), print)
    made = run_until("drift", context)
    assert made["baseline"].notes["instruction_set"] == "avx2"
    for answers in read_drift(made["drift"].folder).computed_on.values():
        assert answers.kernels is not None
        assert answers.kernels.instruction_set == "avx2"
    # Of the release itself it is under 0.02 nats a token; of other weights it is more than 1.
    assert judge(made["drift"], context).metrics["divergence.mean"] < 0.1
