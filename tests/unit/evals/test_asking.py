"""Asking of a server that starts beside the worker: its address is handed over, and whatever dies is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from containers.errors import SandboxError
from containers.sandbox.engine_log import Failure
from containers.sandbox.memory import MemorySampler
from containers.sandbox.sandbox import Server
from evals.drift import images, served
from evals.drift.answers import Answers
from evals.drift.asking import RUNS, in_looks, while_serving
from evals.drift.overlap import runs
from evals.drift.served import ServerError, Whole, wait_for_address
from evals.errors import AnswersError
from registry import counting


def server(died: Failure | None = None, failing: Failure | None = None) -> Server:
    sampler = MemorySampler(lambda: None, "nowhere")
    return Server("http://127.0.0.1:9", 1.0, 2**30, None, sampler, lambda: died, failing=lambda: failing)


@contextmanager
def serving(died: Failure | None = None, seconds: float = 0.0, failing: Failure | None = None) -> Iterator[Server]:
    time.sleep(seconds)
    yield server(died, failing)


def test_the_worker_starts_at_once_and_gets_the_address_when_there_is_one(tmp_path: Path) -> None:
    address, began = tmp_path / "address", []

    def asking() -> str:
        began.append(address.exists())
        return wait_for_address(address, patience=10)

    assert while_serving(lambda: serving(seconds=0.3), address, asking) == "http://127.0.0.1:9"
    assert began == [False]


def test_a_server_that_does_not_start_ends_the_worker_and_is_the_error(tmp_path: Path) -> None:
    address, told = tmp_path / "address", []

    @contextmanager
    def refusing() -> Iterator[Server]:
        raise SandboxError("the server ended with status 1 before it was healthy")
        yield server()

    def asking() -> None:
        with pytest.raises(ServerError, match="did not start: the server ended") as caught:
            wait_for_address(address, patience=10)
        told.append(str(caught.value))

    with pytest.raises(SandboxError, match="before it was healthy"):
        while_serving(refusing, address, asking)
    assert told


def test_a_server_that_dies_under_way_is_named_and_not_what_it_left_behind(tmp_path: Path) -> None:
    def asking() -> None:
        raise ServerError("the server went away: connection reset")

    with pytest.raises(AnswersError) as raised:
        while_serving(lambda: serving(Failure("ran out of memory")), tmp_path / "address", asking)
    assert str(raised.value) == "the server ran out of memory during evaluation"


def test_an_engine_that_is_dead_behind_a_server_that_answers_500_is_named_with_its_first_error(tmp_path: Path) -> None:
    def asking() -> None:
        raise ServerError("the server answered 500: EngineCore encountered an issue")

    failing = Failure("failed", "AttributeError: no such kernel", Path("/home/logs/x.log"))
    with pytest.raises(AnswersError) as raised:
        while_serving(lambda: serving(failing=failing), tmp_path / "address", asking)
    told = "the server failed during evaluation: AttributeError: no such kernel; log: /home/logs/x.log"
    assert str(raised.value) == told


def test_to_try_again_is_proposed_only_where_it_can_help(tmp_path: Path) -> None:
    def asking() -> None:
        raise ServerError("the server went away: connection reset")

    with pytest.raises(AnswersError, match=r"; evaluate again$"):
        while_serving(
            lambda: serving(Failure("was removed by someone else", may_pass=True)), tmp_path / "address", asking
        )


def test_a_worker_s_own_error_is_its_own(tmp_path: Path) -> None:
    def asking() -> None:
        raise ServerError("the server answered 400: no such model")

    with pytest.raises(ServerError, match="400"):
        while_serving(serving, tmp_path / "address", asking)


def test_an_item_is_answered_when_all_of_its_prompts_are() -> None:
    told: list[int] = []
    whole = Whole(["a", "a", "b", "c", "c", "c"], told.append)
    for numbers in ([0, 3], [1, 2], [4], [5]):
        whole(numbers)
    assert told == [0, 2, 0, 1]


TEXTS = [f"item {number} " + " ".join(f"word{number}x{word}" for word in range(12)) for number in range(10)]


def part(share: tuple[float, float], folder: Path) -> Answers:
    """Ten documents, asked in parts, with what a worker leaves beside."""
    numbers = range(round(10 * share[0]), round(10 * share[1]))
    items = [{"id": f"d{number}", "bytes": 10, "log_likelihood": -float(number)} for number in numbers]
    hashes = [(run, place) for place, number in enumerate(numbers) for run in sorted(runs(TEXTS[number]))]
    arrays = {
        "text.runs": np.array([run for run, _ in hashes], dtype=np.uint64),
        "text.items": np.array([place for _, place in hashes]),
    }
    np.savez(folder / RUNS, allow_pickle=False, **arrays)
    if share[0] == 0:
        (folder / "top.npz").write_bytes(b"distributions")
    return Answers.model_validate(
        {
            "schema": "slipway.answers/2", "engine": {}, "suite": {"name": "s", "digest": "d", "lm_eval": "0"},
            "tasks": {"text": {"kind": "text", "data_sha256": "x", "items": items}},
        }
    )  # fmt: skip


def test_looks_stop_when_the_verdict_is_clear_and_keep_all_that_was_answered(tmp_path: Path) -> None:
    from evals.drift.answers import read_answers  # noqa: PLC0415 - beside its one use
    from evals.drift.asking import overlapping  # noqa: PLC0415 - the same

    scratch, output, seen = tmp_path / "scratch", tmp_path / "output", []
    scratch.mkdir()
    output.mkdir()

    def is_clear(answers: Answers, first: Path, fraction: float) -> bool:
        assert (first / "top.npz").exists()
        seen.append((len(answers.tasks["text"].items), fraction))
        return fraction >= 0.5

    assert in_looks((0.2, 0.5, 1.0), part, is_clear, scratch, output) == 0.5
    assert seen == [(2, 0.2), (5, 0.5)]
    answers = read_answers(output)
    assert [item.id for item in answers.tasks["text"].items] == ["d0", "d1", "d2", "d3", "d4"]
    assert (output / "top.npz").read_bytes() == b"distributions"
    assert overlapping(answers, output, [TEXTS[3]]) == {"text": ["d3"]}


def test_without_a_clear_look_everything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "output").mkdir()
    asked = in_looks((0.5, 1.0), part, lambda *_: False, tmp_path / "scratch", tmp_path / "output")
    assert asked == 1.0


def test_items_of_a_groups_tasks_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval numbers the items of each task of a group from 0 on, and asks for all of them at once."""
    told: list[str] = []

    class TemplateLM:
        def loglikelihood(self, requests: Sequence[object], _disable_tqdm: bool) -> list[tuple[float, bool]]:
            asked: list[tuple[float, bool]] = self._loglikelihood_tokens([("", [1], [2])] * len(requests))  # type: ignore[attr-defined]
            return asked

    def answered(_prompts: object, _ask: object, whole: Whole) -> list[tuple[float, bool]]:
        whole(range(8))
        return [(0.0, True)] * 8

    tokenizers = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "images", images)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=tokenizers))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(utils=None))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", SimpleNamespace(TemplateLM=TemplateLM))
    monkeypatch.setitem(sys.modules, "slipway_counting", counting)
    monkeypatch.setattr(counting, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(served, "_in_order", answered)
    model = served.model(str, "served", tmp_path, told.append)
    model.max_length = 100
    model.loglikelihood([SimpleNamespace(task_name=task, doc_id=item) for task in "ab" for item in (0, 0, 1, 1)])
    assert told[-1].startswith("asking: 4 of 4 items")


def test_chat_is_put_into_the_template_that_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(chat_template="the tokenizer's own")

    template = tmp_path / "chat.jinja"
    template.write_text("the model file's")
    tokenizers = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "images", images)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=tokenizers))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(utils=None))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", SimpleNamespace(TemplateLM=object))
    monkeypatch.setitem(sys.modules, "slipway_counting", counting)
    own, replaced = (served.model(str, "served", tmp_path, print, given) for given in (None, template))
    assert own.tokenizer.chat_template == "the tokenizer's own"
    assert replaced.tokenizer.chat_template == "the model file's"
