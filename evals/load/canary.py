"""The canary: a prompt whose greedy continuation is known. Without it no traffic is sent.

Where a model's file has none, FP16 is asked all of `prompts`, and the token that it prefers most clearly is
what the release must answer. `evals.drift.answer` asks.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

FILE = "canary.json"
"""The file beside FP16's answers."""
MARGIN = 0.5
"""Nats; a token that FP16 prefers by less may change in any quantization or kernel."""
# Prose, lists and code; of a model's own data come the beginnings of texts, for models of other languages and domains.
_PROMPTS = (
    "The capital of France is",
    "Monday, Tuesday, Wednesday,",
    "1, 2, 3, 4, 5,",
    "Once upon a",
    "Two plus two equals",
    "The opposite of hot is",
    "for i in range(len(",
    'if __name__ == "__main',
    "import numpy as",
    "SELECT * FROM users WHERE id",
)
_CHARACTERS = 80


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Canary(_Part):
    """A prompt whose greedy continuation is known."""

    prompt: str
    """The prompt, sent before any traffic."""
    expect: str = Field(min_length=1)
    """The beginning of the expected answer."""


class TakenCanary(Canary):
    """A canary that FP16 gave: ``expect`` is its likeliest token, by ``margin`` nats before the second."""

    margin: float = Field(ge=0, allow_inf_nan=False)

    @property
    def warning(self) -> str | None:
        """Say so where the margin is small."""
        if self.margin >= MARGIN:
            return None
        return (
            f"canary: FP16 prefers {self.expect!r} after {self.prompt!r} by only {self.margin:.2f} nats, and of all "
            "prompts this is the clearest: quantization may change it; write a `load.canary` of your own"
        )


def prompts(texts: Path) -> list[str]:
    """Return what FP16 is asked: ours, and the beginnings of some of the model's own texts (``load.prompts``)."""
    from evals.load import greedy  # noqa: PLC0415 - it takes SciPy, which those who read a lock don't need

    return [*_PROMPTS, *(text[:_CHARACTERS] for text in greedy.read_prompts(texts))]
