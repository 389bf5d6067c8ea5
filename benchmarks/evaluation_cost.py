"""What it costs to evaluate FP16 and two schemes as served, against three separate runs of lm_eval on the same tasks.

    SLIPWAY_HOME=… python benchmarks/evaluation_cost.py [--items 800]

Both sides answer the demo's suite (so many items of cloze, 595 documents) from the same three images, on the same
machine, one after the other, each model's server started anew. Ours is what `slipway release` does, the distributions
of 64 documents and FP16's second asking left out, for lm_eval has neither. Theirs is `lm_eval --model
local-completions` once with its defaults (one prompt a request, one request at a time) and once as a careful person
sets it (32 prompts a request, 4 at a time). Prints the seconds of every part and, against either, two ratios: all three
models, and FP16 reused (two of ours to three of theirs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import yaml

from containers.image import ImageRecord
from containers.sandbox import Server
from evals.asking import ENVIRONMENT
from evals.suite import TASKS
from pipeline import evaluation, stages
from pipeline.environments import ensure_environment
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, find, load
from pipeline.stages import Bench
from pipeline.store import Artifact, Making

Serve = Callable[[], AbstractContextManager[Server]]
SETTINGS = {"its defaults": "num_concurrent=1", "32 prompts, 4 requests": "num_concurrent=4"}
BATCHES = {"its defaults": "1", "32 prompts, 4 requests": "32"}


def main() -> None:
    """Evaluate three models in three ways and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=800, help="of cloze")
    parser.add_argument("--only", choices=["fp16", "awq", "gptq"], help="this model alone, and three times its seconds")
    arguments = parser.parse_args()
    items = arguments.items
    settings = Settings.read(os.environ)
    spec = _changed(load(find("demo", settings.models)), items)
    bench = Bench(spec, "awq", settings, lambda _: None)
    source = stages.source(bench)
    models: dict[str, tuple[Artifact, Serve, str]] = {
        "fp16": (source, lambda: evaluation.serve_source(bench, source), evaluation.FP16)
    }
    for scheme in [name for name in spec.schemes if arguments.only in {None, name}]:
        scheme_bench = Bench(spec, scheme, settings, lambda _: None)
        quantized = stages.quantized(scheme_bench, source)
        record = ImageRecord.model_validate(stages.image(scheme_bench, quantized).document("image.json"))
        models[scheme] = (quantized, _serve(bench, record.image_id), record.image_id)
    models = {name: model for name, model in models.items() if arguments.only in {None, name}}
    ours = _whole({name: _ours(bench, *model) for name, model in models.items()})
    _told("slipway", ours)
    with tempfile.TemporaryDirectory() as place, _client(settings, Path(place)) as client:
        _write_tasks(spec, items, Path(place))
        for words in SETTINGS:
            found = {name: _theirs(client, model[0], model[1], words, Path(place)) for name, model in models.items()}
            theirs = _whole(found)
            _told(f"lm_eval, {words}", theirs)
            whole = sum(ours.values()) / sum(theirs.values())
            reused = sum(value for name, value in ours.items() if name != "fp16") / sum(theirs.values())
            print(f"ratio to lm_eval, {words}: {whole:.2f}; FP16 reused: {reused:.2f}", flush=True)


def _whole(seconds: dict[str, float]) -> dict[str, float]:
    """Return the seconds of all three models; where one was measured, each is taken to be as long."""
    if len(seconds) > 1:
        return seconds
    (one,) = seconds.values()
    return dict.fromkeys(("fp16", "awq", "gptq"), one)


def _changed(spec: ModelSpec, items: int) -> ModelSpec:
    tasks = {**spec.evals.tasks, "cloze": spec.evals.tasks["cloze"].model_copy(update={"items": items})}
    evals = spec.evals.model_copy(update={"tasks": tasks, "divergence": None, "again": 0})
    return spec.model_copy(update={"evals": evals})


def _serve(bench: Bench, image_id: str) -> Serve:
    return lambda: evaluation.serve_image(bench, image_id)


def _told(what: str, seconds: dict[str, float]) -> None:
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"{what}: {parts}; together {sum(seconds.values()):.1f} s", flush=True)


def _ours(bench: Bench, checkpoint: Artifact, serve: Serve, image: str) -> float:
    with tempfile.TemporaryDirectory() as place:
        making = Making(folder=Path(place) / "files", scratch=Path(place) / "scratch")
        making.folder.mkdir()
        making.scratch.mkdir()
        started = time.monotonic()
        evaluation.answer(bench, making, checkpoint, serve, image)
        return time.monotonic() - started


@contextlib.contextmanager
def _client(settings: Settings, place: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give lm_eval's interpreter, with the one package beside it that its API models want and the pins leave out."""
    python = ensure_environment(ENVIRONMENT, settings, print) / "bin" / "python"
    extra = place / "extra"
    subprocess.run(
        ["uv", "pip", "install", "-q", "--python", str(python), "--target", str(extra), "tenacity"],
        check=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    yield python, {**settings.child_environment, "PYTHONPATH": str(extra), "HOME": str(place), "HF_HUB_OFFLINE": "1"}


def _write_tasks(spec: ModelSpec, items: int, place: Path) -> None:
    """Write our two tasks as lm_eval's command line reads them, over the same rows."""
    for name, task in spec.evals.tasks.items():
        assert task.data is not None  # noqa: S101 - the demo's are
        rows = task.data.read_text(encoding="utf-8").splitlines()
        wanted = items if name == "cloze" else len(rows)
        chosen = [rows[number * len(rows) // wanted] for number in range(wanted)]
        (place / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        definition = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}}}
        (place / f"plain_{name}.yaml").write_text(yaml.safe_dump({**definition, **data, "task": f"plain_{name}"}))


def _theirs(client: tuple[Path, dict[str, str]], checkpoint: Artifact, serve: Serve, words: str, place: Path) -> float:
    python, variables = client
    started = time.monotonic()
    with serve() as server:
        served = f"model=demo,base_url={server.url}/v1/completions,tokenizer={checkpoint.folder}"
        done = subprocess.run(
            [
                *(str(python), "-m", "lm_eval", "run", "--model", "local-completions"),
                *("--model_args", f"{served},tokenizer_backend=huggingface,max_length=1024,{SETTINGS[words]}"),
                *("--tasks", "plain_cloze,plain_perplexity", "--include_path", str(place)),
                *("--batch_size", BATCHES[words]),
            ],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(json.dumps(done.stderr[-2000:]))
    return time.monotonic() - started


if __name__ == "__main__":
    main()
