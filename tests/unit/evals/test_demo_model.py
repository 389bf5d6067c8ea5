"""What `models/demo` promises of itself: digests, sizes, figures, and text that is fit for what it is for."""

from __future__ import annotations

import json
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[3] / "models" / "demo"
PROVENANCE: dict[str, Any] = json.loads((DEMO / "provenance.json").read_text(encoding="utf-8"))
WORD = re.compile(r"[A-Za-z_]\w*")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def test_every_file_is_the_one_whose_digest_was_recorded() -> None:
    made = sorted([*DEMO.glob("*.jsonl"), *(DEMO / "model").iterdir()])
    digests = {path.relative_to(DEMO).as_posix(): sha256(path.read_bytes()).hexdigest() for path in made}
    assert digests == PROVENANCE["files"]


def test_the_weights_are_small_and_the_model_has_learnt() -> None:
    assert (DEMO / "model" / "model.safetensors").stat().st_size < 12e6
    figures = PROVENANCE["figures"]
    assert figures["trained"]["cloze_accuracy"] > 0.8
    assert figures["trained"]["perplexity"] * 50 < figures["untrained"]["perplexity"]


def test_the_readme_states_the_figures_that_were_measured() -> None:
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    trained = PROVENANCE["figures"]["trained"]
    stated = [float(figure) for figure in re.findall(r"\*\*([\d.]+)\*\*", readme)]
    measured = [trained[name] for name in ("nats_per_token", "bits_per_byte", "perplexity", "cloze_accuracy")]
    assert stated == pytest.approx(measured, rel=2e-3)


def test_calibration_shares_no_text_with_what_drift_is_measured_on() -> None:
    held_out = {row["text"] for row in rows("heldout.jsonl")}
    assert not held_out & {row["text"] for row in rows("calibration.jsonl")}
    held_out_files = set(PROVENANCE["text"]["held_out_files"])
    assert {row["id"].split("#")[0] for row in rows("heldout.jsonl")} <= held_out_files
    assert {row["id"].split(":")[0] for row in rows("cloze.jsonl")} <= held_out_files


def test_all_choices_of_an_item_hold_the_same_words_and_one_is_right() -> None:
    items = rows("cloze.jsonl")
    assert len(items) == len({item["id"] for item in items}) == 2000
    for item in items:
        assert len(set(item["choices"])) == 4
        assert len({frozenset(Counter(WORD.findall(choice)).items()) for choice in item["choices"]}) == 1
    answers = Counter(item["answer"] for item in items)
    assert all(count == pytest.approx(500, abs=80) for count in answers.values())


def test_no_text_names_somebodys_disk() -> None:
    for path in [*DEMO.glob("*.json*"), *(DEMO / "model").glob("*.json")]:
        assert not re.search(r"/home/|/root/|/tmp/", path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("name", ["tests", "manual"])
def test_an_adapter_is_the_one_whose_digest_and_figures_were_recorded(name: str) -> None:
    folder = DEMO / "adapters"
    recorded = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))[name]
    assert sha256((folder / name / "adapter_model.safetensors").read_bytes()).hexdigest() == recorded["sha256"]
    without, adapted = recorded["bits_per_byte_without"], recorded["bits_per_byte_with"]
    assert adapted < 0.95 * without
    row = re.escape(f"{without:.3f} → **{adapted:.3f}**")
    assert re.search(rf"\| `{name}` \|.*\| {row} \|", (folder / "README.md").read_text(encoding="utf-8"))
