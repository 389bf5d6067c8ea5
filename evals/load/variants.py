"""A release's serving variants: each with its configuration, and its verdicts of drift and load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from containers.image.serving import ServingConfiguration
from evals.errors import AnswersError
from registry import untrusted
from registry.errors import UntrustedFileError
from registry.verdict import Verdict

FILE = "variants.json"
_LARGEST = 1 << 20


class Variant(BaseModel):
    """One variant: how it is served, resolved, and what its gates concluded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    serving: ServingConfiguration
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate blocks it, so that a deployment may start it."""
        return not any(verdict.blocks for verdict in self.verdicts)

    @property
    def metrics(self) -> dict[str, float]:
        """What its gates measured."""
        return {name: value for verdict in self.verdicts for name, value in verdict.metrics.items()}

    def __str__(self) -> str:
        """Say whether it is listed, and why not."""
        blocking = [f"{verdict.gate} {verdict.status}: {verdict.reason}" for verdict in self.verdicts if verdict.blocks]
        return f"variant `{self.name}` " + (f"is not listed: {'; '.join(blocking)}" if blocking else "passed")


_VARIANTS = TypeAdapter(tuple[Variant, ...])


def folder(name: str) -> str:
    """The folder of a variant's evidence, within that of the release's."""
    return f"variants/{name}"


def write_variants(path: Path, variants: Sequence[Variant]) -> None:
    """Write ``variants.json``."""
    path.write_bytes(_VARIANTS.dump_json(tuple(variants), indent=1) + b"\n")


def read_variants(place: Path) -> tuple[Variant, ...]:
    """Read ``variants.json`` in a folder; nothing where there is none.

    Raises:
        AnswersError: it is not what `write_variants` writes.
    """
    if not (place / FILE).exists():
        return ()
    try:
        return _VARIANTS.validate_json(untrusted.read(place, FILE, _LARGEST))
    except (OSError, UntrustedFileError) as error:
        raise AnswersError(f"{place / FILE} cannot be read ({error}): release it again") from error
    except ValidationError as error:
        raise AnswersError(f"{place / FILE} does not have the expected form: release it again") from error
