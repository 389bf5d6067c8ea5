"""What a stage's recipe covers: all that decides what it makes."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from filled import FillingBench, Models
from hub_server import COMMIT, REPOSITORY, serving

from checkout import CHECKOUT
from homes import DEMO
from pipeline.stages import table
from pipeline.store import artifacts


def test_an_image_bears_the_commit_that_was_pulled_and_its_recipe_covers_its_labels(tmp_path: Path) -> None:
    models = Models(tmp_path)
    spec = models.write(source={"uri": f"hf://{REPOSITORY}", "revision": "main"}, license="mit")
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    with serving(files) as hub:
        bench = FillingBench(spec, "awq", replace(models.settings, hub_endpoint=hub.endpoint), lambda _: None)
        table.image(bench, table.quantized(bench, table.source(bench)))
    ((_, record),) = bench.store.records("image")
    labels = record["recipe"]["parameters"]["labels"]
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
        benches = [FillingBench(spec, "awq", settings, lambda _: None) for spec in specs]
        sources = [table.source(bench) for bench in benches]
        assert sources[0].digest == sources[1].digest
        for bench, source in zip(benches, sources, strict=True):
            image = table.image(bench, table.quantized(bench, source))
            recipe = json.loads((image.folder.parent / "artifact.json").read_text())["recipe"]
            revisions[bench.spec.model] = recipe["parameters"]["labels"].get("org.opencontainers.image.revision")
    assert revisions == {"remote": COMMIT, "local": None}


@pytest.mark.parametrize(
    ("file", "affected"),
    [
        ("evals/drift/json_lines.py", {"quantized", "answers", "layers"}),  # which texts it takes of a file
        ("containers/sandbox/kernels.py", {"drift", "load", "release"}),  # what is written of the kernels
        ("containers/hardware/cpu.py", {"load"}),
        ("evals/drift/served.py", {"answers"}),
    ],
)
def test_a_changed_module_has_what_comes_of_it_made_again(
    file: str, affected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artifacts.digest_file
    monkeypatch.setattr(artifacts, "digest_file", lambda path: "changed" if path == CHECKOUT / file else real(path))
    code = runpy.run_path(table.__file__)["CODE"]
    assert {stage for stage in code if code[stage] != table.CODE[stage]} == affected
