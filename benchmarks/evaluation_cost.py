"""What it costs to evaluate FP16 and two schemes as served, against three separate runs of lm_eval on the same tasks.

    SLIPWAY_HOME=… python benchmarks/evaluation_cost.py [--careful]

In a home in which the demo was released. Both sides answer the demo's suite (800 items of cloze, 595 documents) of the
same three models, on the same machine, one after the other, each model's server started anew. Ours is the stages
`baseline` and `drift` as they are, with the distributions, FP16's second asking, every layer's error and the
statistics; what the home keeps of them is dropped first. Theirs is `lm_eval --model local-completions` once with its
defaults (one prompt a request, one request at a time; not with ``--careful``) and once as a careful person sets it (32
prompts a request, 4 at a time). Prints the seconds of every part and, against either, two ratios: all three models, and
FP16 reused (two of ours to three of theirs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import yaml

from containers.image.build import ImageRecord
from containers.sandbox.sandbox import Server
from evals.drift.asking import ENVIRONMENT
from evals.drift.suite import TASKS
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, find, load
from pipeline.stages.answers import serve_image, serve_source
from pipeline.stages.context import StageContext
from pipeline.stages.run import run, run_until
from pipeline.stages.table import BASELINE, DRIFT
from pipeline.store.artifacts import Artifact, Store
from pipeline.workers.environments import ensure_environment

Serve = Callable[[], AbstractContextManager[Server]]
# Prompts a request, and requests at a time.
SETTINGS = {"its defaults": (1, 1), "32 prompts, 4 requests": (32, 4)}


def main() -> None:
    """Evaluate three models in three ways and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--careful", action="store_true", help="leave out lm_eval with its defaults")
    careful = parser.parse_args().careful
    settings = Settings.read(os.environ)
    spec = load(find("demo", settings.models))
    context = StageContext(spec, "awq", settings, lambda _: None)
    _forget(context.store, "answers", "layers", "drift")
    sources = run_until("adapters", context)
    baseline, ours = _timed(lambda: run(BASELINE, context, sources))
    seconds = {"fp16": ours}
    source, adapters = sources["source"], sources["adapters"]
    models: dict[str, tuple[Artifact, Serve]] = {"fp16": (source, lambda: serve_source(context, source, adapters))}
    for scheme in spec.schemes:
        of_scheme = StageContext(spec, scheme, settings, lambda _: None)
        made = {**run_until("image", of_scheme), "baseline": baseline}
        _, seconds[scheme] = _timed(partial(run, DRIFT, of_scheme, made))
        image_id = ImageRecord.model_validate(made["image"].document("image.json")).image_id
        models[scheme] = (made["quantized"], _serve(of_scheme, image_id, made["quantized"]))
    _told("slipway", seconds)
    with tempfile.TemporaryDirectory() as place, _client(settings, Path(place)) as client:
        _write_tasks(spec, Path(place))
        for words in list(SETTINGS)[careful:]:
            theirs = {name: _theirs(client, *model, words, Path(place)) for name, model in models.items()}
            _told(f"lm_eval, {words}", theirs)
            whole = sum(seconds.values()) / sum(theirs.values())
            reused = sum(value for name, value in seconds.items() if name != "fp16") / sum(theirs.values())
            print(f"ratio to lm_eval, {words}: {whole:.2f}; FP16 reused: {reused:.2f}", flush=True)


def _forget(store: Store, *made: str) -> None:
    for stage in made:
        for key, _ in store.records(stage):
            shutil.rmtree(store.root / stage / key)


def _timed(stage: Callable[[], Artifact]) -> tuple[Artifact, float]:
    started = time.monotonic()
    return stage(), time.monotonic() - started


def _serve(context: StageContext, image_id: str, checkpoint: Artifact) -> Serve:
    return lambda: serve_image(context, image_id, checkpoint)


def _told(what: str, seconds: dict[str, float]) -> None:
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"{what}: {parts}; together {sum(seconds.values()):.1f} s", flush=True)


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


def _write_tasks(spec: ModelSpec, place: Path) -> None:
    """Write our two tasks as lm_eval's command line reads them, over the same rows."""
    for name, task in spec.evals.tasks.items():
        assert task.data is not None  # noqa: S101 - the demo's are
        rows = task.data.read_text(encoding="utf-8").splitlines()
        wanted = task.items or len(rows)
        chosen = [rows[number * len(rows) // wanted] for number in range(wanted)]
        (place / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        definition = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}}}
        (place / f"plain_{name}.yaml").write_text(yaml.safe_dump({**definition, **data, "task": f"plain_{name}"}))


def _theirs(client: tuple[Path, dict[str, str]], checkpoint: Artifact, serve: Serve, words: str, place: Path) -> float:
    python, variables = client
    prompts, requests = SETTINGS[words]
    started = time.monotonic()
    with serve() as server:
        served = f"model=demo,base_url={server.url}/v1/completions,tokenizer={checkpoint.folder}"
        done = subprocess.run(
            [
                *(str(python), "-m", "lm_eval", "run", "--model", "local-completions"),
                *("--model_args", f"{served},tokenizer_backend=huggingface,max_length=1024,num_concurrent={requests}"),
                *("--tasks", "plain_cloze,plain_perplexity", "--include_path", str(place)),
                *("--batch_size", str(prompts)),
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
