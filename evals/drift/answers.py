"""The answers of one model, item by item, independent of limits and of other models.

FP16's answers are made once a (model, suite, engine) and compared with every scheme's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evals.errors import AnswersError
from registry import untrusted
from registry.errors import UntrustedFileError, first_problem

Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChoiceAnswer(_Frozen):
    """How a model weighed the choices of one item, in nats; None where it gave no finite number.

    ``right`` is lm-eval's own score where the task's metric is another than the likeliest choice (`acc_norm` weighs by
    length). ``group`` is what the item belongs to (mmlu's subject), ``question`` and ``choices`` what was shown, cut;
    ``asked`` is the digest of all of it, uncut and with the examples before it.
    """

    id: str
    asked: str = ""
    answer: Count
    log_likelihoods: Annotated[tuple[float | None, ...], Field(min_length=2)]
    right: bool | None = None
    group: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> ChoiceAnswer:
        if self.answer >= len(self.log_likelihoods):
            raise ValueError(f"`answer` of {self.id} is {self.answer}; it has {len(self.log_likelihoods)} choices")
        return self

    @property
    def chosen(self) -> int | None:
        """The choice with the highest log-likelihood, the first of equals; None if any of them is missing."""
        scores = [score for score in self.log_likelihoods if score is not None]
        return scores.index(max(scores)) if len(scores) == len(self.log_likelihoods) else None

    @property
    def hit(self) -> bool | None:
        """Whether the answer is correct; None if there is none."""
        if self.chosen is None:
            return None
        return self.chosen == self.answer if self.right is None else self.right

    @property
    def said(self) -> str:
        """The answer for a person to read."""
        chosen = self.chosen
        return "" if chosen is None else self.choices[chosen] if self.choices else f"choice {chosen}"

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What must be equal for two models to have been asked the same."""
        return (self.asked, self.answer, len(self.log_likelihoods))


class GeneratedAnswer(_Frozen):
    """What a model wrote, perhaps nothing, how many tokens that took, and whether it was right."""

    id: str
    asked: str = ""
    right: bool
    tokens: Count
    said: str = ""
    group: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()

    @property
    def hit(self) -> bool:
        """Whether the answer is correct; an empty answer is not."""
        return self.right

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What must be equal for two models to have been asked the same."""
        return (self.asked,)


class TextAnswer(_Frozen):
    """The log-likelihood, in nats, a model gives one document of ``bytes`` UTF-8 bytes; None where it is not finite."""

    id: str
    asked: str = ""
    bytes: Annotated[int, Field(gt=0)]
    log_likelihood: float | None

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What must be equal for two models to have been asked the same."""
        return (self.asked, self.bytes)


class Again(_Frozen):
    """A second asking of some items of one task by the same engine: the noise floor, A against A.

    ``flips`` counts items that were right once and wrong once, ``changed`` those with another answer, ``largest`` the
    largest difference of a log-likelihood, in nats.
    """

    items: Count
    """Items that were evaluated twice."""
    flips: Count
    """Items that were correct only once."""
    changed: Count
    """Items with two different answers."""
    largest: float
    """The largest difference of a log-likelihood, in nats."""


class ChoiceAnswers(_Frozen):
    """A model's answers to one multiple-choice task."""

    kind: Literal["choice"]
    data_sha256: str
    items: tuple[ChoiceAnswer, ...]
    again: Again | None = None


class GeneratedAnswers(_Frozen):
    """A model's answers to one task that it writes."""

    kind: Literal["generated"]
    data_sha256: str
    items: tuple[GeneratedAnswer, ...]
    again: Again | None = None


class TextAnswers(_Frozen):
    """A model's log-likelihoods of one task's documents."""

    kind: Literal["text"]
    data_sha256: str
    items: tuple[TextAnswer, ...]


class AskedSuite(_Frozen):
    """Which questions: the suite's name, the digest of its definition, and the lm-eval that asked them."""

    name: str
    """The suite's name."""
    digest: str
    """The digest of the suite's definition."""
    lm_eval: str
    """The version of lm-eval."""


AnyAnswers = ChoiceAnswers | GeneratedAnswers | TextAnswers


class Answers(_Frozen):
    """All that one checkpoint answered, and the engine (versions, device, precision) that computed it.

    ``image`` is the id of the image that served it, where one did. It is no part of ``engine``: FP16 is mounted into
    the runtime that the release's image is made of, and the runtime is. ``longest`` is the most tokens that a prompt
    and its answer could take, where a server was asked: one that serves more gets the same prompts, whole.
    """

    schema_: Annotated[Literal["slipway.answers/2"], Field(alias="schema")]
    engine: Mapping[str, str | int]
    image: str | None = None
    longest: Count | None = None
    suite: AskedSuite
    tasks: Mapping[str, Annotated[AnyAnswers, Field(discriminator="kind")]]


# The answers of a full suite with every next-token distribution are some tens of megabytes.
_LARGEST = 1 << 30


def read_answers(folder: Path) -> Answers:
    """Read ``answers.json`` in ``folder``.

    Raises:
        AnswersError: if it is missing, no answers, or of another schema.
    """
    path = folder / "answers.json"
    try:
        return Answers.model_validate_json(untrusted.read(folder, path.name, _LARGEST))
    except (OSError, UntrustedFileError) as error:
        raise AnswersError(f"{path} cannot be read ({error}): evaluate the model again") from error
    except ValidationError as error:
        raise AnswersError(f"{path}: {first_problem(error)}: evaluate the model again") from error
