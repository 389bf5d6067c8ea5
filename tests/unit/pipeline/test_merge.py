"""What a merged model is checked for, whatever the worker wrote. `tests/stages/test_merge.py` merges for real."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import SourceError
from pipeline.planner.sources import describe_folder as describe_model
from pipeline.sources.adapter import describe_folder
from pipeline.sources.merge import merge
from registry.errors import UntrustedFileError
from unit.pipeline import checkpoints, peft_adapters
from unit.pipeline.checkpoints import Tensors

MODEL = "model.safetensors"
Change = Callable[[Path], None]


def changed(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / MODEL)
    change(tensors)
    save_file(tensors, folder / MODEL)


def rightly(folder: Path) -> None:
    def add(tensors: Tensors) -> None:
        for name in checkpoints.linears():
            tensors[f"{name}.weight"] += np.float16(1)

    changed(folder, add)


def but_one(folder: Path) -> None:
    rightly(folder)
    source = checkpoints.unquantized()["model.layers.0.self_attn.q_proj.weight"]
    changed(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": source}))


def and_a_norm(folder: Path) -> None:
    rightly(folder)
    changed(folder, lambda tensors: tensors["model.norm.weight"].fill(1))


def in_another_precision(folder: Path) -> None:
    rightly(folder)
    changed(folder, lambda tensors: tensors.update({name: value.astype(np.float32) for name, value in tensors.items()}))


def under_other_names(folder: Path) -> None:
    rightly(folder)
    raw = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(raw.replace(b"lm_head.weight", b"lm_haed.weight"))


def nothing(folder: Path) -> None:
    (folder / MODEL).unlink()


def with_code(folder: Path) -> None:
    rightly(folder)
    (folder / "modeling.py").write_text("")


def as_a_link(folder: Path) -> None:
    shutil.move(folder / MODEL, folder.parent / "elsewhere")
    (folder / MODEL).symlink_to(folder.parent / "elsewhere")


def merged(tmp_path: Path, change: Change) -> set[str]:
    def worker(_environment: str, _script: Path, request: Mapping[str, Any], _folder: Path) -> dict[str, object]:
        shutil.copyfile(request["source"] / MODEL, request["output"] / MODEL)
        change(request["output"])
        return {"layers": 8}

    base, adapter = checkpoints.write_source(tmp_path / "base"), peft_adapters.write(tmp_path / "adapter")
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    model, described = describe_model(base).model, describe_folder(adapter, "merged")
    return merge(base, model, adapter, described, tmp_path / "output", worker, tmp_path / "scratch", lambda _: None)


def test_what_does_not_change_is_linked(tmp_path: Path) -> None:
    kept = merged(tmp_path, rightly)
    assert kept == {"config.json", "tokenizer.json"}
    assert all((tmp_path / "output" / name).samefile(tmp_path / "base" / name) for name in kept)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (but_one, "`model.layers.0.self_attn.q_proj.weight` did not change"),
        (and_a_norm, "`model.norm.weight` changed"),
        (in_another_precision, "model.safetensors has another size"),
        (under_other_names, "model.safetensors has another header"),
        (nothing, "did not change"),
        (with_code, "the merge wrote `modeling.py`, which is not a weights file of the base"),
    ],
)
def test_a_merge_that_changed_anything_else_is_refused(tmp_path: Path, change: Change, told: str) -> None:
    with pytest.raises(SourceError) as error:
        merged(tmp_path, change)
    assert told in str(error.value)


def test_links_from_the_worker_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedFileError):
        merged(tmp_path, as_a_link)
