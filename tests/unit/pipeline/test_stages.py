"""What a stage's recipe covers: all that decides what it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from homes import DEMO
from pipeline.stages.run import run, run_until
from pipeline.stages.table import IMAGE, QUANTIZED, SOURCE
from unit.pipeline.filled import FillingContext, Models
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
