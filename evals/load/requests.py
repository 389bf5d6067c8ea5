"""The requests of a load test, one record each: a line of ``requests.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from evals.errors import LoadEvidenceError

FILE = "requests.jsonl"


class RequestRecord(BaseModel):
    """What became of one request. Times are milliseconds since the schedule's start.

    A request that was never sent has no ``start_ms``; one that failed has an ``error`` and no latency. ``latency_ms``
    and ``ttft_ms`` (time to first token) count from when the request was due, ``tpot_ms`` is the time per output token
    after the first. ``late_ms`` is how much later than due the client sent it. ``model`` is the name that it asked
    for, where adapters are served next to the model.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    profile: str | None = None
    model: str | None = None
    number: int
    due_ms: float
    start_ms: float | None = None
    late_ms: float | None = None
    end_ms: float | None = None
    latency_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None

    @property
    def answered(self) -> bool:
        """Whether it got an answer, with at least one token."""
        return self.error is None

    @property
    def sent_ms(self) -> float:
        """When it was sent; when it was due, if it never was."""
        return self.due_ms if self.start_ms is None else self.start_ms

    def column(self, name: str) -> float | None:
        """A measurement by its name in ``requests.jsonl``, such as ``latency_ms``."""
        value: float | None = getattr(self, name)
        return value


def parse_requests(data: bytes, where: str) -> list[RequestRecord]:
    """Parse the lines of ``requests.jsonl``; ``where`` names the file in an error.

    Raises:
        LoadEvidenceError: a line is not a request's record.
    """
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            found.append(RequestRecord.model_validate_json(line))
        except ValidationError as error:
            raise LoadEvidenceError.of(error, f"line {number} of {where}") from error
    return found


def read_requests(folder: Path) -> list[RequestRecord]:
    """Read ``requests.jsonl`` in ``folder``.

    Raises:
        LoadEvidenceError: it can't be read, or a line is not a request's record.
    """
    path = folder / FILE
    try:
        return parse_requests(path.read_bytes(), str(path))
    except OSError as error:
        raise LoadEvidenceError(f"{path} can't be read ({error.strerror}): run the load test again") from error


def format_requests(requests: Sequence[RequestRecord]) -> str:
    """The lines of ``requests.jsonl``, each with the keys that its record was made with."""
    return "".join(request.model_dump_json(exclude_unset=True) + "\n" for request in requests)
