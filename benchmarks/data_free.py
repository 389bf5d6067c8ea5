"""FP8 of a generated checkpoint without calibration: this project's worker, llm-compressor's, and a plain cast.

    PYTHON benchmarks/data_free.py FOLDER [--gigabytes 4]

PYTHON is that of the worker environment `llmcompressor`; FOLDER receives 2.5 times the size, and is empty afterwards.
Each reads the same eight files with the page cache dropped (as root), and ends when what it wrote is on disk. The cast
reads each file once, converts it to FP8 without scales, and writes it. Prints one JSON object: seconds, peak memory in
MB, ratios, and whether both quantizers wrote the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WORKER = Path(__file__).parents[1] / "pipeline" / "quantization" / "quantizers" / "data_free.py"
SHARDS, HIDDEN, INNER = 8, 4096, 11008
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
    "mlp.down_proj": (HIDDEN, INNER),
}
PIECE = 8 << 20


@dataclass(frozen=True)
class Measured:
    """What one of the three took, and a digest of what it wrote."""

    seconds: float
    peak_mb: int
    digest: str


def main() -> None:
    """Generate, measure each in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--run", choices=["generate", "ours", "theirs", "cast"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source, output = arguments.folder / "source", arguments.folder / "output"
    if arguments.run == "generate":
        generate(source, arguments.gigabytes)
        return
    if arguments.run:
        {"ours": ours, "theirs": theirs, "cast": cast}[arguments.run](source, output)
        synchronize(output)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
        return
    # In a process of its own: one that is started inherits the peak memory of the one that starts it.
    generating = [sys.executable, __file__, str(arguments.folder), "--gigabytes", str(arguments.gigabytes)]
    subprocess.run([*generating, "--run", "generate"], check=True)
    found = {name: measure(name, arguments.folder, output) for name in ("cast", "ours", "theirs")}
    print(
        json.dumps(
            {
                "gigabytes": sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9,
                "ours_to_cast": found["ours"].seconds / found["cast"].seconds,
                "ours_to_theirs": found["ours"].seconds / found["theirs"].seconds,
                "same_bytes": found["ours"].digest == found["theirs"].digest,
                **{name: asdict(each) for name, each in found.items()},
            },
            indent=1,
        )
    )
    shutil.rmtree(source)


def generate(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of so many layers in eight files, in bfloat16."""
    folder.mkdir(parents=True)
    layer_bytes = 2 * sum(out * inputs for out, inputs in SHAPES.values())
    layers = max(SHARDS, round(gigabytes * 1e9 / layer_bytes))
    names = [f"model.layers.{number}.{name}" for number in range(layers) for name in SHAPES]
    generator = torch.Generator().manual_seed(0)
    pattern = (torch.randn(max(out * inputs for out, inputs in SHAPES.values()), generator=generator) / 50).bfloat16()
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        shapes = {name: SHAPES[name.split(".", 3)[3]] for name in part}
        tensors = {
            f"{name}.weight": pattern.roll(number)[: shape[0] * shape[1]].reshape(shape).clone()
            for number, (name, shape) in enumerate(shapes.items())
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def measure(name: str, folder: Path, output: Path) -> Measured:
    """Run one of the three with a cold cache."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), str(folder.resolve()), "--run", name]
    # As the worker sets it: this script has imported torch before the worker can.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=output, env=environment)
    seconds = time.monotonic() - started
    peak = float(done.stdout.split()[-1])
    digest = "" if name == "cast" else digest_of(output)
    shutil.rmtree(output)
    return Measured(round(seconds, 1), round(peak), digest)


def ours(source: Path, output: Path) -> None:
    """The worker, in this process, as it runs in a release."""
    request = {
        "method": "fp8", "bits": 8, "group_size": -1, "kv_cache": None, "mixture": (),
        "source": str(source), "output": str(output),
        "linears": sorted(name.removesuffix(".weight") for name in names_of(source)), "ignored": ["lm_head"],
    }  # fmt: skip
    sys.path.insert(0, str(WORKER.parent))
    import data_free  # type: ignore[import-not-found]

    data_free.work(request, lambda _: None)


def theirs(source: Path, output: Path) -> None:
    """llm-compressor's own way."""
    from llmcompressor import model_free_ptq

    model_free_ptq(str(source), str(output), scheme="FP8_DYNAMIC", ignore=["lm_head"], max_workers=1, device="cpu")


def cast(source: Path, output: Path) -> None:
    """Read, convert without scales, write."""
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (output / path.name).open("wb") as writer:
            piece = bytearray(PIECE)
            while count := reader.readinto(piece):
                numbers = torch.frombuffer(piece[: count // 2 * 2], dtype=torch.bfloat16)
                writer.write(numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy().data)


def names_of(folder: Path) -> Iterator[str]:
    """The names of all tensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            yield from stored.keys()


def digest_of(folder: Path) -> str:
    """A digest of all tensors, by name."""
    total = hashlib.sha256()
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            places |= dict.fromkeys(stored.keys(), path)
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as stored:
            tensor = stored.get_tensor(name)
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.view(torch.uint8).numpy().data)
    return total.hexdigest()


def synchronize(folder: Path) -> None:
    """Wait until everything in the folder is on disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
