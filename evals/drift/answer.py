"""Worker: let one checkpoint answer a suite's questions through lm-eval, and keep every item's answer.

Request: `model` (a checkpoint's folder; its tokenizer alone where a server answers), `output` (an empty folder),
`suite` (`name`, `digest`, `seed`), `tasks` (name → `evals.drift.suite.TaskLimits.question`, with `data` for tasks of
ours);
optional: `server` (`address`, a file in which its URL appears; `name`; `image`; `engine`), `part` (from and to which
share of each task), `divergence` (`documents`, `max_tokens`, `top`), `again` (items a task to ask twice), `canary`
(prompts), `hub` (`endpoint`, `cache`), `device` (`cpu`, `cuda`). Writes `answers.json`
(`evals.drift.answers.Answers`), `runs.npz` (the hashed runs of words of every item, `evals.drift.overlap`) and, if
asked, `top.npz` (`evals.drift.divergence.Top`) and `canary.json` (`evals.load.canary.TakenCanary`).

Baseline and candidate go the same way. Without a server a quantized checkpoint's linear layers are unpacked once and
then computed in the baseline's precision: what differs between two answers is the weights alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import checkpoints  # type: ignore[import-not-found]  # beside this script
import images  # type: ignore[import-not-found]
import items as graded  # type: ignore[import-not-found]
import json_lines  # type: ignore[import-not-found]
import served  # type: ignore[import-not-found]
import tool_calls  # type: ignore[import-not-found]
from overlap import runs  # type: ignore[import-not-found]
from slipway_worker import WorkerError, main

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from evals.drift.asking import AnswersRequest, DivergenceRequest, HubAccess, TaskRequest
    from evals.drift.items import ItemAnswer, Repeated, Row, Sample

SCHEMA = "slipway.answers/2"
TASKS = Path(__file__).resolve().parent / "tasks"
_CONNECTIONS = 16  # to a server that is asked by chat
Report = Callable[[str], None]
AnswerRow = Callable[["Row"], "ItemAnswer"]


class TaskAnswers(TypedDict):
    """The answers to one task, as `evals.drift.answers` reads them."""

    kind: str
    data_sha256: str
    items: Sequence[ItemAnswer]
    again: NotRequired[Repeated]


def work(request: AnswersRequest, report: Report) -> dict[str, object]:
    """Answer every task of the request and write the answers; return a summary.

    Raises:
        WorkerError: for an unknown task, data that cannot be read or reached, a checkpoint that cannot be loaded, or a
            server that refuses or goes away.
    """
    started = time.monotonic()
    ours = {name: _rows(name, task) for name, task in request["tasks"].items() if task["ours"]}
    _prepare(request.get("hub"))
    report("loading lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        model, engine = _model(request, report)
        loaded = time.monotonic()
        tasks, shown = {}, {}
        for name, task in request["tasks"].items():
            tasks[name], shown[name], texts = _ask(model, name, task, request, ours.get(name), report)
            wanted = request.get("divergence")
            if wanted and texts and not (Path(request["output"]) / "top.npz").exists():
                _write_top(model, texts[: wanted["documents"]], wanted, Path(request["output"]))
        if prompts := request.get("canary"):
            _write_canary(model, prompts, Path(request["output"]))
    except served.ServerError as error:
        raise WorkerError(str(error)) from error
    suite = {"name": request["suite"]["name"], "digest": request["suite"]["digest"], "lm_eval": engine["lm-eval"]}
    server = request.get("server")
    image = server["image"] if server else None
    longest = model.longest if server else None
    answers = {
        "schema": SCHEMA, "engine": engine, "image": image, "longest": longest, "suite": suite, "tasks": tasks,
    }  # fmt: skip
    (Path(request["output"]) / "answers.json").write_text(json.dumps(answers, allow_nan=False) + "\n", encoding="utf-8")
    _write_runs(shown, Path(request["output"]))
    return {
        "items": {name: len(task["items"]) for name, task in tasks.items()},
        "load_seconds": loaded - started,
        "answer_seconds": time.monotonic() - loaded,
    }


def _prepare(hub: HubAccess | None) -> None:
    """Set the variables that the libraries read when they are imported; only lm-eval's own tasks need the hub."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "0" if hub else "1"}
    if hub:
        os.environ |= {"HF_ENDPOINT": hub["endpoint"], "HF_HOME": hub["cache"]}


def _model(request: AnswersRequest, report: Report) -> tuple[LM, dict[str, str | int]]:
    """Return the language model to ask, and what identifies the engine.

    Raises:
        WorkerError: the folder holds nothing that can be loaded.
    """
    lm_eval = {"lm-eval": metadata.version("lm-eval")}
    server, folder = request.get("server"), Path(request["model"])
    if server is None:
        model, engine = checkpoints.load(folder, request, report)
        return model, {**engine, **lm_eval}
    report("reading the questions while the server starts")
    try:
        address = Path(server["address"])
        template = server["chat_template"]
        model = served.model(
            lambda: served.wait_for_address(address), server["name"], folder, report, template and Path(template)
        )
    except (OSError, ValueError) as error:
        raise WorkerError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return model, {**server["engine"], **lm_eval}


def _rows(name: str, task: TaskRequest) -> tuple[list[Row], str]:
    """Read a task's data: the rows to ask, and the SHA-256 of the whole file.

    The rows are spread evenly over the file and sorted by the digest of their ids, so that any first part of them
    represents all.
    """
    path = Path(str(task["data"]))
    try:
        content = path.read_bytes()
        rows = json_lines.parse_rows(content, path, json_lines.SHAPES.get(_output_type(task), json_lines.NAMED))
    except (OSError, json_lines.JsonLinesError) as error:
        raise WorkerError(f"the data of `{name}`: {error}") from error
    wanted = task.get("items") or len(rows)
    if not 0 < wanted <= len(rows):
        raise WorkerError(f"`{name}` asks for {wanted} items; {path.name} has {len(rows)}")
    chosen = [rows[index * len(rows) // wanted] for index in range(wanted)]
    chosen.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    return chosen, hashlib.sha256(content).hexdigest()


def _cut(rows: list[Row], part: Sequence[float] | None) -> list[Row]:
    """Return the rows from one share of them to another, by `evals.statistics.sequential.prefixes`."""
    first, last = (max(1, round(len(rows) * share)) if share else 0 for share in part or (0.0, 1.0))
    return rows[first:last]


def _ask(
    model: LM,
    name: str,
    task: TaskRequest,
    request: AnswersRequest,
    ours: tuple[list[Row], str] | None,
    report: Report,
) -> tuple[TaskAnswers, list[list[str]], list[str]]:
    """Return a task's answers, the texts of each item that are compared for overlap, and those of a likelihood task.

    The last are all texts of the task, whichever part of it is asked, so that the same documents are kept.
    """
    began = time.monotonic()
    rows = _cut(ours[0], request.get("part")) if ours else None
    report(f"{name}: {len(rows) if rows else task.get('items') or 'all'} items")
    model.asking = name
    if rows and ours and (asked := _by_chat(model, name, task, is_served=bool(request.get("server")))):
        kind, question, answer = asked
        answered, repeated = _ask_by_chat(name, rows, answer, request, report)
        found: TaskAnswers = {"kind": kind, "data_sha256": ours[1], "items": answered}
        if repeated is not None:
            found["again"] = repeated
        report(f"{name}: answered in {time.monotonic() - began:.1f} s")
        return found, [[row[question]] for row in rows], []
    samples, kind = _evaluate(model, name, task, request, rows)
    answered = graded.items(kind, samples, task, rows, model)
    digest = ours[1] if ours else hashlib.sha256("".join(s["doc_hash"] for _, s in samples).encode()).hexdigest()
    found = {"kind": kind, "data_sha256": digest, "items": answered}
    again = request.get("again") or 0
    if again and kind != "text":
        # lm-eval's limit holds for each of a task's parts.
        limit = math.ceil(again / len({part for part, _ in samples}))
        model.asking = f"{name}, once more"
        second, _ = _evaluate(model, name, task, request, rows[:again] if rows else None, limit=limit)
        found["again"] = graded.again(answered, graded.items(kind, second, task, rows, model))
    report(f"{name}: answered in {time.monotonic() - began:.1f} s")
    texts = []
    if kind == "text":
        texts = [row["text"] for row in ours[0]] if ours else [graded.text(sample) for sample in samples]
    return found, [graded.shown(kind, sample) for sample in samples], texts


def _by_chat(model: LM, name: str, task: TaskRequest, *, is_served: bool) -> tuple[str, str, AnswerRow] | None:
    """How a task that lm-eval does not have is asked: the kind of its answers, the key of its question, and by what.

    Raises:
        WorkerError: it takes a server, and none answers.
    """
    asked = _output_type(task)
    if asked == images.TYPE:
        return "choice", "question", lambda row: images.answer(row, model.score_letters)
    if asked != tool_calls.TYPE:
        return None
    if not is_served:
        raise WorkerError(f"`{name}` asks for tool calls, which a server answers: `evals: {{engine: served}}`")
    return "generated", "prompt", lambda row: tool_calls.answer(row, model.chat)


def _ask_by_chat(
    name: str, rows: list[Row], answer: AnswerRow, request: AnswersRequest, report: Report
) -> tuple[list[ItemAnswer], Repeated | None]:
    """Return the answers to a task that lm-eval does not have, several at once where a server answers.

    Of the rows that are asked twice, also return what was answered otherwise.
    """
    from slipway_counting import Counter

    def asked(part: list[Row], words: str) -> list[ItemAnswer]:
        with (
            ThreadPoolExecutor(_CONNECTIONS if request.get("server") else 1) as pool,
            Counter(report, words, len(part), "items") as counter,
        ):
            answered = []
            for each in pool.map(answer, part):
                answered.append(each)
                counter.add()
        return answered

    answered, again = asked(rows, name), request.get("again") or 0
    return answered, graded.again(answered, asked(rows[:again], f"{name}, once more")) if again else None


def _output_type(task: TaskRequest) -> str | None:
    """Return the kind of request, in lm-eval's terms, of one of our own tasks."""
    kind = graded.configuration(TASKS / f"{task['task']}.yaml").get("output_type")
    return None if kind is None else str(kind)


def _evaluate(
    model: LM,
    name: str,
    task: TaskRequest,
    request: AnswersRequest,
    rows: list[Row] | None,
    limit: int | None = None,
) -> tuple[list[Sample], str]:
    """Run lm-eval over one task; return its samples with the part that each is of, in order, and their kind.

    Raises:
        WorkerError: lm-eval has no such task, or its data cannot be reached.
    """
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    options: dict[str, Any] = {
        "fewshot_random_seed": request["suite"]["seed"],
        "bootstrap_iters": 0,
        "log_samples": True,
    }
    if rows is None:
        manager = TaskManager(metadata=dict(task["metadata"]) or None)
        asked: list[Any] = [task["task"]]
        options |= {"num_fewshot": task["fewshot"], "limit": limit or task.get("items")}
        options |= {"apply_chat_template": task["chat_template"]}
    else:
        data = datasets.Dataset.from_list(rows)
        definition = TASKS / f"{task['task']}.yaml"
        manager = TaskManager(include_defaults=False)
        asked = [{**graded.configuration(definition), "custom_dataset": lambda **_: {"test": data}}]
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=asked, task_manager=manager, **options)
    except (OSError, ImportError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
        if rows is not None:
            raise
        told = " ".join(str(error).split())[:300]
        raise WorkerError(f"`{name}` (lm-eval's `{task['task']}`) cannot be asked: {told}") from error
    found: tuple[list[Sample], str] = graded.samples(results, task, name)
    return found


def _write_top(model: LM, texts: Sequence[str], wanted: DivergenceRequest, output: Path) -> None:
    """Write the likeliest tokens at every place of some texts."""
    import numpy as np

    model.asking = "distributions"
    longest = min(wanted["max_tokens"], model.max_length - 1)  # and the first token
    prompts = [[model.prefix_token_id, *model.tok_encode(text)[:longest]] for text in texts]
    found = model.top(prompts, wanted["top"])
    places = [(number, place) for number, prompt in enumerate(found) for place in range(len(prompt))]
    np.savez_compressed(
        output / "top.npz",
        tokens=np.array([tokens for prompt in found for tokens, _ in prompt], dtype=np.int32),
        log_probabilities=np.array([values for prompt in found for _, values in prompt], dtype=np.float32),
        document=np.array([number for number, _ in places], dtype=np.int32),
        position=np.array([place for _, place in places], dtype=np.int32),
    )


def _write_canary(model: LM, prompts: Sequence[str], output: Path) -> None:
    """Write the prompt after which the model is surest of its next token, and that token.

    Raises:
        WorkerError: after no prompt is its likeliest token printable text.
    """
    model.asking = "canary"
    # As the server encodes a prompt of text. The last place is the one after the prompt, whatever token stands there.
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    found = model.top([[*tokens, model.prefix_token_id] for tokens in encoded], 2)
    answered = []
    for prompt, tokens, places in zip(prompts, encoded, found, strict=True):
        (first, _), (likeliest, second) = places[-1]
        before, after = (
            model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (tokens, [*tokens, first])
        )
        expect = after.removeprefix(before)
        if after.startswith(before) and expect.strip() and expect.strip().isprintable() and "\ufffd" not in expect:
            answered.append({"prompt": prompt, "expect": expect, "margin": likeliest - second})
    if not answered:
        raise WorkerError("no prompt for a canary is answered with text: write `load.canary` into the model's file")
    chosen = max(answered, key=lambda each: each["margin"])
    (output / "canary.json").write_text(json.dumps(chosen, allow_nan=False) + "\n", encoding="utf-8")


def _write_runs(shown: Mapping[str, Sequence[Sequence[str]]], output: Path) -> None:
    """Write each task's hashed runs of words, and the place of the item that each is of."""
    import numpy as np

    arrays: dict[str, Any] = {}
    for name, items in shown.items():
        pairs = [(run, number) for number, texts in enumerate(items) for run in sorted(set().union(*map(runs, texts)))]
        arrays[f"{name}.runs"] = np.array([run for run, _ in pairs], dtype=np.uint64)
        arrays[f"{name}.items"] = np.array([number for _, number in pairs], dtype=np.int32)
    np.savez_compressed(output / "runs.npz", **arrays)


if __name__ == "__main__":
    main(work)
