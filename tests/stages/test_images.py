"""Questions about images asked by the real worker: of the HF backend, of a scripted server, and of vLLM.

The model has random weights and answers at chance: what is shown is that its answers are paired, and that they depend
on the image and on the tower that sees it, not how good they are.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from evals import builtin
from evals.drift.answers import Answers, ChoiceAnswers, TextAnswers, read_answers
from evals.drift.asking import StartingServer, ask
from evals.drift.drift_gate import judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import ChoicePairs, compare
from evals.drift.suite import IMAGES
from homes import DEMO, make_home
from pipeline.compatibility.scheme import Scheme
from pipeline.quantization.quantize import quantize
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.workers.environments import ensure_environment
from pipeline.workers.runner import Workers
from shared import made_once

ROWS = [json.loads(line) for line in builtin.FILES["images"].read_text().splitlines()]
TASKS: dict[str, Any] = {
    "images": {"data": "builtin:images", "items": 60, "max_drop": 0.05},
    "perplexity": {"data": "builtin:heldout", "items": 32, "max_increase": 0.1},
}
LIMITS = DriftLimits.model_validate(
    {
        "tasks": {
            name: {**task, "data": builtin.FILES[task["data"].removeprefix("builtin:")]} for name, task in TASKS.items()
        },
        "engine": "hf",
        "divergence": None,
    }
)
FP8 = {"method": "fp8", "backend": "llmcompressor"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Path:
    """A vision-language model of two layers."""
    script = Path(__file__).parents[1] / "make_vision_model.py"

    def make(folder: Path) -> None:
        python = ensure_environment("lm-eval", machine, print) / "bin" / "python"
        subprocess.run([python, script, DEMO / "model", folder], check=True, capture_output=True)

    return made_once(tmp_path_factory, "vision-model", make)


def asked(model: Path, machine: Settings, folder: Path, limits: DriftLimits = LIMITS, **more: Any) -> Answers:  # noqa: ANN401 - as `ask` takes it
    output, scratch = folder / "answers", folder / "scratch"
    for made in (output, scratch):
        made.mkdir(parents=True)
    where: dict[str, Any] = {"run_worker": Workers(machine, print), "scratch": scratch, "progress": print}
    return ask(model, limits, output, device="cpu", **where, **more)


@pytest.fixture(scope="module")
def fp16(tiny: Path, machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers of the model as it is, some of them twice."""
    return asked(tiny, machine, tmp_path_factory.mktemp("fp16"), again=20)


def letters(answers: Answers) -> list[tuple[float | None, ...]]:
    """The log-likelihoods of the letters of each question about an image."""
    task = answers.tasks["images"]
    assert isinstance(task, ChoiceAnswers)
    return [item.log_likelihoods for item in task.items]


def texts(answers: Answers) -> list[float | None]:
    task = answers.tasks["perplexity"]
    assert isinstance(task, TextAnswers)
    return [item.log_likelihood for item in task.items]


def test_answers_depend_on_the_image_and_repeat_themselves(fp16: Answers) -> None:
    task = fp16.tasks["images"]
    assert isinstance(task, ChoiceAnswers)
    assert task.again is not None
    assert (task.again.items, task.again.flips, task.again.largest) == (20, 0, 0)
    same = [item.log_likelihoods for item in task.items if item.question == "How many crosses are in the picture?"]
    assert len(same) > 2
    assert len(set(same)) == len(same)


def test_a_quantized_model_is_paired_with_fp16(fp16: Answers, tiny: Path, machine: Settings, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    for made in (quantized, tmp_path / "scratch"):
        made.mkdir()
    record = quantize(
        tiny, None, 1, 16, Scheme.model_validate(FP8), quantized, Workers(machine, print), tmp_path / "scratch", print
    )
    assert record.layers == 14  # seven linears in each of the decoder's layers, and none of the tower
    drift = compare(fp16, asked(quantized, machine, tmp_path / "fp8"))
    pairs = drift.tasks["images"]
    assert isinstance(pairs, ChoicePairs)
    assert (pairs.items, pairs.baseline_missing, pairs.candidate_missing) == (60, 0, 0)
    assert pairs.chance == 0.25
    assert not drift.engine_differences
    verdict = judge(drift, LIMITS)
    assert (verdict.status, verdict.cause) == ("inconclusive", "baseline-at-chance")
    assert "`images`" in verdict.reason


def test_a_damaged_tower_is_seen_by_images_alone(fp16: Answers, tiny: Path, machine: Settings, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(tiny, blind)
    tensors = load_file(blind / "model.safetensors")
    damaged = [name for name in tensors if "vision_model.encoder" in name]
    assert damaged
    save_file(
        {name: tensor * (name not in damaged) for name, tensor in tensors.items()},
        blind / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    found = asked(blind, machine, tmp_path)
    assert texts(found) == texts(fp16)
    assert not any(one == other for one, other in zip(letters(found), letters(fp16), strict=True))


# A server


@contextmanager
def serving(*, sees: bool) -> Iterator[str]:
    """A server that answers right by the image that it is shown, or always A."""
    right = {row["image"]: row["answer"] for row in ROWS}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "scripted", "max_model_len": 2048}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (message,) = body["messages"]
            image, text = message["content"]
            kind, _, data = image["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data).startswith(b"\x89PNG")
            assert text["text"].endswith("Answer with the letter only.")
            chosen = right[data] if sees else 0
            likeliest = [
                {"token": f"token_id:{token}", "logprob": -0.1 if place == chosen else -3.0}
                for place, token in enumerate(body["logprob_token_ids"])
            ]
            first = {"token": "token_id:0", "logprob": -0.05, "top_logprobs": likeliest}
            usage = {"prompt_tokens": 300, "completion_tokens": 1}
            self.answer({"choices": [{"logprobs": {"content": [first]}}], "usage": usage})

        def answer(self, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the worker opens many connections at once

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_server_that_no_longer_sees_is_refused(machine: Settings, tmp_path: Path) -> None:
    limits = DriftLimits.model_construct(
        tasks={IMAGES: LIMITS.tasks["images"].model_copy(update={"items": 240})}, divergence=None
    )
    answers = []
    for sees in (True, False):
        folder = tmp_path / str(sees)
        folder.mkdir()
        address = folder / "address"
        with serving(sees=sees) as url:
            address.write_text(url)
            server = StartingServer(address=str(address), name="scripted", image="fp16", engine={"name": "scripted"})
            answers.append(asked(DEMO / "model", machine, folder, limits, serving=server))
    drift = compare(*answers)
    pairs = drift.tasks[IMAGES]
    assert isinstance(pairs, ChoicePairs)
    assert (pairs.items, pairs.baseline_right, pairs.candidate_right) == (240, 240, 60)
    assert answers[0].longest == 301
    verdict = judge(drift, limits)
    assert verdict.status == "fail"
    assert "`images`" in verdict.reason


@pytest.mark.long
def test_vllm_is_asked_about_images(tiny: Path, machine: Settings, tmp_path: Path) -> None:
    """The same questions of the runtime for CPUs; its letters are within bfloat16 of the HF backend's."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    document |= {"model": "tiny", "source": {"uri": f"file:{tiny}"}, "schemes": {"fp8": FP8}}
    document |= {"evals": {"tasks": TASKS, "again": 20}}
    document["load"] |= {"prompts": "builtin:heldout"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    home = make_home(tmp_path / "home", machine)
    context = StageContext(load(path), "fp8", Settings.read(home), print)
    served = read_answers(run_until("baseline", context)["baseline"].folder)
    local = asked(tiny, machine, tmp_path / "local")
    differences = [
        abs((one or 0) - (other or 0))
        for here, there in zip(letters(served), letters(local), strict=True)
        for one, other in zip(here, there, strict=True)
    ]
    assert max(differences) < 0.3
    assert len(set(letters(served))) == 60
