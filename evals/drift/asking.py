"""Asking one checkpoint a suite's questions, in a worker: of a server that is started for it, or of lm-eval itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from containers.sandbox.engine_log import Failure
from containers.sandbox.sandbox import Server
from evals.drift.answers import Answers, read_answers
from evals.drift.divergence import FILE as TOP
from evals.drift.limits import DivergenceLimits
from evals.drift.overlap import pooled
from evals.drift.suite import AskedTasks
from evals.errors import AnswersError
from registry.atomic_write import write_atomically
from registry.progress import Progress

ENVIRONMENT = "lm-eval"
WORKER = Path(__file__).with_name("answer.py")
SERVED = "vllm-served"
RUNS = "runs.npz"
_POLL_SECONDS = 0.5

RunWorker = Callable[[str, Path, Mapping[str, Any], Path], dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Serving:
    """A server that is being started: where its URL appears, the model's name there, its image, and what it is."""

    address: Path
    name: str
    image: str
    engine: Mapping[str, str | int]


@dataclass(frozen=True)
class Hub:
    """Where lm-eval's own tasks find their data, and where it is kept."""

    endpoint: str
    cache: Path


def ask(
    checkpoint: Path,
    asked: AskedTasks,
    output: Path,
    *,
    run_worker: RunWorker,
    scratch: Path,
    progress: Progress,
    device: str | None = None,
    serving: Serving | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    divergence: DivergenceLimits | None = None,
    again: int = 0,
    hub: Hub | None = None,
) -> Answers:
    """Let ``checkpoint`` answer a suite and write ``answers.json`` and what goes with it into ``output``.

    Args:
        checkpoint: its folder; with ``serving`` only its tokenizer is read.
        asked: the suite, as `evals.drift.suite` has it.
        output: an empty folder.
        run_worker: runs the worker.
        scratch: an existing folder for the worker's own files.
        progress: told what is under way.
        device: ``cpu`` or ``cuda`` for lm-eval's HF backend; without one, the machine's best.
        serving: the server to ask, in place of that backend.
        part: from which share of each task to which; see `evals.statistics.sequential`.
        divergence: what to keep of next-token distributions.
        again: how many items of each graded task to ask twice.
        hub: where lm-eval's own tasks find their data.

    Raises:
        AnswersError: if the worker left answers that cannot be read.
    """
    progress(f"asking {', '.join(sorted(asked.tasks))} of {checkpoint.name}")
    request = {
        "model": checkpoint,
        "output": output,
        "suite": {"name": asked.name, "digest": asked.digest, "seed": asked.seed},
        "tasks": {name: {**task.question(name), "data": task.data} for name, task in sorted(asked.tasks.items())},
        "part": list(part),
        "divergence": None if divergence is None else divergence.model_dump(mode="json"),
        "again": again,
        "device": device,
        "hub": _hub(asked, hub),
        "server": None
        if serving is None
        else {
            "address": str(serving.address),
            "name": serving.name,
            "image": serving.image,
            "engine": dict(serving.engine),
        },
    }
    run_worker(ENVIRONMENT, WORKER, request, scratch)
    return read_answers(output)


def while_serving(serve: Callable[[], AbstractContextManager[Server]], address: Path, asking: Callable[[], T]) -> T:
    """Start ``asking`` and the server beside each other, hand over the server's URL in ``address``, return the answer.

    Importing lm-eval and reading the questions take as long as half a server's start, and need none of it.

    Raises:
        AnswersError: the server died or failed while it was asked; says why.
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
    return parts[0].model_copy(update={"tasks": tasks})


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


def _hub(asked: AskedTasks, hub: Hub | None) -> dict[str, str] | None:
    if hub is None or all(task.is_ours(name) for name, task in asked.tasks.items()):
        return None
    return {"endpoint": hub.endpoint, "cache": str(hub.cache)}
