"""A stage's code version: it changes with every module that its artifact comes from, and with no other."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkout import CHECKOUT
from pipeline.compatibility.scheme import Scheme
from pipeline.quantization.quantize import backend_of
from pipeline.stages import code_version as versions
from pipeline.stages.code_version import closure, code_version
from pipeline.stages.stage import Stage
from pipeline.stages.table import STAGES

PARTS = [part for stage in STAGES for lane in stage.parts for part in lane]
EVERY = {stage.name: stage for stage in (*PARTS, *STAGES)}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small project in the place of this one."""
    monkeypatch.setattr(versions, "PACKAGES", tmp_path)
    forget()
    write(
        tmp_path,
        {
            "pipeline/__init__.py": "from pipeline import unrelated\n",
            "pipeline/stage.py": "from evals import ask\n\ndef make():\n    from registry.seal import seal\n",
            "pipeline/errors.py": "class Failed(Exception): ...\n",
            "pipeline/unrelated.py": "import evals.gate\n",
            "evals/__init__.py": "from evals.gate import judge\n",
            "evals/ask.py": "from pathlib import Path\nfrom typing import TYPE_CHECKING\n"
            "from pipeline.errors import Failed\nif TYPE_CHECKING:\n    from evals import gate\n"
            "WORKER = Path(__file__).with_name('answer.py')\nTASKS = Path(__file__).parent / 'data' / 'tasks'\n",
            "evals/answer.py": "import json\nimport items\nimport slipway_worker\n",
            "evals/items.py": "LIMIT = 1\n",
            "evals/json.py": "SHADOWED = 1\n",
            "evals/gate.py": "def judge(): ...\n",
            "evals/data/tasks/cloze.yaml": "items: 1\n",
            "registry/seal.py": "class Seal:\n    size: int\n\ndef seal():\n    return 1\n",
        },
    )
    yield tmp_path
    forget()


def forget() -> None:
    for cached in (versions.closure, versions._read, versions._listed):
        cached.cache_clear()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def after(project: Path, name: str, change: Callable[[str], str]) -> str:
    """The stage's version once a file says something else."""
    path = project / name
    path.write_text(change(path.read_text()))
    forget()
    return code_version("pipeline.stage")


def test_the_closure_holds_what_is_imported_and_what_is_named(project: Path) -> None:
    found = {path.relative_to(project).as_posix() for path in closure("pipeline.stage")}
    assert found == {
        "pipeline/stage.py", "evals/ask.py", "evals/answer.py", "evals/items.py", "evals/data/tasks/cloze.yaml",
        "registry/seal.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["pipeline/stage.py", "evals/ask.py", "evals/answer.py", "evals/items.py", "registry/seal.py"],
)
def test_a_change_in_any_module_of_the_closure_changes_the_version(project: Path, name: str) -> None:
    before = code_version("pipeline.stage")
    assert after(project, name, lambda text: f"{text}ANOTHER = 2\n") != before


def test_a_change_in_a_data_file_changes_the_version(project: Path) -> None:
    before = code_version("pipeline.stage")
    assert after(project, "evals/data/tasks/cloze.yaml", lambda _: "items: 2\n") != before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f'"""What it is for."""\n# and why\n{text}',
        lambda text: text.replace("seal():", 'seal():\n    """Sign."""\n'),
        lambda text: text.replace("size: int", 'size: int\n    """In bytes."""'),
        lambda text: text.replace("return 1", "return (  # one\n        1\n    )"),
    ],
    ids=["a module's docstring", "a function's docstring", "a field's docstring", "a comment and another layout"],
)
def test_comments_docstrings_and_layout_change_nothing(project: Path, change: Callable[[str], str]) -> None:
    before = code_version("pipeline.stage")
    assert after(project, "registry/seal.py", change) == before


@pytest.mark.parametrize(
    "name", ["pipeline/errors.py", "pipeline/unrelated.py", "evals/gate.py", "evals/json.py", "pipeline/__init__.py"]
)
def test_an_unrelated_change_changes_nothing(project: Path, name: str) -> None:
    before = code_version("pipeline.stage")
    assert after(project, name, lambda text: f"{text}ANOTHER = 2\n") == before


def test_a_module_that_does_not_exist_is_an_error(project: Path) -> None:
    with pytest.raises(ValueError, match=r"`pipeline\.lost` is not a module of the project"):
        code_version("pipeline.lost")


def files_of(stage: Stage) -> set[str]:
    return {path.relative_to(CHECKOUT).as_posix() for path in closure(stage.recipe.__module__)}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        # What the lists that were kept by hand had missed.
        ("containers/image/gpu_compatibility.py", {"image"}),
        ("containers/scan/mlbom.py", {"release"}),
        ("evals/drift/answers.py", {"baseline", "candidate", "drift"}),
        ("evals/drift/suite.py", {"baseline", "candidate"}),
        # What is found without an import.
        ("evals/drift/answer.py", {"baseline", "candidate"}),
        ("evals/drift/tasks/cloze.yaml", {"baseline", "candidate"}),
        ("evals/drift/layers.py", {"layers"}),
        ("evals/load/traffic/client.py", {"load"}),
        ("evals/report/templates/report.html.j2", {"release"}),
        ("evals/drift/json_lines.py", {"quantized", "baseline", "candidate", "layers"}),
        ("containers/sandbox/kernels.py", {"drift", "load", "release"}),
    ],
)
def test_a_file_is_in_the_versions_of_the_stages_that_it_shapes(file: str, stages: set[str]) -> None:
    assert stages <= {name for name, stage in EVERY.items() if file in files_of(stage)}


@pytest.mark.parametrize(
    ("stage", "apart"),
    [
        ("quantized", ("evals/drift/asking", "evals/load", "containers", "pipeline/planner", "pipeline/orchestration")),
        ("baseline", ("containers", "evals/load", "evals/statistics", "evals/drift/drift_gate", "evals/drift/suites")),
        ("candidate", ("containers", "evals/load", "evals/statistics", "evals/drift/drift_gate", "evals/drift/pairs")),
        ("load", ("evals/drift/answer", "containers/scan", "evals/report")),
        ("release", ("containers/sandbox/sandbox", "evals/load/load_test", "evals/load/traffic/client")),
    ],
)
def test_costly_stages_depend_on_few_modules(stage: str, apart: tuple[str, ...]) -> None:
    assert not [file for file in files_of(EVERY[stage]) if file.startswith(apart)]
    assert len(files_of(EVERY["quantized"])) < 22
    assert len(files_of(EVERY["baseline"])) < 23


def test_every_exception_still_leaves_something_out() -> None:
    for module, covered in versions._COVERED.items():
        path = versions._module(module)
        assert path is not None, module
        uses = [versions._name(used) for used in versions._read(path).uses]
        assert [name for name in covered if not any(versions._is_within(used, (name,)) for used in uses)] == []
    for carrier in versions._CARRIERS:
        assert versions._module(carrier), carrier


@pytest.mark.parametrize("stage", EVERY)
def test_no_error_message_or_setting_is_in_a_version(stage: str) -> None:
    assert not {file for file in files_of(EVERY[stage]) if file.endswith(("/errors.py", "/settings.py"))}


def test_a_scheme_depends_on_its_own_workers_script_and_what_that_imports() -> None:
    script = backend_of(Scheme(method="awq", backend="autoawq")).script
    assert [path.name for path in closure(script)] == [
        "autoawq.py",
        "calibration_blocks.py",
        "expert_tokens.py",
        "finished_layers.py",
        "quantizer_common.py",
    ]


def test_packages_do_nothing_but_import() -> None:
    """A package is followed only where something of it is taken, so nothing else may happen in it."""
    for package in ("pipeline", "evals", "containers", "registry"):
        for path in (CHECKOUT / package).rglob("__init__.py"):
            if "runtimes" in path.parts:
                continue  # it is copied into images, and imported by nothing of ours
            statements = ast.parse(path.read_text()).body
            allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
            assert all(isinstance(each, allowed) for each in statements), path


def test_all_versions_together_are_computed_in_a_moment() -> None:
    forget()
    before = time.process_time()
    for stage in EVERY.values():
        code_version(stage.recipe.__module__)
    assert time.process_time() - before < 1.0
