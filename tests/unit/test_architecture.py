"""Which module may import which: one table of layers, no cycles, Dagster in one place; the types of requests."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from checkout import CHECKOUT

PACKAGES = ("registry", "containers", "evals", "pipeline")

# From the bottom up. A module may import from its own row's package and from every row above it in this table, never
# from another package of its own row or from a row below. A package that is not here fails the test: give it a row.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("registry",),
    ("containers.errors",),
    ("containers.hardware", "containers.gateway"),
    ("containers.engine",),
    ("containers.image",),
    ("containers.sandbox", "containers.scan", "containers.kubernetes"),
    ("evals.errors", "evals.statistics", "evals.workers"),
    ("evals.drift", "evals.load"),
    ("evals.builtin",),
    ("evals.report",),
    ("pipeline.errors", "pipeline.resources"),
    ("pipeline.expected_errors", "pipeline.yaml_file", "pipeline.settings"),
    ("pipeline.trust", "pipeline.compatibility", "pipeline.store"),
    ("pipeline.sources", "pipeline.quantization", "pipeline.workers"),
    ("pipeline.spec",),
    ("pipeline.planner", "pipeline.publishing"),
    ("pipeline.proposal",),
    ("pipeline.stages",),
    ("pipeline.operations",),
    ("pipeline.orchestration",),
    ("pipeline.definitions", "pipeline.serving"),
    ("pipeline.commands",),
    ("pipeline.cli",),
)
EXCEPTIONS = {
    (
        "pipeline.orchestration.run",
        "pipeline.definitions",
    ),  # a run's process loads the code location that Dagster names
}
# Neither is imported by the project: their files are copied into images and worker environments, and run there alone.
COPIED = ("containers.runtimes",)

DAGSTER = ("pipeline.orchestration", "pipeline.definitions")
# A worker's messages follow Dagster's protocol: `dagster_pipes`, a small distribution, and the reader of its messages.
PIPES = ("pipeline.workers",)
MESSAGES = "pipeline.workers.messages"


@dataclass(frozen=True)
class Import:
    """One imported name; ``eager`` if importing the module runs it."""

    name: str
    eager: bool


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (CHECKOUT / package).rglob("*.py"):
            name = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if not name.startswith(COPIED)}


def imports_of(node: ast.AST, *, eager: bool = True) -> Iterator[Import]:
    """Every import below a node, but those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from imports_of(other, eager=eager)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from (Import(f"{child.module}.{alias.name}", eager) for alias in child.names)
        else:
            yield from imports_of(child, eager=eager and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


MODULES = modules()
IMPORTS = {name: set(imports_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def own(name: str) -> str | None:
    """The module of ours that an imported name is, or is a part of."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


GRAPH = {name: {found for each in IMPORTS[name] if (found := own(each.name))} - {name} for name in MODULES}


def package_of(module: str) -> str:
    return "registry" if module.partition(".")[0] == "registry" else ".".join(module.split(".")[:2])


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_every_package_has_a_layer() -> None:
    layered = {package for layer in LAYERS for package in layer}
    assert {package_of(name) for name in MODULES} - set(PACKAGES) | {"registry"} == layered


def test_modules_import_only_from_lower_layers() -> None:
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    upward = [
        f"{module} imports {imported}"
        for module, found in sorted(GRAPH.items())
        for imported in sorted(found)
        if package_of(module) != package_of(imported)
        and level.get(package_of(imported), -1) >= level.get(package_of(module), -1)
        and (module, imported) not in EXCEPTIONS
    ]
    assert upward == []


def test_no_modules_import_each_other() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_only_the_orchestration_imports_dagster() -> None:
    others = [
        f"{module} imports {each.name}"
        for module, found in sorted(IMPORTS.items())
        for each in found
        if (each.name.partition(".")[0] == "dagster" and not is_in(module, (*DAGSTER, MESSAGES)))
        or (each.name.partition(".")[0] == "dagster_pipes" and not is_in(module, (*DAGSTER, *PIPES)))
    ]
    assert others == []


def test_nothing_below_the_orchestration_loads_dagster() -> None:
    """Not by way of another module either: importing Dagster takes seconds, which most commands don't need."""
    loads = {
        name: {own(each.name) or each.name.partition(".")[0] for each in found if each.eager}
        for name, found in IMPORTS.items()
    }
    reached: dict[str, set[str]] = {}

    def all_of(name: str) -> set[str]:
        if name not in reached:
            reached[name] = {name}.union(*(all_of(each) for each in loads.get(name, ()) if each != name))
        return reached[name]

    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    below = [name for name in MODULES if level.get(package_of(name), -1) < level["pipeline.orchestration"]]
    assert [name for name in below if "dagster" in all_of(name)] == [MESSAGES]


def test_the_gateway_imports_nothing_of_ours_but_itself() -> None:
    """Neither its environment nor its image has more (`containers.image.gateway_image`)."""
    allowed = ("containers.gateway", "containers.errors", "containers")
    assert [
        f"{module} imports {imported}"
        for module, found in GRAPH.items()
        for imported in found
        if is_in(module, ("containers.gateway",)) and not is_in(imported, allowed[:2])
    ] == []


def test_the_registry_is_imported_without_anything_heavy() -> None:
    heavy = ("dagster", "torch", "docker", "pandas", "mlflow", "scipy", "evals", "containers", "pipeline")
    program = f"import sys, registry; sys.exit(', '.join(set({heavy!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_and_its_caller_have_one_type_for_the_request() -> None:
    untyped = [
        f"{module}: {ast.unparse(node.args)}"
        for module, path in sorted(modules().items())
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name == "work"
        and not ast.unparse(node.args).partition(",")[0].endswith("Request")
    ]
    assert untyped == []
