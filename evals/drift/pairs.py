"""The drift gate's evidence: two models' answers to the same questions, paired item by item.

Pairing judges nothing. An item that one of the two did not answer with finite numbers is counted, never dropped
in silence: the gate must see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from containers.sandbox.kernels import ComputedOn
from evals.drift import divergence
from evals.drift.answers import (
    Again,
    Answers,
    AnyAnswers,
    AskedSuite,
    ChoiceAnswer,
    Count,
    GeneratedAnswer,
    TextAnswer,
    TextAnswers,
)
from evals.drift.divergence import Top
from evals.errors import AnswersError
from evals.statistics.paired import Flips
from evals.statistics.sequential import prefixes
from registry.errors import first_problem

EXAMPLES = 10

Graded = ChoiceAnswer | GeneratedAnswer
Answer = TypeVar("Answer", Graded, TextAnswer)
Document = TypeVar("Document")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Group(_Frozen):
    """One group of a task's items (mmlu's subject), counted."""

    items: Count
    """Items of the group that both models answered."""
    lost: Count
    """Items that only FP16 answered correctly."""
    gained: Count
    """Items that only the candidate answered correctly."""


class Example(_Frozen):
    """One flip for a person to read: the question, the correct answer, and both models' answers."""

    id: str
    """The item's id."""
    lost: bool
    """Whether only FP16 was right; else only the candidate was."""
    question: str
    """The item's question, shortened."""
    wanted: str
    """The correct answer."""
    baseline: str
    """FP16's answer."""
    candidate: str
    """The candidate's answer."""


class AnswerLengths(_Frozen):
    """The tokens of the two models' answers to the same items."""

    baseline: Count
    """Tokens of FP16's answers."""
    candidate: Count
    """Tokens of the candidate's answers."""


class ChoicePairs(_Frozen):
    """One graded task: counts over the ``items`` that both models answered, and the ids behind the flips.

    ``changed`` counts items where the two answered differently, right or wrong; ``chance`` is the expected accuracy of
    guessing. ``baseline_missing`` and ``candidate_missing`` count items of the union that the one did not answer.
    ``lost_at`` and ``gained_at`` are the flips' places in the order of asking, for interim analyses.
    """

    kind: Literal["choice"] = "choice"
    items: Count
    """Items that both models answered."""
    baseline_missing: Count
    """Items that only the candidate answered."""
    candidate_missing: Count
    """Items that only FP16 answered."""
    baseline_right: Count
    """Items that FP16 answered correctly."""
    candidate_right: Count
    """Items that the candidate answered correctly."""
    changed: Count
    """Items with different answers, correct or not."""
    chance: float
    """The expected accuracy of guessing."""
    lost_ids: tuple[str, ...]
    """Ids of the items that only FP16 answered correctly."""
    gained_ids: tuple[str, ...]
    """Ids of the items that only the candidate answered correctly."""
    lost_at: tuple[Count, ...] = ()
    """Positions of `lost_ids` in the order of evaluation, for interim analyses."""
    gained_at: tuple[Count, ...] = ()
    """Positions of `gained_ids` in the order of evaluation, for interim analyses."""
    groups: Mapping[str, Group] = {}
    """The counts by group, such as MMLU's subjects."""
    lengths: AnswerLengths | None = None
    """Tokens of the answers, for tasks with generated answers."""
    again: Again | None = None
    """How much FP16 differed from itself when it was evaluated twice."""
    examples: tuple[Example, ...] = ()
    """Some of the items that only one model answered correctly."""
    overlapping: tuple[str, ...] = ()
    """Ids of items whose text is also in the calibration text."""

    @property
    def length_ratio(self) -> float | None:
        """Tokens that the candidate wrote for one of FP16's; None where nothing was written."""
        return self.lengths.candidate / self.lengths.baseline if self.lengths and self.lengths.baseline else None


class DocumentPair(_Frozen):
    """One document's negative log-likelihood in nats under both models, and its length in UTF-8 bytes."""

    id: str
    """The document's id."""
    bytes: Annotated[int, Field(gt=0)]
    """The document's length in UTF-8 bytes."""
    baseline_nats: float
    """FP16's negative log-likelihood, in nats."""
    candidate_nats: float
    """The candidate's negative log-likelihood, in nats."""


class TextPairs(_Frozen):
    """One likelihood task: the documents that both models scored, and how many each did not."""

    kind: Literal["text"] = "text"
    documents: tuple[DocumentPair, ...]
    """The documents that both models scored."""
    baseline_missing: Count
    """Documents that only the candidate scored."""
    candidate_missing: Count
    """Documents that only FP16 scored."""
    overlapping: tuple[str, ...] = ()
    """Ids of documents whose text is also in the calibration text."""


class Divergence(_Frozen):
    """KL(FP16 || candidate) in nats over held-out text, and how often both think the same token likeliest.

    ``documents`` are each document's sum and number of positions; ``buckets`` are by position in the document;
    ``curve`` holds the quantiles of a position's KL from 0 to 1 in steps of a fiftieth, and 0.99.
    """

    top: Annotated[int, Field(gt=0)]
    """Number of likeliest tokens that are compared at each position."""
    documents: tuple[tuple[float, int], ...]
    """For each document the sum of the divergence, in nats, and the number of positions."""
    mean: float
    """Mean divergence of a position, in nats."""
    p99: float
    """99th percentile of the divergence of a position, in nats."""
    agreement: float
    """Share of positions at which both models have the same likeliest token."""
    covered: float
    """Probability that the compared tokens cover, on average."""
    buckets: tuple[Mapping[str, float], ...]
    """The divergence by position in the document."""
    curve: tuple[tuple[float, float], ...]
    """Quantiles of the divergence of a position: pairs of probability and nats."""


class Layer(_Frozen):
    """One quantized linear layer: the norm of its output's error over that of its output, on calibration text."""

    name: str
    """The layer's name in the checkpoint."""
    error: float
    """Norm of the output's error, relative to the norm of the output."""


_LAYERS = TypeAdapter(list[Layer])


class Comparison(_Frozen):
    """Two models' answers: every task's pairs, and the differences between the two engines, if any."""

    engine: Mapping[str, str | int]
    """Versions, device and precision of the engine that answered."""
    engine_differences: tuple[str, ...]
    """Differences between the engines of FP16 and of the candidate."""
    image: str | None = None
    """The id of the image that served the candidate."""
    suite: AskedSuite | None = None
    """The suite of tasks."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of the suite that was evaluated before the verdict was clear."""
    tasks: Mapping[str, Annotated[ChoicePairs | TextPairs, Field(discriminator="kind")]]
    """The paired answers, by task."""
    divergence: Divergence | None = None
    """KL divergence of the candidate from FP16 on held-out text."""


class Drift(Comparison):
    """What ``drift.json`` holds: FP16's answers compared with the candidate's, alone and with each adapter."""

    schema_: Annotated[Literal["slipway.drift/2"], Field(alias="schema")] = "slipway.drift/2"
    """The format of this document."""
    layers: tuple[Layer, ...] = ()
    """The error of each quantized layer on the calibration text."""
    computed_on: Mapping[Literal["FP16", "candidate"], ComputedOn] = {}
    """The hardware that served each of the two."""
    adapters: Mapping[str, Comparison] = {}
    """The answers of each LoRA adapter on FP16 compared with those on the candidate."""
    not_computed: tuple[str, ...] = ()
    """What vLLM quantizes while it runs, and the engine that answered here did not: the loss is that of the weights."""
    lacking: str | None = None
    """Why the candidate was not evaluated, if this machine lacks what its configuration needs."""
    uncompared: str | None = None
    """Why there is nothing to compare the candidate with, if there is no 16-bit model of it."""


def not_asked(lacking: str) -> Drift:
    """Return the evidence of a candidate that this machine can't serve."""
    return Drift(engine={}, engine_differences=(), tasks={}, lacking=lacking)


def not_compared(reason: str) -> Drift:
    """Return the evidence of a candidate without a 16-bit original."""
    return Drift(engine={}, engine_differences=(), tasks={}, uncompared=reason)


def compare(
    baseline: Answers,
    candidate: Answers,
    *,
    fraction: float = 1.0,
    overlapping: Mapping[str, Sequence[str]] | None = None,
    tops: tuple[Top | None, Top | None] = (None, None),
    layers: Sequence[Layer] = (),
    computed_on: Mapping[Literal["FP16", "candidate"], ComputedOn] | None = None,
    adapters: Mapping[str, Comparison] | None = None,
    not_computed: Sequence[str] = (),
) -> Drift:
    """Pair the two models' answers.

    ``fraction`` is the part of each task that the candidate was asked; ``overlapping`` names the items of each task
    that the calibration text touches; ``tops`` are the two models' likeliest tokens; ``computed_on`` is what served
    them; ``adapters`` are the pairs of each adapter; ``not_computed`` is what vLLM quantizes and the engine did not.

    Raises:
        AnswersError: if a task was asked over different data or by another suite, or the same item has two different
        keys
            or lengths.
    """
    both = (baseline, candidate)
    if baseline.suite != candidate.suite:
        asked = [f"`{side.suite.name}` ({side.suite.digest[:19]}, lm-eval {side.suite.lm_eval})" for side in both]
        raise AnswersError(f"FP16 answered suite {asked[0]}, the candidate {asked[1]}: evaluate both again")
    touched = overlapping or {}
    tasks: dict[str, ChoicePairs | TextPairs] = {}
    for name in sorted(baseline.tasks.keys() | candidate.tasks.keys()):
        first, second = baseline.tasks.get(name), candidate.tasks.get(name)
        if first and second and (first.kind, first.data_sha256) != (second.kind, second.data_sha256):
            raise AnswersError(f"the two models answered `{name}` over different data: evaluate both again")
        either = first or second
        if isinstance(either, TextAnswers):
            tasks[name] = _texts(name, _part(_texts_of(first), fraction), _texts_of(second), touched.get(name, ()))
        elif either is not None:
            again = first.again if first and not isinstance(first, TextAnswers) else None
            pairs = _graded(name, _part(_graded_of(first), fraction), _graded_of(second), touched.get(name, ()))
            tasks[name] = pairs.model_copy(update={"again": again})
    keys = sorted(baseline.engine.keys() | candidate.engine.keys())
    return Drift(
        engine=baseline.engine,
        engine_differences=(
            *(key for key in keys if baseline.engine.get(key) != candidate.engine.get(key)),
            *_different_precision(computed_on or {}),
        ),
        image=candidate.image,
        suite=candidate.suite,
        fraction=fraction,
        tasks=tasks,
        divergence=_diverged(*tops),
        layers=tuple(layers),
        computed_on=computed_on or {},
        adapters=adapters or {},
        not_computed=tuple(not_computed),
    )


def _different_precision(computed_on: Mapping[Literal["FP16", "candidate"], ComputedOn]) -> list[str]:
    """Differences between the two servers' arithmetic, beyond the scheme, as their engines report them."""
    told = [each.kernels for each in computed_on.values() if each.kernels is not None]
    return [
        f"kernels.{name}"
        for name in ("instruction_set", "compute_dtype")
        if len({getattr(kernels, name) for kernels in told}) > 1
    ]


def write_layers(layers: Sequence[Layer], folder: Path) -> None:
    """Write ``layers.json`` into ``folder``."""
    (folder / "layers.json").write_bytes(_LAYERS.dump_json(list(layers)))


def read_layers(folder: Path) -> list[Layer]:
    """Read ``layers.json`` in ``folder``.

    Raises:
        AnswersError: if it is missing or not what ``write_layers`` writes.
    """
    return _read(folder / "layers.json", _LAYERS, "measure the layers again")


def write_drift(drift: Drift, folder: Path) -> Path:
    """Write ``drift.json`` into ``folder`` and return its path."""
    path = folder / "drift.json"
    path.write_text(drift.model_dump_json(by_alias=True) + "\n", encoding="utf-8")
    return path


def read_drift(folder: Path) -> Drift:
    """Read ``drift.json`` in ``folder``.

    Raises:
        AnswersError: if it is missing or not what ``write_drift`` writes.
    """
    return _read(folder / "drift.json", TypeAdapter(Drift), "compare the answers again")


def _read(path: Path, form: TypeAdapter[Document], remedy: str) -> Document:
    try:
        return form.validate_json(path.read_bytes())
    except OSError as error:
        raise AnswersError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValidationError as error:
        raise AnswersError(f"{path}: {first_problem(error)}: {remedy}") from error


def _graded_of(answers: AnyAnswers | None) -> Sequence[Graded]:
    return () if answers is None or isinstance(answers, TextAnswers) else answers.items


def _texts_of(answers: AnyAnswers | None) -> Sequence[TextAnswer]:
    return answers.items if isinstance(answers, TextAnswers) else ()


def _part(items: Sequence[Answer], fraction: float) -> Sequence[Answer]:
    return items if fraction >= 1 or not items else items[: prefixes(len(items), [fraction])[0]]


def _graded(name: str, first: Sequence[Graded], second: Sequence[Graded], touched: Iterable[str]) -> ChoicePairs:
    pairs = _paired(name, first, second)
    whole = [(a, b) for a, b in pairs if a is not None and b is not None and None not in (a.hit, b.hit)]
    lost = [number for number, (a, b) in enumerate(whole) if a.hit and not b.hit]
    gained = [number for number, (a, b) in enumerate(whole) if b.hit and not a.hit]
    return ChoicePairs(
        items=len(whole),
        baseline_missing=sum(a is None or a.hit is None for a, _ in pairs),
        candidate_missing=sum(b is None or b.hit is None for _, b in pairs),
        baseline_right=sum(bool(a.hit) for a, _ in whole),
        candidate_right=sum(bool(b.hit) for _, b in whole),
        changed=sum(_choice(a) != _choice(b) for a, b in whole),
        chance=sum(_guess(a) for a, _ in whole) / len(whole) if whole else 1.0,
        lost_ids=tuple(whole[number][0].id for number in lost),
        gained_ids=tuple(whole[number][0].id for number in gained),
        lost_at=tuple(lost),
        gained_at=tuple(gained),
        groups=_groups(whole, lost, gained),
        lengths=_lengths(whole),
        examples=tuple(_example(*whole[number], lost=was) for number, was in _chosen(lost, gained)),
        overlapping=tuple(touched),
    )


def _choice(item: Graded) -> int | str | None:
    return item.chosen if isinstance(item, ChoiceAnswer) else item.said


def _guess(item: Graded) -> float:
    return 1 / len(item.log_likelihoods) if isinstance(item, ChoiceAnswer) else 0.0


def _groups(whole: Sequence[tuple[Graded, Graded]], lost: Sequence[int], gained: Sequence[int]) -> dict[str, Group]:
    """Count each group's items; nothing where all are of one."""
    names = [a.group for a, _ in whole]
    if len(set(names)) < 2:
        return {}
    return {
        name: Group(
            items=names.count(name),
            lost=sum(names[number] == name for number in lost),
            gained=sum(names[number] == name for number in gained),
        )
        for name in sorted(set(names))
    }


def _lengths(whole: Sequence[tuple[Graded, Graded]]) -> AnswerLengths | None:
    written = [
        (a.tokens, b.tokens) for a, b in whole if isinstance(a, GeneratedAnswer) and isinstance(b, GeneratedAnswer)
    ]
    if not written:
        return None
    return AnswerLengths(baseline=sum(a for a, _ in written), candidate=sum(b for _, b in written))


def _chosen(lost: Sequence[int], gained: Sequence[int]) -> list[tuple[int, bool]]:
    """Pick ten flips, half of either way where there are that many."""
    most = max(EXAMPLES // 2, EXAMPLES - len(gained))
    picked = [(number, True) for number in lost[:most]]
    return picked + [(number, False) for number in gained[: EXAMPLES - len(picked)]]


def _example(first: Graded, second: Graded, *, lost: bool) -> Example:
    wanted = (first if lost else second).said
    return Example(
        id=first.id,
        lost=lost,
        question=first.question,
        wanted=first.choices[first.answer] if isinstance(first, ChoiceAnswer) and first.choices else wanted,
        baseline=first.said,
        candidate=second.said,
    )


def _texts(name: str, first: Sequence[TextAnswer], second: Sequence[TextAnswer], touched: Iterable[str]) -> TextPairs:
    pairs = _paired(name, first, second)
    documents = tuple(
        DocumentPair(id=a.id, bytes=a.bytes, baseline_nats=-a.log_likelihood, candidate_nats=-b.log_likelihood)
        for a, b in pairs
        if a is not None and b is not None and a.log_likelihood is not None and b.log_likelihood is not None
    )
    return TextPairs(
        documents=documents,
        baseline_missing=sum(a is None or a.log_likelihood is None for a, _ in pairs),
        candidate_missing=sum(b is None or b.log_likelihood is None for _, b in pairs),
        overlapping=tuple(touched),
    )


def _paired(name: str, first: Sequence[Answer], second: Sequence[Answer]) -> list[tuple[Answer | None, Answer | None]]:
    """Pair two models' items by id, in the first's order; ids of one side only are paired with None."""
    left: dict[str, Answer] = _by_id(name, first)
    right: dict[str, Answer] = _by_id(name, second)
    for item in left.keys() & right.keys():
        if left[item].identity != right[item].identity:
            raise AnswersError(f"the two models answered different questions as `{name}` {item}: evaluate both again")
    return [(left.get(item), right.get(item)) for item in [*left, *(key for key in right if key not in left)]]


def _by_id(name: str, items: Sequence[Answer]) -> dict[str, Answer]:
    found = {item.id: item for item in items}
    if len(found) != len(items):
        raise AnswersError(f"`{name}` holds an item twice: evaluate the model again")
    return found


def _diverged(first: Top | None, second: Top | None) -> Divergence | None:
    if first is None or second is None:
        return None
    values, agreed = divergence.kl(first, second), divergence.agreement(first, second)
    shares = [*np.linspace(0, 1, 51), 0.99]
    return Divergence(
        top=first.tokens.shape[1],
        documents=tuple(divergence.by_document(values, first)),
        mean=float(values.mean()),
        p99=float(np.quantile(values, 0.99)),
        agreement=float(agreed.mean()),
        covered=float(np.exp(first.log_probabilities).sum(axis=1).mean()),
        buckets=tuple(divergence.by_bucket(values, agreed, first)),
        curve=tuple((float(share), float(np.quantile(values, share))) for share in sorted(shares)),
    )


def counted(pairs: ChoicePairs, items: int | None = None) -> list[Flips]:
    """Return the flips of a task over its first ``items`` (all without), by group where there are several."""
    if items is None or items >= pairs.items:
        if pairs.groups:
            return [Flips(group.items, group.lost, group.gained) for group in pairs.groups.values()]
        return [Flips(pairs.items, len(pairs.lost_ids), len(pairs.gained_ids))]
    return [Flips(items, sum(at < items for at in pairs.lost_at), sum(at < items for at in pairs.gained_at))]
