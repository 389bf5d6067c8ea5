"""What a stage's recipe covers: all that decides what it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from image_record import DIGEST, image_record

from containers.errors import EngineError
from containers.image.build import LayerRecord
from homes import DEMO
from pipeline.settings import Settings
from pipeline.sources.lock import read_lock, write_lock
from pipeline.stages.canary import prompts
from pipeline.stages.context import StageContext
from pipeline.stages.run import run, run_until
from pipeline.stages.table import IMAGE, QUANTIZED, SOURCE
from unit.pipeline.filled import CANARY, FillingContext, Models, release
from unit.pipeline.hub_server import COMMIT, REPOSITORY, serving


def test_an_image_bears_the_commit_that_was_pulled_and_its_recipe_covers_its_labels(tmp_path: Path) -> None:
    models = Models(tmp_path)
    spec = models.write(source={"uri": f"hf://{REPOSITORY}", "revision": "main"}, license="mit")
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    with serving(files) as hub:
        context = FillingContext(spec, "awq", replace(models.settings, hub_endpoint=hub.endpoint), lambda _: None)
        run_until("image", context)
    ((_, record),) = context.store.records("image")
    labels = record.recipe.parameters["labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["org.opencontainers.image.licenses"] == "mit"
    assert labels["org.opencontainers.image.source"] == f"hf://{REPOSITORY}"


def test_another_model_of_the_same_weights_gives_an_image_no_label(tmp_path: Path) -> None:
    models = Models(tmp_path)
    specs = [models.write("remote", source={"uri": f"hf://{REPOSITORY}", "revision": "main"}), models.write("local")]
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    revisions = {}
    with serving(files) as hub:
        settings = replace(models.settings, hub_endpoint=hub.endpoint)
        contexts = [FillingContext(spec, "awq", settings, lambda _: None) for spec in specs]
        sources = [run(SOURCE, context, {}) for context in contexts]
        assert sources[0].digest == sources[1].digest
        for context, source in zip(contexts, sources, strict=True):
            image = run(IMAGE, context, {"quantized": run(QUANTIZED, context, {"source": source})})
            recipe = json.loads((image.folder.parent / "artifact.json").read_text())["recipe"]
            revisions[context.spec.model] = recipe["parameters"]["labels"].get("org.opencontainers.image.revision")
    assert revisions == {"remote": COMMIT, "local": None}


def test_a_dry_run_needs_no_engine_for_an_image_that_was_pushed_and_a_run_does(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path), "DOCKER_HOST": "unix:///nowhere.sock"})
    context = StageContext(Models(tmp_path).write(), "awq", settings, lambda _: None)
    pushed = image_record(pushed=True, reference=f"registry.example.com/demo-awq@{DIGEST}")
    assert replace(context, dry=True).has_image(pushed)
    for record, dry in ((pushed, False), (image_record(), True)):
        with pytest.raises(EngineError):
            replace(context, dry=dry).has_image(record)
    lost = pushed.model_copy(update={"layers": (LayerRecord(digest=DIGEST, size=1, holds="base debian"),)})
    assert not replace(context, dry=True).has_image(lost)


def test_without_a_canary_the_first_release_locks_what_fp16_answers(tmp_path: Path) -> None:
    models = Models(tmp_path)
    plan = yaml.safe_load(DEMO.with_suffix(".yaml").read_text())["load"]
    spec = models.write(load={**plan, "prompts": "file:demo/heldout.jsonl", "canary": None})
    told: list[str] = []
    context = FillingContext(spec, "awq", models.settings, told.append)
    release(context)
    locked = read_lock(spec.lock)
    assert locked is not None
    assert locked.canary == CANARY
    assert "canary: '1, 2,' is answered ' 3' by FP16" in told
    (load,) = context.store.records("load")
    assert load[1].recipe.parameters["canary"] == CANARY.model_dump()
    asked = [record.recipe.parameters.get("canary") for _, record in context.store.records("answers")]
    assert prompts(spec) in asked
    # From now on it stays: another scheme, and FP16 asked again with another answer.
    write_lock(locked.model_copy(update={"canary": CANARY.model_copy(update={"expect": " three"})}))
    release(models.context(spec, "gptq"))
    kept = read_lock(spec.lock)
    assert kept is not None
    assert kept.canary is not None
    assert kept.canary.expect == " three"


def test_a_model_with_a_canary_of_its_own_locks_none(tmp_path: Path) -> None:
    models = Models(tmp_path)
    spec = models.write()
    release(models.context(spec, "awq"))
    assert '"canary"' not in spec.lock.read_text()
