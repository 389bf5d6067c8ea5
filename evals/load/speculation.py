"""Speculative decoding against the same image without it: the same greedy requests, one at a time and all at once.

The tokens that the model accepts are those it would have generated, so one request at a time the answers are equal. In
a batch they need not be: its shape changes from step to step, and with it the rounding. How much that changes answers
is measured without speculation, by the same batch sent twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from evals.statistics.paired import share_interval

_CONFIDENCE = 0.95

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Difference(_Frozen):
    """Where two answers to the same prompt part: the prompt's number, the token's place, and both tokens there."""

    prompt: Count
    token: Count
    first: int | None
    second: int | None


class Equality(_Frozen):
    """How many of the answers to the same prompts are equal, and the first difference, if any."""

    answers: Count
    """Number of answers."""
    equal: Count
    """Number of equal answers."""
    first_difference: Difference | None = None
    """The first difference."""

    @property
    def share(self) -> float:
        """The share of equal answers."""
        return self.equal / self.answers if self.answers else 0.0


class Speculation(_Frozen):
    """What speculation changed: ``single`` and ``batched`` compare answers with it and without.

    ``noise`` compares the batch with itself, both times without speculation. ``drafted`` and ``accepted`` count tokens
    (vLLM's metrics). The rates are output tokens a second of the same requests.
    """

    method: str
    """How tokens are drafted."""
    tokens: Count
    """Number of tokens drafted at a time."""
    single: Equality
    """Answers with and without speculation, one request at a time."""
    batched: Equality
    """Answers with and without speculation, in a batch."""
    noise: Equality
    """Answers of two equal batches, both without speculation."""
    drafted: Count
    """Drafted tokens."""
    accepted: Count
    """Drafted tokens that the model accepted."""
    single_tokens_per_second: Seconds
    """Output tokens per second, one request at a time."""
    single_tokens_per_second_without: Seconds
    """The same without speculation."""
    batched_tokens_per_second: Seconds
    """Output tokens per second, in a batch."""
    batched_tokens_per_second_without: Seconds
    """The same without speculation."""

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that the model accepted; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def single_speed_up(self) -> float:
        """How many times as fast one request at a time is as without speculation."""
        return _ratio(self.single_tokens_per_second, self.single_tokens_per_second_without)

    @property
    def batched_speed_up(self) -> float:
        """How many times as fast a batch is as without speculation."""
        return _ratio(self.batched_tokens_per_second, self.batched_tokens_per_second_without)

    @property
    def wrong(self) -> str | None:
        """Say what speculation must not change and did; None where it changed nothing beyond the noise.

        Of batches, more answers may differ than between two equal batches by what chance explains: the intervals of
        the two shares (95%) overlap.
        """
        if self.single.equal < self.single.answers:
            return f"one request at a time, {_told(self.single)}"
        differing, noise = (
            share_interval(each.answers - each.equal, each.answers, _CONFIDENCE) for each in (self.batched, self.noise)
        )
        if differing.lower > noise.upper:
            return f"in a batch, {_told(self.batched)}; without speculation, twice the same batch: {_told(self.noise)}"
        return None

    def __str__(self) -> str:
        """Describe it for a report."""
        rate = self.acceptance_rate
        accepted = "nothing was drafted" if rate is None else f"{rate:.1%} of {self.drafted} drafted tokens accepted"
        return (
            f"{self.method}, {self.tokens} tokens at once: {accepted}; {self.single_speed_up:.2f} times as fast one"
            f" request at a time, {self.batched_speed_up:.2f} times in a batch of {self.batched.answers};"
            f" {self.single.equal} of {self.single.answers} single answers equal, {self.batched.equal} of"
            f" {self.batched.answers} in a batch ({self.noise.equal} of {self.noise.answers} between two batches"
            " without speculation)"
        )


@dataclass(frozen=True)
class Asked:
    """One server's greedy answers, as token ids: one at a time, and in two equal batches; and the seconds they took.

    ``drafted`` and ``accepted`` count the tokens of these answers that were drafted; 0 without speculation.
    """

    single: Sequence[Sequence[int]]
    batches: Sequence[Sequence[Sequence[int]]]
    single_seconds: float
    batch_seconds: float
    drafted: int
    accepted: int


def compare(method: str, tokens: int, speculating: Asked, plain: Asked) -> Speculation:
    """Compare a server's answers with those of the same image without speculation."""
    return Speculation(
        method=method,
        tokens=tokens,
        single=equality(speculating.single, plain.single),
        batched=equality(speculating.batches[0], plain.batches[0]),
        noise=equality(plain.batches[0], plain.batches[1]),
        drafted=speculating.drafted,
        accepted=speculating.accepted,
        single_tokens_per_second=_rate(speculating.single, speculating.single_seconds),
        single_tokens_per_second_without=_rate(plain.single, plain.single_seconds),
        batched_tokens_per_second=_rate(itertools.chain(*speculating.batches), speculating.batch_seconds),
        batched_tokens_per_second_without=_rate(itertools.chain(*plain.batches), plain.batch_seconds),
    )


def equality(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> Equality:
    """Compare two servers' answers, as token ids, to the same prompts."""
    pairs = list(zip(first, second, strict=True))
    differing = [number for number, (a, b) in enumerate(pairs) if list(a) != list(b)]
    return Equality(
        answers=len(pairs),
        equal=len(pairs) - len(differing),
        first_difference=_difference(differing[0], *pairs[differing[0]]) if differing else None,
    )


def _difference(prompt: int, first: Sequence[int], second: Sequence[int]) -> Difference:
    at = next(place for place, (a, b) in enumerate(itertools.zip_longest(first, second)) if a != b)
    one, other = (answer[at] if at < len(answer) else None for answer in (first, second))
    return Difference(prompt=prompt, token=at, first=one, second=other)


def _rate(answers: Iterable[Sequence[int]], seconds: float) -> float:
    return sum(map(len, answers)) / seconds if seconds > 0 else 0.0


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0


def _told(found: Equality) -> str:
    at = found.first_difference
    where = "" if at is None else f", the first at token {at.token} of prompt {at.prompt}"
    return f"{found.answers - found.equal} of {found.answers} answers differ{where}"
