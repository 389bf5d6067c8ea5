"""What Slipway knowingly uses of Dagster before it is final, so that logs don't say so at every stage."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from dagster import BetaWarning, PreviewWarning

# Each a part that the design rests on, and how its warning begins. Anything else that is not final still warns.
_KNOWN = (
    # Without partitioned checks a refused scheme would block every other.
    (PreviewWarning, "Specifying a partitions_def on an AssetCheckSpec"),
    # An artifact's digest is its data version, by which Dagster knows what is stale.
    (BetaWarning, "Parameter `data_version` of initializer `Output.__init__`"),
    # Dagster's own Pipes session reads it.
    (PreviewWarning, "Function `PipesMessageReader.expected_writer_count`"),
)


@contextlib.contextmanager
def known_previews() -> Iterator[None]:
    """Keep quiet about the parts of Dagster that are used knowingly."""
    with warnings.catch_warnings():
        for category, beginning in _KNOWN:
            warnings.filterwarnings("ignore", beginning, category)
        yield
