"""An engine that fails says why, wherever it is asked: at its start, at its first answer, in the middle of a load test.

The server is a scripted one that fails as a real vLLM did, with what that wrote (`data/engine_logs`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import docker
import httpx
import load_evidence
import pytest
from click.testing import CliRunner
from docker.models.containers import Container
from image_record import image_record
from release_folder import FILES, make_release

from containers.engine.owner import HOME_LABEL, home_digest
from containers.errors import SandboxError, UnhealthyError
from containers.image.base import ensure_base
from containers.image.profile import load as load_profile
from containers.sandbox import sandbox
from evals.errors import AnswersError
from gateways import TOKENIZER
from homes import DEMO, Slipway, make_home
from pipeline.cli import main
from pipeline.commands.show import FAILED, REFUSED
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.answers import answer, serve_image
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from registry.promote import promote
from registry.signing import load_or_create_key
from server_image import server_image

MIB = 2**20
NO_KERNEL = "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"
NO_WEIGHTS = "RuntimeError: Cannot find any model weights with `noweights`"
Fail = Callable[[int, str], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def base(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    return ensure_base(engine, load_profile("vllm-cpu"), tmp_path_factory.mktemp("base"), print).reference


@pytest.fixture(scope="module")
def slipway(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    return Slipway(make_home(tmp_path_factory.mktemp("failures") / "home", machine))


@pytest.fixture(scope="module")
def failing(engine: docker.DockerClient, base: str) -> Fail:
    """Make an image of the scripted server that fails at its n-th completion, at 0 at its start, with such a log."""

    def make(number: int, log: str) -> AbstractContextManager[str]:
        return server_image(
            engine, base, "--name", "demo", "--fail-at", str(number), "--log", f"/logs/{log}.log", "--service-ms", "20"
        )

    return make


@pytest.fixture(autouse=True)
def _nothing_remains(engine: docker.DockerClient, slipway: Slipway) -> Iterator[None]:
    yield
    label = f"{HOME_LABEL}={home_digest(slipway.home)}"
    assert engine.containers.list(all=True, filters={"label": label}) == []
    assert engine.networks.list(filters={"label": label}) == []


def one_line(text: str, error: str, home: Path, before: str) -> None:
    """Hold a message to its form: one line, what happened, the error, and the log, which is there and tells it too."""
    assert len(text.splitlines()) == 1
    assert f"{before}: {error}; log: " in text
    log = re.search(r"log: (\S+\.container\.log)", text)
    assert log is not None
    assert Path(log[1]).parent == home / "logs"
    assert error in Path(log[1]).read_text()


def spec(**changes: Any) -> ModelSpec:  # noqa: ANN401 - of its `load`
    """The demo, loaded little."""
    demo = load(DEMO.with_suffix(".yaml"))
    little = {
        "request_rate": 8.0, "seconds": 4.0, "warmup_requests": 2, "input_tokens": 16, "output_tokens": 4,
        "start_timeout_s": 60.0, "request_timeout_s": 10.0, "capacity": None, "faults": False, "cpus": None,
        "canary": {"prompt": "once", "expect": "the"}, "memory": {"limit_bytes": "256MiB"}, **changes,
    }  # fmt: skip
    plan = type(demo.load).model_validate({**dict(demo.load), **little})
    return demo.model_copy(update={"load": plan})


def artifact(folder: Path, **documents: Any) -> Artifact:  # noqa: ANN401 - JSON
    folder.mkdir(exist_ok=True)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return Artifact("test", "key", "sha256:0", folder, {}, {}, {}, 0.0, 0.0, "", cached=True)


def test_at_its_start_of_an_evaluation(failing: Fail, slipway: Slipway) -> None:
    context = StageContext(spec(), "gptq", Settings.read(dict(slipway.variables)), print)
    with failing(0, "noweights") as image, pytest.raises(SandboxError) as raised:
        serve_image(context, image, artifact(slipway.home / "quantized")).__enter__()
    one_line(str(raised.value), NO_WEIGHTS, slipway.home, "ended with status 1 before it was healthy")


def test_at_its_first_answer(failing: Fail, slipway: Slipway) -> None:
    """It ends with status 0, as vLLM's API server does once the engine behind it is dead."""
    context = StageContext(spec(), "gptq", Settings.read(dict(slipway.variables)), print)
    source = dataclasses.replace(artifact(slipway.home / "source"), folder=DEMO / "model")

    def make(draft: ArtifactDraft) -> None:
        answer(context, draft, source, lambda: serve_image(context, image, source), image)

    with failing(1, "cpu_gemm_wna16") as image, pytest.raises(AnswersError) as raised:
        context.store.obtain(Recipe("answers", {}, {}, code="test"), make)
    one_line(str(raised.value), NO_KERNEL, slipway.home, "the server failed during evaluation")
    assert "again" not in str(raised.value)


@pytest.mark.parametrize(("number", "log", "when", "error"), [
    (0, "noweights", "the server never became healthy", NO_WEIGHTS),
    (1, "cpu_gemm_wna16", "during the load test", NO_KERNEL),
    (12, "cpu_gemm_wna16", "during the load test", NO_KERNEL),
])  # fmt: skip
def test_in_a_load_test(
    failing: Fail, slipway: Slipway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, log: str, when: str,
    error: str,
) -> None:  # fmt: skip
    """The command itself, on an image that somebody else made: the limits are missed, with the reason."""
    checkpoint = dataclasses.replace(artifact(tmp_path / "checkpoint"), folder=DEMO / "model")
    monkeypatch.setattr("pipeline.operations.load_tests.find", lambda *_: (spec(), "gptq"))
    with failing(number, log) as image:
        found = (checkpoint, artifact(tmp_path / "image", image=image_record(image_id=image).model_dump(mode="json")))
        monkeypatch.setattr("pipeline.operations.load_tests.artifacts", lambda _: found)
        done = CliRunner().invoke(main, ["load", "demo-gptq", "--json"], env=dict(slipway.variables))
    assert done.exit_code == REFUSED, done.output
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["status"] == "fail"
    assert verdict["reason"].startswith(when)
    one_line(verdict["reason"], error, slipway.home, "before it was healthy" if number == 0 else "the server failed")


def test_where_it_is_served(failing: Fail, slipway: Slipway, tmp_path: Path) -> None:
    settings = Settings.read(dict(slipway.variables))
    key = load_or_create_key(settings.signing_key)
    load = load_evidence.changed(load_evidence.measured(), {"memory": {"limit_bytes": 256 * MIB}})
    files = {
        **FILES,
        "tokenizer.json": (TOKENIZER / "tokenizer.json").read_bytes(),
        "release/evidence/load.json": load.format().encode(),
    }
    with failing(1, "cpu_gemm_wna16") as image:
        make_release(tmp_path, key, files=files, created="2026-11-24T01:02:01Z", image_id=image)
        promote(tmp_path, settings.tracking_uri, [key.public], key=key)
        done = slipway("serve", "demo-awq", "--port", "0", "--admin-port", "0", "--json")
    assert done.returncode == FAILED
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    one_line(told, NO_KERNEL, slipway.home, "the server failed")


def test_a_process_of_it_that_ran_out_of_memory_while_the_rest_lives(
    engine: docker.DockerClient, base: str, tmp_path: Path, slipway: Slipway
) -> None:
    """The kernel ends the largest process, and the one that listens is another."""
    fill = ["python3", "-c", "x = b'x' * (1 << 30)"]
    with (
        server_image(engine, base) as image,
        sandbox.serve(
            engine, image, name="slipway-test", home=slipway.home, memory_bytes=128 * MIB, progress=print
        ) as server,
    ):
        assert server.failed() is None
        assert isinstance(server.container, Container)
        assert server.container.exec_run(fill).exit_code == 137
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.died() is None
        deadline = time.monotonic() + 10
        while (failure := server.failed()) is None and time.monotonic() < deadline:
            time.sleep(0.2)
    assert failure is not None
    assert failure.ending.startswith("ran out of memory (limit 0.12 GiB")


def test_an_illegal_instruction_is_told_by_name(engine: docker.DockerClient, base: str, slipway: Slipway) -> None:
    """A real one, as of kernels that were built for another CPU."""
    with server_image(engine, base, "--illegal", "1") as image, pytest.raises(UnhealthyError) as raised:
        sandbox.serve(
            engine, image, name="slipway-test", home=slipway.home, memory_bytes=128 * MIB, progress=print
        ).__enter__()
    assert "ended with status 132 (an illegal instruction" in str(raised.value)
    assert "before it was healthy: Fatal Python error: Illegal instruction" in str(raised.value)
