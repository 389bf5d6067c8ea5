"""Turns lm-eval's samples, with its own scores, into the answers that are kept; imported by the worker."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

from slipway_worker import WorkerError

if TYPE_CHECKING:
    from evals.drift.asking import TaskRequest

KINDS = {
    "multiple_choice": "choice",
    "loglikelihood_rolling": "text",
    "generate_until": "generated",
}
_QUESTION, _ANSWER = 500, 200  # characters that are kept of an item for a person to look at
_COUNTED = 2000  # characters of a context that count for overlap
_JOINT = 400  # of them before a choice: more than any run of words that ends in it

Record = dict[str, Any]
"""A sample as lm-eval records it, by lm-eval's keys."""
Sample = tuple[str, Record]
"""The part of the task that a sample is of, and its record."""
Row = dict[str, Any]
"""A line of a task's data: of ours, or what the model file's author wrote."""


class ItemAnswer(TypedDict, total=False):
    """An item's answer, as `evals.drift.answers` reads it."""

    id: Required[str]
    asked: Required[str]
    bytes: int
    log_likelihood: float | None
    group: str
    question: str
    answer: int
    log_likelihoods: Sequence[float | None]
    right: bool | None
    choices: Sequence[str]
    tokens: int
    said: str


class Repeated(TypedDict):
    """What a model answered otherwise when it was asked the same items twice, as `evals.drift.answers` reads it."""

    items: int
    flips: int
    changed: int
    largest: float


def configuration(path: Path) -> dict[str, Any]:
    """Return the definition of a task of ours.

    Raises:
        WorkerError: there is none.
    """
    import yaml

    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise WorkerError(f"unknown task `{path.stem}`; there are {known}")
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def samples(results: Mapping[str, Any], task: TaskRequest, name: str) -> tuple[list[Sample], str]:
    """Return a task's samples of the wanted filter, part by part in order, and their kind.

    Raises:
        WorkerError: the task answers in a way that is not read here, or has no such filter.
    """
    found: list[Sample] = []
    kinds = set()
    for part in sorted(results["samples"]):
        kinds.add(results["configs"][part]["output_type"])
        records = results["samples"][part]
        filters = sorted({record["filter"] for record in records})
        wanted = task.get("filter") or filters[0]
        if wanted not in filters:
            raise WorkerError(f"`{name}` has no filter `{wanted}`; there are {', '.join(filters)}")
        kept = [record for record in records if record["filter"] == wanted]
        found += [(part, record) for record in sorted(kept, key=lambda record: int(record["doc_id"]))]
    if len(kinds) != 1 or not kinds <= KINDS.keys():
        raise WorkerError(f"`{name}` is of kind {', '.join(sorted(kinds))}; {', '.join(KINDS)} are read here")
    return found, KINDS[kinds.pop()]


def shown(kind: str, sample: Sample) -> list[str]:
    """Return the texts of an item that count for overlap: a document, or the end of a context with each choice.

    A context's end, since a prompt's examples are every item's.
    """
    _, record = sample
    if kind == "text":
        return [text(sample)]
    contexts = dict.fromkeys(str(arguments[0])[-_COUNTED:] for arguments in record["arguments"])
    choices = [str(arguments[0])[-_JOINT:] + str(arguments[1]) for arguments in record["arguments"] if kind == "choice"]
    return [*contexts, *choices]


def text(sample: Sample) -> str:
    """Return the document of a likelihood task's item."""
    return str(sample[1]["arguments"][0][0])


def items(
    kind: str,
    found: Sequence[Sample],
    task: TaskRequest,
    rows: Sequence[Row] | None,
    model: Any,  # noqa: ANN401 - lm-eval's
) -> list[ItemAnswer]:
    """Return a task's answers, as `evals.drift.answers` has them; ``rows`` are its lines of data, where it is ours."""
    return [item(kind, sample, task, rows[at] if rows else None, model) for at, sample in enumerate(found)]


def item(kind: str, sample: Sample, task: TaskRequest, row: Row | None, model: Any) -> ItemAnswer:  # noqa: ANN401 - lm-eval's
    """Return an item's answer, as `evals.drift.answers` has it; ``row`` is its line of data, where it is ours."""
    part, record = sample
    named: ItemAnswer = {
        "id": row["id"] if row else f"{part}/{record['doc_id']}",
        "asked": _digest(record["arguments"]),
    }
    if kind == "text":
        response = record["resps"][0]
        score = response[0] if isinstance(response, list | tuple) else response
        document = row["text"] if row else text(sample)
        return {**named, "bytes": max(1, len(document.encode("utf-8"))), "log_likelihood": _finite(score)}
    question: ItemAnswer = {
        **named,
        "group": "" if row else part,
        "question": str(record["arguments"][0][0])[-_QUESTION:],
    }
    if kind == "choice":
        choices = [str(arguments[1]).strip()[:_ANSWER] for arguments in record["arguments"]]
        scores = [_finite(response[0][0]) for response in record["resps"]]
        right = None if row else _right(record, task.get("metric") or "acc")
        answer = row["answer"] if row else _answer(record["target"], choices)
        return {**question, "answer": answer, "log_likelihoods": scores, "right": right, "choices": choices}
    said = str(record["resps"][0][0] if isinstance(record["resps"][0], list | tuple) else record["resps"][0])
    right = _right(record, task.get("metric") or "exact_match")
    tokens = len(model.tok_encode(said)) if said else 0
    return {**question, "right": right, "tokens": tokens, "said": said[:_ANSWER]}


def again(first: Sequence[ItemAnswer], second: Sequence[ItemAnswer]) -> Repeated:
    """Compare what one model answered when it was asked the same items twice."""
    known = {answer["id"]: answer for answer in first}
    pairs = [(known[answer["id"]], answer) for answer in second if answer["id"] in known]
    differences = [
        abs(one - other)
        for a, b in pairs
        for one, other in zip(a.get("log_likelihoods", ()), b.get("log_likelihoods", ()), strict=True)
        if one is not None and other is not None
    ]
    return {
        "items": len(pairs),
        "flips": sum(_hit(a) != _hit(b) for a, b in pairs),
        "changed": sum(_said(a) != _said(b) for a, b in pairs),
        "largest": max(differences, default=0.0),
    }


def _said(answer: ItemAnswer) -> Any:  # noqa: ANN401 - a number or text
    scores = answer.get("log_likelihoods")
    if scores is None:
        return answer["said"]
    known = [score for score in scores if score is not None]
    return scores.index(max(known)) if len(known) == len(scores) else None


def _hit(answer: ItemAnswer) -> bool | None:
    if answer["right"] is not None or "answer" not in answer:
        return answer["right"]
    return bool(_said(answer) == answer["answer"])


def _right(record: Record, metric: str) -> bool:
    value = record.get(metric)
    if value not in (0, 1):
        raise WorkerError(f"`{metric}` of an item is {value!r}: only what is right or wrong can be paired here")
    return bool(value)


def _answer(target: Any, choices: Sequence[str]) -> int:  # noqa: ANN401 - as the task has it
    """Return the index of the right choice; lm-eval's tasks give it as a number, its digits, or the choice itself."""
    text = str(target).strip()
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    return choices.index(text[:_ANSWER]) if text[:_ANSWER] in choices else 0


def _digest(arguments: Sequence[Any]) -> str:
    """Return a digest of a prompt with its examples and choices."""
    return hashlib.sha256(json.dumps(arguments, default=str).encode()).hexdigest()[:16]


def _finite(value: float) -> float | None:
    """Return None for a number that is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
