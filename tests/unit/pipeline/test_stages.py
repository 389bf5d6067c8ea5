"""What a stage's recipe covers: all that decides what it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from filled import FillingBench, Models
from hub_server import COMMIT, REPOSITORY, serving

from homes import DEMO
from pipeline import stages


def test_an_image_bears_the_commit_that_was_pulled_and_its_recipe_covers_its_labels(tmp_path: Path) -> None:
    models = Models(tmp_path)
    spec = models.write(source={"uri": f"hf://{REPOSITORY}", "revision": "main"}, license="mit")
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    with serving(files) as hub:
        bench = FillingBench(spec, "awq", replace(models.settings, hub_endpoint=hub.endpoint), lambda _: None)
        stages.image(bench, stages.quantized(bench, stages.source(bench)))
    ((_, record),) = bench.store.records("image")
    labels = record["recipe"]["parameters"]["labels"]
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["org.opencontainers.image.licenses"] == "mit"
    assert labels["org.opencontainers.image.source"] == f"hf://{REPOSITORY}"


def test_another_model_of_the_same_weights_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    models = Models(tmp_path)
    spec = models.write("remote", source={"uri": f"hf://{REPOSITORY}", "revision": "main"})
    other = models.write("local")
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    with serving(files) as hub:
        settings = replace(models.settings, hub_endpoint=hub.endpoint)

        def image() -> str:
            bench = FillingBench(spec, "awq", settings, lambda _: None)
            return stages.image(bench, stages.quantized(bench, stages.source(bench))).key

        before = image()
        stages.source(FillingBench(other, "awq", settings, lambda _: None))
        assert image() == before
