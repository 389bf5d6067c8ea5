"""The laws of the store: complete or absent, same recipe same artifact, nothing half-made is ever seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PlanError, StoreError
from pipeline.store.artifacts import FINISHED, ArtifactDraft, Recipe, Store
from registry.digests import digest_file, digest_json

RECIPE = Recipe("quantized", inputs={"source": "sha256:aa"}, parameters={"bits": 4}, code="1", pins="sha256:bb")


def fill(draft: ArtifactDraft) -> None:
    (draft.folder / "sub").mkdir()
    (draft.folder / "sub" / "weights").write_bytes(b"abc")
    draft.worker_seconds.append(2.0)


def test_what_was_made_is_found_again_by_the_same_recipe(tmp_path: Path) -> None:
    made = Store(tmp_path).obtain(RECIPE, fill)
    again = Store(tmp_path).obtain(replace(RECIPE), lambda _: pytest.fail("made twice"))
    assert (made.cached, again.cached) == (False, True)
    assert again.digest == made.digest
    assert (again.folder / "sub" / "weights").read_bytes() == b"abc"
    assert again.worker_seconds == 2.0
    assert again.size_bytes == 3


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE, inputs={"source": "sha256:ab"}),
        replace(RECIPE, parameters={"bits": 3}),
        replace(RECIPE, code="2"),
        replace(RECIPE, pins="sha256:bc"),
    ],
)
def test_anything_that_determines_an_artifact_changes_its_key(other: Recipe) -> None:
    assert other.key != RECIPE.key


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first = Store(tmp_path).obtain(RECIPE, fill)
    second = Store(tmp_path).obtain(replace(RECIPE, code="2"), fill)
    assert first.key != second.key
    assert first.digest == second.digest


def test_a_maker_that_raises_leaves_nothing_and_the_next_starts_clean(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(draft: ArtifactDraft) -> None:
        (draft.folder / "half").write_text("x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.obtain(RECIPE, fail)
    assert store.find(RECIPE.stage, RECIPE.key) is None
    assert not list((tmp_path / ".making").iterdir())
    assert not (store.obtain(RECIPE, fill).folder / "half").exists()


def test_what_a_failed_try_has_finished_is_all_that_the_next_one_finds(tmp_path: Path) -> None:
    store, found = Store(tmp_path), list[list[str]]()

    def make(draft: ArtifactDraft) -> None:
        finished = draft.scratch / FINISHED
        found.append(sorted(path.name for path in (*draft.scratch.iterdir(), *draft.folder.iterdir())))
        finished.mkdir(exist_ok=True)
        (finished / f"layer-{len(found)}").write_text("x")
        (draft.scratch / "log").write_text("x")
        fill(draft)
        if len(found) < 3:
            raise RuntimeError("boom")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            store.obtain(RECIPE, make)
        store.sweep()
    (kept,) = store.kept_for_next_try().values()
    assert sorted(path.name for path in kept.iterdir()) == ["layer-1", "layer-2"]
    assert sorted(store.obtain(RECIPE, make).files) == ["sub/weights"]
    assert found == [[], [FINISHED], [FINISHED]]
    assert not list((tmp_path / ".making").iterdir())


def test_a_killed_maker_leaves_nothing_that_is_reused(tmp_path: Path) -> None:
    script = f"""
import os, sys, pathlib
from pipeline.store.artifacts import Recipe, Store
def make(draft):
    (draft.folder / "half").write_text("x")
    print("making", flush=True)
    sys.stdin.read()
Store(pathlib.Path({str(tmp_path)!r})).obtain(Recipe("s", inputs={{}}, parameters={{}}, code="1"), make)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "making\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    store = Store(tmp_path)
    assert list((tmp_path / ".making").iterdir())
    store.sweep()
    assert not list((tmp_path / ".making").iterdir())
    made = store.obtain(Recipe("s", inputs={}, parameters={}, code="1"), fill)
    assert sorted(made.files) == ["sub/weights"]


def test_two_makers_of_one_key_make_it_once(tmp_path: Path) -> None:
    store, calls, gate = Store(tmp_path), [], threading.Barrier(2)

    def make(draft: ArtifactDraft) -> None:
        calls.append(1)
        fill(draft)

    def obtain() -> None:
        gate.wait()
        store.obtain(RECIPE, make)

    threads = [threading.Thread(target=obtain) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_a_sweep_spares_what_is_being_made(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def make(draft: ArtifactDraft) -> None:
        store.sweep()
        fill(draft)

    assert store.obtain(RECIPE, make).files


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.obtain(RECIPE, fill).folder / "sub" / "weights"
    path.chmod(0o644)
    path.write_bytes(b"ab")
    with pytest.raises(StoreError, match="sub/weights"):
        store.find(RECIPE.stage, RECIPE.key)


def test_a_link_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a regular file"):
        Store(tmp_path).obtain(RECIPE, lambda draft: (draft.folder / "link").symlink_to("/etc/passwd"))


def test_a_digest_given_by_the_stage_is_not_computed_again(tmp_path: Path) -> None:
    def make(draft: ArtifactDraft) -> None:
        fill(draft)
        draft.sha256["sub/weights"] = "ff" * 32

    assert Store(tmp_path).obtain(RECIPE, make).files["sub/weights"].sha256 == "ff" * 32


def test_a_forgotten_artifact_is_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.obtain(RECIPE, fill)
    store.forget(RECIPE)
    assert not store.obtain(RECIPE, fill).cached


def test_digests_are_of_canonical_json_and_of_bytes(tmp_path: Path) -> None:
    # sha256 of `{"a":1,"b":[2]}`
    assert digest_json({"b": [2], "a": 1}) == digest_json({"a": 1, "b": [2]})
    with pytest.raises(ValueError, match="JSON"):
        digest_json({"a": float("nan")})
    (tmp_path / "empty").touch()
    assert digest_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_nothing_is_made_where_less_than_the_floor_is_free(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"`quantized` can't be made: .* GB are free .* must stay free: make room"):
        Store(tmp_path, floor=2**60).obtain(RECIPE, fill)
    made = Store(tmp_path).obtain(RECIPE, fill)
    # What is there is handed out however full the disk is.
    assert Store(tmp_path, floor=2**60).obtain(RECIPE, fill).digest == made.digest


def test_an_artifact_is_found_by_what_it_holds(tmp_path: Path) -> None:
    made = Store(tmp_path).obtain(RECIPE, fill)
    found = Store(tmp_path).with_digest("quantized", made.digest)
    assert found is not None
    assert found.key == made.key
    assert Store(tmp_path).with_digest("quantized", "sha256:other") is None
