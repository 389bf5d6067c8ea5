"""Calibration samples: the first rows of one source, or a weighted mixture of several.

The law: the same files, weights and number of samples give the same samples in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from evals.drift import json_lines
from pipeline.errors import QuantizeError
from registry.digests import digest_json

if TYPE_CHECKING:
    from pipeline.spec import Calibration

# A text, or the messages of a conversation.
Sample = str | list[dict[str, str]]
# Of a source of a mixture, no more rows are looked at.
_ROWS = 20_000
# Rows of a Parquet file that are read at once.
_BATCH = 256
_SEED = 0


def draw(calibration: Calibration, files: Sequence[Sequence[Path]]) -> list[Sample]:
    """Return the samples that a calibration section asks for, from the ``files`` of each of its sources.

    Raises:
        QuantizeError: a file can't be read, a row is not valid, or there are too few rows; names the key.
    """
    if not calibration.mixture:
        return _rows(key(calibration, 0), files[0], calibration.samples, calibration.samples)
    drawn: list[Sample] = []
    counts = shares([each.weight for each in calibration.mixture], calibration.samples)
    for number, count in enumerate(counts):
        rows = _rows(key(calibration, number), files[number], count, _ROWS)
        chosen = random.Random(f"{_SEED}:{number}").sample(range(len(rows)), count)  # noqa: S311 - no secret
        drawn += [rows[place] for place in sorted(chosen)]
    random.Random(_SEED).shuffle(drawn)  # noqa: S311 - no secret
    return drawn


def holds_conversations(samples: Sequence[Sample]) -> bool:
    """Whether a chat template is needed for some of the samples."""
    return any(not isinstance(each, str) for each in samples)


def key(calibration: Calibration, number: int) -> str:
    """The path of a source's key in the model file."""
    return f"calibration.mixture.{number}.uri" if calibration.mixture else "calibration.uri"


def digest(calibration: Calibration, contents: Sequence[str]) -> str:
    """Identify what samples are drawn from: the content of the one source, or of all with their weights."""
    if not calibration.mixture:
        return contents[0]
    weights = [each.weight for each in calibration.mixture]
    return digest_json([list(each) for each in zip(contents, weights, strict=True)])


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` by weights into whole numbers, by largest remainders; the first of equals gets more."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def texts(samples: Sequence[Sample]) -> Iterator[str]:
    """What was said in the samples, without a chat template: each text, and each message of a conversation."""
    said = ([each] if isinstance(each, str) else [message["content"] for message in each] for each in samples)
    return chain.from_iterable(said)


def write(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as JSON lines, as `read` takes them."""
    rows = ({"text": each} if isinstance(each, str) else {"messages": each} for each in samples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path, limit: int) -> list[Sample]:
    """Read the first samples of a file, JSON lines or Parquet, ``limit`` at most.

    Raises:
        JsonLinesError: the file can't be read, or a row is neither a text nor a conversation.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    return [_sample(row) for row in json_lines.read_rows(path, json_lines.samples, limit)]


def _sample(row: json_lines.Row) -> Sample:
    """A row's text, or its messages without what templates do not need."""
    if "messages" not in row:
        return str(row["text"])
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]


def _rows(key: str, files: Sequence[Path], wanted: int, limit: int) -> list[Sample]:
    found: list[Sample] = []
    for path in files:
        try:
            found += read(path, limit - len(found))
        except json_lines.JsonLinesError as error:
            raise QuantizeError(f"`{key}`: {error}") from error
        if len(found) == limit:
            break
    if len(found) < wanted:
        raise QuantizeError(
            f"`{key}`: {_named(files)} has {len(found)} rows, but {wanted} are needed: add "
            "text, or lower `calibration.samples`"
        )
    return found


def _read_parquet(path: Path, limit: int) -> list[Sample]:
    """Read the first rows of a Parquet file, in parts, and of their columns only those that samples have."""
    from pyarrow import ArrowException  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to import
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]  # noqa: PLC0415

    found: list[Sample] = []
    try:
        with ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][-1:]
            for batch in file.iter_batches(min(limit, _BATCH), columns=columns):
                for row in batch.to_pylist()[: limit - len(found)]:
                    if problem := json_lines.row_problem(row, json_lines.samples):
                        raise json_lines.JsonLinesError(f"{path}, row {len(found) + 1}: {problem}")
                    found.append(_sample(row))
                if len(found) == limit:
                    break
    except (ArrowException, OSError) as error:
        raise json_lines.JsonLinesError(f"can't read {path}: {error}") from error
    return found


def _named(files: Sequence[Path]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
