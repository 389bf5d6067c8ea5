"""Turns lm-eval's samples, with its own scores, into the answers that are kept; imported by the worker."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipway_worker import WorkerError

KINDS = {
    "multiple_choice": "choice",
    "loglikelihood_rolling": "text",
    "generate_until": "generated",
}
_QUESTION, _ANSWER = 500, 200  # characters that are kept of an item for a person to look at
_COUNTED = 2000  # characters of a context that count for overlap
_JOINT = 400  # of them before a choice: more than any run of words that ends in it

Sample = tuple[str, dict[str, Any]]  # the part of the task that it is of, and lm-eval's record


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


def samples(results: dict[str, Any], task: dict[str, Any], name: str) -> tuple[list[Sample], str]:
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
    task: dict[str, Any],
    rows: Sequence[dict[str, Any]] | None,
    model: Any,  # noqa: ANN401 - lm-eval's
) -> list[dict[str, Any]]:
    """Return a task's answers, as `evals.drift.answers` has them; ``rows`` are its lines of data, where it is ours."""
    return [item(kind, sample, task, rows[at] if rows else None, model) for at, sample in enumerate(found)]


def item(kind: str, sample: Sample, task: dict[str, Any], row: dict[str, Any] | None, model: Any) -> dict[str, Any]:  # noqa: ANN401 - lm-eval's
    """Return an item's answer, as `evals.drift.answers` has it; ``row`` is its line of data, where it is ours."""
    part, record = sample
    named = {"id": row["id"] if row else f"{part}/{record['doc_id']}", "asked": _digest(record["arguments"])}
    if kind == "text":
        response = record["resps"][0]
        score = response[0] if isinstance(response, list | tuple) else response
        document = row["text"] if row else text(sample)
        return {**named, "bytes": max(1, len(document.encode("utf-8"))), "log_likelihood": _finite(score)}
    question = {"group": "" if row else part, "question": str(record["arguments"][0][0])[-_QUESTION:]}
    if kind == "choice":
        choices = [str(arguments[1]).strip()[:_ANSWER] for arguments in record["arguments"]]
        scores = [_finite(response[0][0]) for response in record["resps"]]
        right = None if row else _right(record, task.get("metric") or "acc")
        answer = row["answer"] if row else _answer(record["target"], choices)
        return {**named, **question, "answer": answer, "log_likelihoods": scores, "right": right, "choices": choices}
    said = str(record["resps"][0][0] if isinstance(record["resps"][0], list | tuple) else record["resps"][0])
    right = _right(record, task.get("metric") or "exact_match")
    tokens = len(model.tok_encode(said)) if said else 0
    return {**named, **question, "right": right, "tokens": tokens, "said": said[:_ANSWER]}


def again(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def _said(answer: dict[str, Any]) -> Any:  # noqa: ANN401 - a number or text
    scores = answer.get("log_likelihoods")
    if scores is None:
        return answer["said"]
    return None if None in scores else scores.index(max(scores))


def _hit(answer: dict[str, Any]) -> bool | None:
    if answer["right"] is not None or "answer" not in answer:
        return answer["right"]  # type: ignore[no-any-return]
    return bool(_said(answer) == answer["answer"])


def _right(record: dict[str, Any], metric: str) -> bool:
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
