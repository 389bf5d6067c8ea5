"""The demo model quantized for real, with what the quantizer told of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from containers.hardware import machine_locks
from homes import DEMO
from pipeline.compatibility.safetensors_headers import read_model
from pipeline.compatibility.scheme import Scheme
from pipeline.planner.sources import describe_folder
from pipeline.planner.weights import quantized
from pipeline.quantization.quantize import QuantizationRecord, quantize
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from registry.progress import Progress

SAMPLES, TOKENS = 32, 200


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint's folder, its record and the lines of progress."""

    folder: Path
    record: QuantizationRecord
    lines: list[str]


def make_checkpoint(folder: Path, scheme: Mapping[str, Any], machine: Settings, samples: int = SAMPLES) -> Checkpoint:
    """Quantize it in an empty folder, with the machine's own environments: no home and no engine is needed."""
    output, scratch = folder / "checkpoint", folder / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    checked, lines = Scheme.model_validate(scheme), list[str]()
    record = quantize_demo(output, scratch, checked, machine, samples, lines.append)
    # What the planner says of the scheme, from the source's headers alone: all but the file's own header.
    planned = quantized("x", checked, describe_folder(DEMO / "model").model)
    stored = sum(tensor.bytes for tensor in read_model(output).values())
    assert stored == planned.bytes or (checked.method == "mixed" and 0.99 < stored / planned.bytes < 1)
    assert abs(planned.bytes / (output / "model.safetensors").stat().st_size - 1) < 0.01
    log = (scratch / "output.log").read_text(errors="replace").replace("\r", "\n")
    (folder / "told.json").write_text(json.dumps({"record": record.model_dump(), "lines": [*lines, *log.splitlines()]}))
    return read_checkpoint(folder)


def quantize_demo(
    output: Path, scratch: Path, scheme: Scheme, machine: Settings, samples: int, progress: Progress
) -> QuantizationRecord:
    """Quantize it into a folder, as the stage does: a release that is being timed meanwhile has the cores alone."""
    text = DEMO / "calibration.jsonl" if scheme.needs_calibration else None
    with machine_locks.locked(machine.locks, machine_locks.CORES, shared=True):
        return quantize(
            DEMO / "model", text, samples, TOKENS, scheme, output, Workers(machine, print), scratch, progress
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one that was made."""
    told = json.loads((folder / "told.json").read_text())
    return Checkpoint(folder / "checkpoint", QuantizationRecord.model_validate(told["record"]), told["lines"])
