"""Ask one checkpoint a suite's questions in a worker: through a server that is started for it, or in lm-eval itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np

from containers.sandbox.engine_log import Failure
from containers.sandbox.sandbox import Server
from evals.drift.answers import Answers, read_answers
from evals.drift.divergence import FILE as TOP
from evals.drift.limits import DivergenceLimits
from evals.drift.overlap import pooled
from evals.drift.suite import AskedTasks, Question
from evals.errors import AnswersError
from evals.workers import RunWorker
from registry.atomic_write import write_atomically
from registry.progress import Progress

ENVIRONMENT = "lm-eval"
WORKER = Path(__file__).with_name("answer.py")
SERVED = "vllm-served"
RUNS = "runs.npz"
_POLL_SECONDS = 0.5

T = TypeVar("T")


class StartingServer(TypedDict):
    """A server that is being started: the file in which its URL appears, the model's name, its image and its engine.

    ``chat_template`` is the file of a template in place of the tokenizer's own.
    """

    address: str
    name: str
    image: str
    engine: Mapping[str, str | int]
    chat_template: str | None


class HubAccess(TypedDict):
    """The hub from which lm-eval's own tasks download their data, and the folder in which it is kept."""

    endpoint: str
    cache: str


class SuiteRequest(TypedDict):
    """The suite that is asked."""

    name: str
    digest: str
    seed: int


class TaskRequest(TypedDict):
    """One task of the suite, as `evals.drift.suite.Question` has it; ``data`` is the file of one of our tasks."""

    task: str
    ours: bool
    items: int | None
    metric: str | None
    filter: str | None
    fewshot: int | None
    chat_template: bool
    metadata: Mapping[str, str]
    data: Path | str | None


class DivergenceRequest(TypedDict):
    """Which next-token distributions are kept, as `evals.drift.limits.DivergenceLimits` has it."""

    documents: int
    max_tokens: int
    top: int


class AnswersRequest(TypedDict):
    """The request to the worker `evals.drift.answer`, which says what each key means."""

    model: Path | str
    output: Path | str
    suite: SuiteRequest
    tasks: Mapping[str, TaskRequest]
    part: tuple[float, float]
    divergence: DivergenceRequest | None
    again: int
    canary: Sequence[str]
    device: str | None
    hub: HubAccess | None
    server: StartingServer | None


def ask(
    checkpoint: Path,
    asked: AskedTasks,
    output: Path,
    *,
    run_worker: RunWorker,
    scratch: Path,
    progress: Progress,
    device: str | None = None,
    serving: StartingServer | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    divergence: DivergenceLimits | None = None,
    again: int = 0,
    canary: Sequence[str] = (),
    hub: HubAccess | None = None,
) -> Answers:
    """Let ``checkpoint`` answer a suite and write ``answers.json`` and what goes with it into ``output``.

    Args:
        checkpoint: its folder; with ``serving`` only its tokenizer is read.
        asked: the suite, as `evals.drift.suite` has it.
        output: an empty folder.
        run_worker: runs the worker.
        scratch: an existing folder for the worker's own files.
        progress: called with a line for each step.
        device: ``cpu`` or ``cuda`` for lm-eval's HF backend; without one, the machine's best.
        serving: the server to ask, in place of that backend.
        part: from which share of each task to which; see `evals.statistics.sequential`.
        divergence: which next-token distributions to keep.
        again: how many items of each graded task to ask twice.
        canary: prompts; the answer that the checkpoint is surest of goes into ``canary.json`` (`evals.load.canary`).
        hub: where lm-eval's own tasks find their data.

    Raises:
        AnswersError: if the worker left answers that cannot be read.
    """
    progress(f"asking {', '.join(sorted(asked.tasks))} of {checkpoint.name}")
    ours = all(task.is_ours(name) for name, task in asked.tasks.items())
    request = AnswersRequest(
        model=checkpoint,
        output=output,
        suite=SuiteRequest(name=asked.name, digest=asked.digest, seed=asked.seed),
        tasks={name: _task(task.question(name), task.data) for name, task in sorted(asked.tasks.items())},
        part=part,
        divergence=None if divergence is None else _distributions(divergence),
        again=again,
        canary=canary,
        device=device,
        hub=None if ours else hub,
        server=serving,
    )
    run_worker(ENVIRONMENT, WORKER, request, scratch)
    return read_answers(output)


def _task(question: Question, data: Path | None) -> TaskRequest:
    return TaskRequest(
        task=question.task,
        ours=question.ours,
        items=question.items,
        metric=question.metric,
        filter=question.filter,
        fewshot=question.fewshot,
        chat_template=question.chat_template,
        metadata=question.metadata,
        data=data,
    )


def _distributions(wanted: DivergenceLimits) -> DivergenceRequest:
    return DivergenceRequest(documents=wanted.documents, max_tokens=wanted.max_tokens, top=wanted.top)


def while_serving(serve: Callable[[], AbstractContextManager[Server]], address: Path, asking: Callable[[], T]) -> T:
    """Start ``asking`` and the server at the same time, write the server's URL to ``address``, and return the answer.

    Importing lm-eval and reading the questions take half as long as the start of a server, and do not need it.

    Raises:
        AnswersError: the server died or failed during the evaluation; the message says why.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asking)
        try:
            with serve() as server:
                _announce(address, server.url)
                return _answer(future, server)
        except BaseException as error:  # an interrupt among them: the worker waits for an address
            if not address.exists():
                _announce(address, f"the server did not start: {error}")
            raise


def _announce(address: Path, text: str) -> None:
    write_atomically(address, text)


def _answer(future: Future[T], server: Server) -> T:
    """Wait for the answer; a server that failed is named, with its reason, rather than what the worker saw of it."""
    while True:
        try:
            return future.result(_POLL_SECONDS)
        except NotYet:
            if future.done():
                raise
            failure = server.died()
            if failure is not None:
                raise _stopped(failure) from None
        except Exception as error:  # whatever the worker met: a server that ended explains it better
            failure = server.failed()
            if failure is not None:
                raise _stopped(failure) from error
            raise


def _stopped(failure: Failure) -> AnswersError:
    again = "; evaluate again" if failure.may_pass else ""
    return AnswersError(f"the server {failure.told(' during evaluation')}{again}")


def in_looks(
    fractions: Sequence[float],
    ask_part: Callable[[tuple[float, float], Path], Answers],
    is_clear: Callable[[Answers, Path, float], bool],
    scratch: Path,
    output: Path,
) -> float:
    """Ask a suite in growing parts until the verdict is clear; return the part of it that was asked.

    ``ask_part`` asks from one share of each task to another into a folder. ``is_clear`` sees all answers so far, the
    folder of the first part, which holds the distributions, and the share. What was answered is written to ``output``.
    """
    before, parts, first = 0.0, [], scratch / "look-1"
    for number, fraction in enumerate(fractions, start=1):
        folder = scratch / f"look-{number}"
        folder.mkdir()
        parts.append((ask_part((before, fraction), folder), folder))
        before = fraction
        answers = _joined([answered for answered, _ in parts])
        if fraction == fractions[-1] or is_clear(answers, first, fraction):
            break
    (output / "answers.json").write_text(answers.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
    if (first / TOP).exists():
        shutil.copyfile(first / TOP, output / TOP)
    _join_runs([folder for _, folder in parts], [answered for answered, _ in parts], output / RUNS)
    return before


def _joined(parts: Sequence[Answers]) -> Answers:
    """Return the answers of consecutive parts as one."""
    tasks = {
        name: task.model_copy(update={"items": tuple(item for part in parts for item in part.tasks[name].items)})
        for name, task in parts[0].tasks.items()
    }
    longest = [part.longest for part in parts if part.longest is not None]
    return parts[0].model_copy(update={"tasks": tasks, "longest": max(longest, default=None)})


def _join_runs(folders: Sequence[Path], parts: Sequence[Answers], output: Path) -> None:
    arrays: dict[str, Any] = {}
    for name in parts[0].tasks:
        runs, items, before = [], [], 0
        for folder, part in zip(folders, parts, strict=True):
            with np.load(folder / RUNS, allow_pickle=False) as found:
                runs.append(found[f"{name}.runs"])
                items.append(found[f"{name}.items"] + before)
            before += len(part.tasks[name].items)
        arrays |= {f"{name}.runs": np.concatenate(runs), f"{name}.items": np.concatenate(items)}
    np.savez_compressed(output, **arrays)


def overlapping(answers: Answers, folder: Path, calibration: Iterable[str]) -> dict[str, list[str]]:
    """Return the items of each task that share a run of words with the calibration text, by id.

    Raises:
        AnswersError: the answers come without their runs of words.
    """
    known = np.array(sorted(pooled(calibration)), dtype=np.uint64)
    path = folder / RUNS
    found: dict[str, list[str]] = {}
    try:
        with np.load(path, allow_pickle=False) as runs:
            for name, task in answers.tasks.items():
                shared = np.isin(runs[f"{name}.runs"], known)
                found[name] = [task.items[number].id for number in np.unique(runs[f"{name}.items"][shared])]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AnswersError(f"{path} cannot be read ({error}): evaluate the model again") from error
    return found
