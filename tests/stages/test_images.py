"""Questions about images asked by the real worker: of the HF backend, of a scripted server, and of vLLM.

The model is random but for its head, which is fitted to one question: what color the shapes have. What is shown is that
answers are paired, and that a damaged tower is seen, not how much a published model loses.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import chat_server
from safetensors.numpy import load_file, save_file

from checkout import CHECKOUT
from evals import builtin
from evals.builtin import make_images
from evals.builtin.make_images import Item, Shape
from evals.drift.answers import Answers, ChoiceAnswers, TextAnswers, read_answers
from evals.drift.asking import StartingServer, ask
from evals.drift.drift_gate import judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import ChoicePairs, compare
from evals.drift.suite import IMAGES, TaskLimits
from homes import DEMO, make_home
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import WorkerFailed
from pipeline.quantization.quantize import quantize
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.workers.environments import ensure_environment
from pipeline.workers.runner import Workers
from shared import made_once

ROWS = [json.loads(line) for line in builtin.FILES["images"].read_text().splitlines()]
COLORS = ("red", "green", "blue", "yellow")
TEXT = {"data": builtin.FILES["heldout"], "items": 32, "max_increase": 0.05}
FP8 = {"method": "fp8", "backend": "llmcompressor"}


def write_colors(path: Path, count: int) -> Path:
    """Write questions about the color of four to nine shapes of one color; a path of another name has others."""
    items = []
    for number in range(count):
        rng = random.Random(f"{path.name}:{number}")
        cells = rng.sample([(column, row) for column in range(3) for row in range(3)], rng.randint(4, 9))
        shapes = tuple(
            Shape(rng.choice(("circle", "square", "triangle", "cross")), COLORS[number % 4], cell) for cell in cells
        )
        items.append(Item(f"color-{number}", shapes, "What color are the shapes?", COLORS, number % 4))
    path.write_text("".join(json.dumps(make_images.row(item)) + "\n" for item in items))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Path:
    """A vision-language model of two layers that knows colors."""
    script = Path(__file__).parents[1] / "make_vision_model.py"
    rows = write_colors(tmp_path_factory.mktemp("fitted") / "fitted.jsonl", 80)

    def make(folder: Path) -> None:
        python = ensure_environment("lm-eval", machine, print) / "bin" / "python"
        command: list[str | Path] = [python, script, DEMO / "model", rows, folder]
        subprocess.run(command, env={"PYTHONPATH": str(CHECKOUT)}, check=True, capture_output=True)

    return made_once(tmp_path_factory, "vision-model", make)


@pytest.fixture(scope="session")
def limits(tmp_path_factory: pytest.TempPathFactory) -> DriftLimits:
    """Questions about colors, and text."""
    data = write_colors(tmp_path_factory.mktemp("asked") / "asked.jsonl", 120)
    colors = {"task": "images", "data": data, "max_drop": 0.05}
    return DriftLimits.model_validate(
        {"engine": "hf", "divergence": None, "tasks": {"colors": colors, "perplexity": TEXT}}
    )


def asked(model: Path, machine: Settings, folder: Path, limits: DriftLimits, **more: Any) -> Answers:  # noqa: ANN401 - as `ask` takes it
    output, scratch = folder / "answers", folder / "scratch"
    for made in (output, scratch):
        made.mkdir(parents=True)
    where: dict[str, Any] = {"run_worker": Workers(machine, print), "scratch": scratch, "progress": print}
    return ask(model, limits, output, device="cpu", **where, **more)


@pytest.fixture(scope="module")
def fp16(tiny: Path, limits: DriftLimits, machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers of the model as it is, some of them twice."""
    return asked(tiny, machine, tmp_path_factory.mktemp("fp16"), limits, again=20)


def colors(answers: Answers) -> ChoiceAnswers:
    task = answers.tasks["colors"]
    assert isinstance(task, ChoiceAnswers)
    return task


def texts(answers: Answers) -> list[float | None]:
    task = answers.tasks["perplexity"]
    assert isinstance(task, TextAnswers)
    return [item.log_likelihood for item in task.items]


def test_the_answers_follow_the_images_and_repeat_themselves(fp16: Answers) -> None:
    again = colors(fp16).again
    assert again is not None
    assert (again.items, again.flips, again.largest) == (20, 0, 0)
    assert sum(item.hit is True for item in colors(fp16).items) > 110


def test_a_quantized_model_that_still_sees_passes(
    fp16: Answers, tiny: Path, limits: DriftLimits, machine: Settings, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized"
    for made in (quantized, tmp_path / "scratch"):
        made.mkdir()
    record = quantize(
        tiny, None, 1, 16, Scheme.model_validate(FP8), quantized, Workers(machine, print), tmp_path / "scratch", print
    )
    assert record.layers == 14  # seven linears in each of the decoder's layers, and none of the tower
    found = asked(quantized, machine, tmp_path / "fp8", limits)
    drift = compare(fp16, found)
    pairs = drift.tasks["colors"]
    assert isinstance(pairs, ChoicePairs)
    assert (pairs.items, pairs.baseline_missing, pairs.candidate_missing, pairs.chance) == (120, 0, 0, 0.25)
    assert colors(found).items[0].log_likelihoods != colors(fp16).items[0].log_likelihoods
    assert judge(drift, limits).status == "pass"


def test_a_damaged_tower_is_refused_by_images_alone(
    fp16: Answers, tiny: Path, limits: DriftLimits, machine: Settings, tmp_path: Path
) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(tiny, blind)
    tensors = load_file(blind / "model.safetensors")
    damaged = [name for name in tensors if "vision_model" in name]
    assert damaged
    save_file(
        {name: tensor * (name not in damaged) for name, tensor in tensors.items()},
        blind / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    found = asked(blind, machine, tmp_path, limits)
    assert texts(found) == texts(fp16)
    verdict = judge(compare(fp16, found), limits)
    print(verdict.reason)
    assert verdict.status == "fail"
    assert "`colors`" in verdict.reason
    assert "`perplexity`" not in verdict.reason


# A server


@contextmanager
def serving() -> Iterator[str]:
    """A server that answers right by the image that it is shown."""
    right = {row["image"]: row["answer"] for row in ROWS}

    def choose(body: dict[str, Any]) -> dict[str, Any]:
        (message,) = body["messages"]
        image, text = message["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert text["text"].endswith("Answer with the letter only.")
        likeliest = [
            {"token": f"token_id:{token}", "logprob": -0.1 if place == right[data] else -3.0}
            for place, token in enumerate(body["logprob_token_ids"])
        ]
        first = {"token": "token_id:0", "logprob": -0.05, "top_logprobs": likeliest}
        return {"logprobs": {"content": [first]}}

    with chat_server(choose, tokens=1) as url:
        yield url


def test_a_server_is_shown_the_images_by_chat(machine: Settings, tmp_path: Path) -> None:
    task = TaskLimits(task=IMAGES, data=builtin.FILES["images"], max_drop=0.05)
    limits, address = DriftLimits.model_construct(tasks={IMAGES: task}, divergence=None), tmp_path / "address"
    with serving() as url:
        address.write_text(url)
        server = StartingServer(
            address=str(address), name="scripted", image="fp16", engine={"name": "scripted"}, chat_template=None
        )
        found = asked(DEMO / "model", machine, tmp_path, limits, serving=server)
    answered = found.tasks[IMAGES]
    assert isinstance(answered, ChoiceAnswers)
    assert [item.hit for item in answered.items] == [True] * 240
    assert {item.id for item in answered.items} == {row["id"] for row in ROWS}
    assert found.longest == 301  # 300 tokens of prompt, and one of answer


@pytest.mark.long
def test_an_image_that_cannot_be_decoded_is_one_clear_line(
    tiny: Path, limits: DriftLimits, machine: Settings, tmp_path: Path
) -> None:
    whole = base64.b64decode(ROWS[0]["image"])
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps({**ROWS[0], "image": base64.b64encode(whole[:200]).decode()}) + "\n")
    tasks = {"colors": limits.tasks["colors"].model_copy(update={"data": cut})}
    with pytest.raises(WorkerFailed, match="can't be shown an image: image file is truncated"):
        asked(tiny, machine, tmp_path, limits.model_copy(update={"tasks": tasks}))


@pytest.mark.long
def test_vllm_sees_as_the_hf_backend_does(
    fp16: Answers, tiny: Path, limits: DriftLimits, machine: Settings, tmp_path: Path
) -> None:
    """The same questions of the runtime for CPUs, in bfloat16."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    colored = {"task": "images", "data": f"file:{limits.tasks['colors'].data}", "max_drop": 0.05}
    text = {"data": "builtin:heldout", "items": 32, "max_increase": 0.05}
    document |= {"model": "tiny", "source": {"uri": f"file:{tiny}"}, "schemes": {"fp8": FP8}}
    document |= {"evals": {"tasks": {"colors": colored, "perplexity": text}, "again": 20}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    home = make_home(tmp_path / "home", machine)
    context = StageContext(load(path), "fp8", Settings.read(home), print)
    served = read_answers(run_until("baseline", context)["baseline"].folder)
    assert sum(item.hit is True for item in colors(served).items) > 110
    scores = [
        (one, other)
        for here, there in zip(colors(served).items, colors(fp16).items, strict=True)
        for one, other in zip(here.log_likelihoods, there.log_likelihoods, strict=True)
    ]
    assert len(scores) == 480
    assert all(one is not None and other is not None and abs(one - other) < 0.6 for one, other in scores)
