"""Calibration data from a hub: pinned, locked, and only the files that are asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet as columns

from homes import DEMO
from pipeline.errors import QuantizeError, SourceError
from pipeline.quantization import calibration_data
from pipeline.settings import Settings
from pipeline.sources import dataset
from pipeline.sources.lock import read_lock
from pipeline.spec import Calibration, ModelSpec, WeightedData, load
from pipeline.stages import calibration
from pipeline.stages.context import StageContext
from pipeline.stages.release import _calibration_data
from unit.pipeline.hub_server import COMMIT, StandInHub, serving

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
URI = "hf://datasets/org/tiny"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    columns.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    files = {
        "data/train-0.parquet": parquet([{"messages": CHAT, "source": n} for n in range(300)]),
        "data/train-1.parquet": parquet([{"messages": CHAT, "source": n} for n in range(300)]),
        "data/test-0.parquet": b"never read",
        "extra.jsonl": b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(50)),
        "tiny.py": b"raise SystemExit",
    }
    with serving(files) as started:
        started.kind = "datasets"
        yield started


def context(tmp_path: Path, hub: StandInHub, **section: Any) -> StageContext:  # noqa: ANN401
    variables = {"SLIPWAY_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}
    demo = load(DEMO.with_suffix(".yaml"))
    spec: ModelSpec = demo.model_copy(update={"path": tmp_path / "demo.yaml", "calibration": Calibration(**section)})
    return StageContext(spec, "awq", Settings.read(variables), lambda _: None)


def test_only_the_files_that_match_are_pulled_and_locked_at_their_commit(tmp_path: Path, hub: StandInHub) -> None:
    own = context(tmp_path, hub, uri=URI, files="data/train-*.parquet", samples=310)
    assert calibration.samples(own) == [CHAT] * 310
    lock = read_lock(dataset.lock_of(own.spec.lock, 0))
    assert lock is not None
    assert (lock.uri, lock.revision, sorted(lock.files)) == (
        URI, COMMIT, ["data/train-0.parquet", "data/train-1.parquet"],
    )  # fmt: skip
    hub.commit = "f" * 40  # the branch has moved, and the lock holds
    hub.branches["main"] = hub.commit
    asked = len(hub.seen)
    assert calibration.samples(own) == [CHAT] * 310
    assert len(hub.seen) == asked
    (recorded,) = _calibration_data(own)
    assert (recorded.uri, recorded.revision) == (URI, COMMIT)
    assert recorded.files["data/train-0.parquet"] == f"sha256:{lock.files['data/train-0.parquet'].sha256}"


def test_a_mixture_draws_from_a_hub_and_from_here(tmp_path: Path, hub: StandInHub) -> None:
    mixture = (WeightedData(uri=URI, files="extra.jsonl"), WeightedData(uri="builtin:calibration", weight=3))
    drawn = calibration.samples(context(tmp_path, hub, mixture=mixture, samples=40))
    assert sum(isinstance(each, str) and each.startswith("row ") for each in drawn) == 10


def test_a_file_of_this_machine_may_be_parquet(tmp_path: Path) -> None:
    """A quantizer reads the same samples as the checks that a release begins with."""
    path = tmp_path / "chats.parquet"
    path.write_bytes(parquet([{"messages": CHAT, "source": n} for n in range(30)]))
    section = Calibration(uri=f"file:{path}", samples=20)
    assert calibration_data.draw(section, [[path]]) == calibration_data.read(path, 20) == [CHAT] * 20


def test_the_content_is_part_of_the_identity(tmp_path: Path, hub: StandInHub) -> None:
    before = calibration.digest(context(tmp_path, hub, uri=URI, files="extra.jsonl"))
    hub.commit = hub.branches["main"] = "e" * 40
    assert calibration.digest(context(tmp_path, hub, uri=URI, files="extra.jsonl")) != before


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ("train/*.parquet", r"has no file of .jsonl or .parquet like `train/\*.parquet`: it has data/train-0.parquet"),
        ("*.py", r"has no file of .jsonl or .parquet like `\*.py`"),
    ],
)
def test_a_pattern_that_matches_no_data_is_refused_by_its_key(
    files: str, reason: str, tmp_path: Path, hub: StandInHub
) -> None:
    own = context(tmp_path, hub, uri=URI, files=files)
    with pytest.raises(SourceError, match=rf"^`calibration\.uri`: .*{reason}"):
        calibration.resolve(own.spec, own.settings)


def test_too_much_data_is_refused_before_it_is_pulled(
    tmp_path: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_BYTES", 100)
    own = context(tmp_path, hub, uri=URI, files="extra.jsonl")
    with pytest.raises(SourceError, match=r"^`calibration\.uri`: `files` name .* name fewer"):
        calibration.samples(own)


def test_a_damaged_file_and_a_wrong_row_are_told_with_their_file(tmp_path: Path, hub: StandInHub) -> None:
    own = context(tmp_path, hub, uri=URI, files="data/test-*.parquet", samples=1)
    with pytest.raises(QuantizeError, match=r"^`calibration\.uri`: can't read .*test-0\.parquet"):
        calibration.samples(own)
    hub.files["data/test-1.parquet"] = parquet([{"question": "Why?"}])
    own = replace(own, spec=own.spec.model_copy(update={"path": tmp_path / "other.yaml"}))
    another = own.spec.calibration.model_copy(update={"files": "data/test-1.parquet"})
    own = replace(own, spec=own.spec.model_copy(update={"calibration": another}))
    with pytest.raises(QuantizeError, match=r"test-1\.parquet, row 1: `text` is missing"):
        calibration.samples(own)
