"""Branches that have moved away from their locks: of the source, adapters, a draft model and calibration data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from homes import DEMO, Slipway
from pipeline.settings import Settings
from pipeline.sources.lock import Lock, LockedFile, write_lock
from pipeline.spec import ModelSpec, load
from pipeline.stages.locked_sources import describe_moved, find_moved, locked_sources
from unit.pipeline.hub_server import COMMIT, REPOSITORY, StandInHub, serving

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
TASKS = {
    "cloze": {"data": "builtin:cloze", "kind": "choice", "max_drop": 0.02},
    "perplexity": {"data": "builtin:heldout", "kind": "text", "max_increase": 0.02},
}
SERVED = {"engine": "served", "tasks": TASKS}
DRAFTING = {"method": "draft", "tokens": 4, "source": {"uri": f"hf://{REPOSITORY}"}}
DATA = {"train.jsonl": b'{"text": "a"}\n'}


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with serving(MODEL) as hub:
        yield hub


def settings_of(hub: StandInHub, folder: Path) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(folder / "home"), "HF_ENDPOINT": hub.endpoint})


def write(folder: Path, **sections: object) -> ModelSpec:
    """Write the demo's file with other sections, and what its data are."""
    document = yaml.safe_load((DEMO.parent / "demo.yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump({**document, **sections}))
    return load(path)


def lock_all(spec: ModelSpec, revision: str | None) -> None:
    for source in locked_sources(spec):
        files = {"config.json": LockedFile(size=2, sha256="0" * 64)}
        write_lock(Lock(path=source.lock, uri=source.uri, revision=revision, files=files))


@pytest.mark.parametrize(
    ("revision", "locked", "moves"),
    [("main", "f" * 40, True), ("main", COMMIT, False), (COMMIT, "f" * 40, False)],
    ids=["a branch that moved", "a branch that did not", "a commit"],
)
def test_a_branch_that_moved_is_seen_behind_its_lock(
    hub: StandInHub, tmp_path: Path, revision: str, locked: str, moves: bool
) -> None:
    spec = write(tmp_path, source={"uri": f"hf://{REPOSITORY}", "revision": revision})
    lock_all(spec, locked)
    lines = list(describe_moved(spec, settings_of(hub, tmp_path)))
    said = (
        f"`source`: hf://org/tiny is at {COMMIT[:12]} now; demo.lock.json holds it at ffffffffffff, which is released: "
        f"to take the new one, `rm {spec.lock}` and release again"
    )
    assert lines == ([said] if moves else [])


@pytest.mark.parametrize(
    ("sections", "files", "key", "lock"),
    [
        ({"source": {"uri": f"file:{DEMO}/model", "adapter": {"uri": f"hf://{REPOSITORY}"}}},
         ADAPTER, "source.adapter", "demo.merged_adapter.lock.json"),
        ({"serve": {"adapters": {"support": {"uri": f"hf://{REPOSITORY}"}}}, "evals": SERVED},
         ADAPTER, "serve.adapters.support", "demo.adapter_support.lock.json"),
        ({"serve": {"variants": {"fast": {"speculative": DRAFTING}}}},
         MODEL, "serve.variants.fast.speculative.source", "demo.draft_model.lock.json"),
        ({"calibration": {"uri": f"hf://datasets/{REPOSITORY}", "files": "*.jsonl"}},
         DATA, "calibration", "demo.calibration_0.lock.json"),
    ],
    ids=["a merged adapter", "a served adapter", "a draft model", "calibration data"],
)  # fmt: skip
def test_adapters_draft_models_and_data_sets_are_watched_too(
    hub: StandInHub, tmp_path: Path, sections: dict[str, object], files: dict[str, bytes], key: str, lock: str
) -> None:
    hub.files, hub.kind = files, "datasets" if key == "calibration" else "models"
    spec = write(tmp_path, **sections)
    lock_all(spec, "f" * 40)
    (tmp_path / "demo.lock.json").unlink()  # of a folder, which has no revision
    (line,) = describe_moved(spec, settings_of(hub, tmp_path))
    assert line.startswith(f"`{key}`: hf://")
    assert lock in line


def test_without_an_answer_the_locked_source_is_taken_and_a_line_says_why(hub: StandInHub, tmp_path: Path) -> None:
    spec = write(tmp_path, source={"uri": f"hf://{REPOSITORY}", "revision": "main"})
    lock_all(spec, "f" * 40)
    settings = settings_of(hub, tmp_path)
    begins = "can't tell whether a source has changed, and goes on with what is locked: `source`: "
    (line,) = describe_moved(spec, replace(settings, hub_endpoint="http://127.0.0.1:1"))
    assert line.startswith(f"{begins}can't reach the hub at http://127.0.0.1:1")
    hub.gated = True
    (line,) = describe_moved(spec, settings)
    assert line.startswith(f"{begins}hf://org/tiny@main is gated")


def test_a_folder_and_a_source_without_a_lock_can_t_move(hub: StandInHub, tmp_path: Path) -> None:
    for source in (f"file:{DEMO}/model", f"hf://{REPOSITORY}"):
        spec = write(tmp_path, source={"uri": source})
        assert [find_moved(each, settings_of(hub, tmp_path)) for each in locked_sources(spec)] == [None]


def test_a_release_says_what_moved_and_is_refused_where_the_locked_bytes_are_gone(
    hub: StandInHub, tmp_path: Path
) -> None:
    spec = write(tmp_path, source={"uri": f"hf://{REPOSITORY}", "revision": "main"})
    lock_all(spec, "f" * 40)
    home = {"SLIPWAY_HOME": str(tmp_path / "home"), "SLIPWAY_LOCKS": str(tmp_path), "HF_ENDPOINT": hub.endpoint}
    done = Slipway({**os.environ, **home})("release", spec.path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "`source`: hf://org/tiny is at" in line]
    assert f"`rm {spec.lock}` and release again" in line
    assert "does not exist" in done.stderr + done.stdout
