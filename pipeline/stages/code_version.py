"""The version of the code behind a stage: a digest of its module and of every project module that it imports.

It is part of the stage's recipe, so a change in any of them makes the artifact again. Comments and docstrings do not
count, nor do imports for type checking alone. The closure also holds what runs without an import: a script or a data
file beside a module that the module names in a string.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.resources import PACKAGES

_NAMING = (ast.Import, ast.ImportFrom, ast.Constant, ast.BinOp)
# Fields of a node that follow from where it stands, or are comments.
_IMPLIED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NAMES = frozenset({"pipeline", "evals", "containers", "registry"})

# Not followed from anywhere. These modules carry work, wait for it or report on it. Artifacts do not depend on how.
_CARRIERS = (
    # What is said when something fails.
    *("pipeline.errors", "evals.errors", "containers.errors", "registry.errors"),
    # Of these, what decides is in the recipe's inputs, parameters and pins.
    *("pipeline.settings", "pipeline.resources", "pipeline.spec", "pipeline.store", "pipeline.workers"),
    *("pipeline.stages.stage", "pipeline.stages.context", "pipeline.stages.code_version"),
    # How files are locked, how an engine is reached, and who waits for which device.
    *("registry.file_systems", "registry.file_locks", "registry.atomic_write", "containers.engine"),
    *("containers.hardware.machine_locks", "containers.hardware.gpu_pool"),
    # How work is reported, and what a misspelt key is answered.
    *("registry.progress", "registry.suggestions"),
)
# Not followed from one module, because another part of the recipe covers it, or because it judges what is made.
_COVERED = {
    # The scheme's own script is a parameter.
    "pipeline.quantization.quantize": (
        "pipeline.quantization.quantizers",
        "pipeline.quantization.formats.table",
        "pipeline.quantization.mixture",
        "evals.drift.mixture",
    ),
    # So are the module of its format and, of a mixture, how that is chosen, with the script that measures losses.
    "pipeline.quantization.checkpoint": (
        "pipeline.quantization.published",
        "pipeline.quantization.formats.table",
        "pipeline.quantization.formats.mixed",
        "pipeline.quantization.mixture",
    ),
    "pipeline.quantization.mixture": ("pipeline.quantization.formats.table", "pipeline.quantization.quantizers"),
    # A source that is taken as it is has a recipe of its own.
    "pipeline.stages.quantized": (
        "pipeline.quantization.formats.table",
        "pipeline.quantization.mixture",
        "pipeline.stages.published",
    ),
    # What a checkpoint stands for is planned with; the stage that takes one follows this itself.
    "pipeline.planner.sources": ("pipeline.quantization.published",),
    # What a data set holds is in the recipe, and its rows are checked where they are read.
    "pipeline.stages.calibration": ("pipeline.sources",),
    # The prompts for a canary are a parameter, and it is locked after the stage.
    "pipeline.stages.baseline": ("pipeline.stages.canary",),
    # The server that answers is the image, and the arguments of FP16's server are a parameter.
    "pipeline.stages.answers": ("containers",),
    # What a draft model holds is in the image's recipe, and it is checked whenever it is put into an image.
    "pipeline.stages.draft_model": ("pipeline.sources", "pipeline.planner", "pipeline.compatibility"),
    # How the engine is told of adapters is in its arguments, which are a parameter.
    "pipeline.stages.pulled_adapters": ("containers",),
    "evals.drift.asking": ("containers", "evals.drift.divergence"),
    # The suite's digest is a parameter.
    "evals.drift.suite": ("evals.drift.suites",),
    # These decide when enough was asked, and not what is answered.
    "pipeline.stages.candidate": ("evals.drift.divergence", "evals.drift.drift_gate", "evals.drift.pairs"),
    "pipeline.stages.drift": ("evals.drift.drift_gate",),
    # What a stage reads of the image's record was written when the image was built, and the image is an input.
    "pipeline.stages.scan": ("pipeline.stages.image", "containers.scan.scan_gate"),
    "pipeline.stages.load": ("pipeline.stages.image", "containers.image", "pipeline.planner.sources"),
    # The verdicts are a parameter; how the model is served is in the image.
    "pipeline.stages.release": (
        "pipeline.stages.image",
        "containers.image",
        "pipeline.trust",
        "containers.scan.scan_gate",
    ),
    "pipeline.stages.tested_variants": ("containers.image", "evals.drift.drift_gate", "evals.load.load_gate"),
    # Reading measurements takes no server; the load test, which starts one, follows this itself.
    "evals.load.measurements": ("containers.sandbox.sandbox",),
    # The profile's pins are in the recipe.
    "containers.image.gpu_compatibility": ("containers.image.profile",),
    # So is the loader's layer, in the pins.
    "containers.image.model_loader": ("registry.served_files",),
    # How the loader's refusals are read in a log.
    "containers.sandbox.engine_log": ("registry.served_files",),
}


@dataclass(frozen=True)
class _Source:
    """One file: the digest of what it does, and the places of the project's files that it uses."""

    digest: str
    uses: tuple[Path, ...]


def code_version(root: str | Path) -> str:
    """Return ``sha256:…`` over the code that the module or the script ``root`` uses."""
    total = hashlib.sha256()
    for path in closure(root):
        total.update(f"{path.relative_to(PACKAGES).as_posix()} {_read(path).digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


@functools.cache
def closure(root: str | Path) -> tuple[Path, ...]:
    """Return every file that the module or the script ``root`` uses, sorted."""
    first = root if isinstance(root, Path) else _module(root)
    if first is None:
        raise ValueError(f"`{root}` is not a module of the project")
    found, ahead = {first}, [first]
    while ahead:
        path = ahead.pop()
        skipped = (*_CARRIERS, *_COVERED.get(_name(path), ()))
        new = {used for used in _read(path).uses if not _is_within(_name(used), skipped)} - found
        found |= new
        ahead += new
    return tuple(sorted(found))


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _name(path: Path) -> str:
    """The dotted name of a module; of a data file, that of the place where a module would be."""
    return ".".join(path.relative_to(PACKAGES).with_suffix("").parts).removesuffix(".__init__")


def _module(name: str) -> Path | None:
    """The file of one of the project's modules."""
    if name.partition(".")[0] not in _NAMES:
        return None
    place = PACKAGES.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@functools.cache
def _read(path: Path) -> _Source:
    content = path.read_bytes()
    if path.suffix != ".py":
        return _Source(hashlib.sha256(content).hexdigest(), ())
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree has no garbage, and looking for some takes two thirds of the time
    try:
        reading = _Reading(path)
        reading.visit(ast.parse(content))
    finally:
        if collecting:
            gc.enable()
    return _Source(hashlib.sha256("\n".join(reading.words).encode()).hexdigest(), tuple(reading.uses - {path}))


class _Reading:
    """Reads a module's syntax tree once: all that it does as ``words``, and the files that it imports or names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: list[str] = []
        self.uses: set[Path] = set()

    def visit(self, node: ast.AST) -> None:
        """Read a node and what is in it."""
        kind = type(node)
        if kind in _DOCUMENTED:
            node.body = [each for each in node.body if not _is_docstring(each)]  # type: ignore[attr-defined]
        elif kind is ast.If and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":  # type: ignore[attr-defined]
            node.body = []  # type: ignore[attr-defined]
        elif kind in _NAMING:
            self.uses.update(_used_by(node, self.path))
        self.words.append(kind.__name__)
        for name in kind._fields:
            if name in _IMPLIED:
                continue
            value = getattr(node, name, None)
            if isinstance(value, list):
                self.words.append("[")
                for each in value:
                    if isinstance(each, ast.AST):
                        self.visit(each)
                    else:
                        self.words.append(repr(each))
                self.words.append("]")
            elif isinstance(value, ast.AST):
                self.visit(value)
            else:
                self.words.append(repr(value))


def _is_docstring(statement: ast.stmt) -> bool:
    """Whether it is a text alone: of a module, a class or a function, or of the field above it."""
    match statement:
        case ast.Expr(ast.Constant(str())):
            return True
    return False


def _used_by(node: ast.AST, path: Path) -> Iterator[Path]:
    """The project's files that one node of the module in ``path`` imports or names."""
    match node:
        case ast.Import(names):
            for alias in names:
                yield from _imported(alias.name, path)
        case ast.ImportFrom(module=str(module), names=names):
            # A package's own module is followed where something of it is taken, and not on the way to what is in it.
            for alias in names:
                yield from _imported(f"{module}.{alias.name}", path) or _imported(module, path)
        case ast.Constant(str(text)):
            yield from _named(text, path)
        case ast.BinOp(op=ast.Div()) if joined := _joined(node):
            yield from _named(joined, path)


def _imported(name: str, path: Path) -> list[Path]:
    """A module of the project; of a script, one that lies beside it."""
    beside = path.with_name(f"{name}.py")
    found = _module(name) or (beside if name.isidentifier() and beside.is_file() else None)
    if name in sys.stdlib_module_names or found is None:
        return []
    return [found]


def _joined(node: ast.expr) -> str:
    """``a/b`` of ``anything / "a" / "b"``."""
    match node:
        case ast.BinOp(left, ast.Div(), ast.Constant(str(last))):
            return f"{_joined(left)}/{last}".removeprefix("/")
    return ""


def _named(text: str, path: Path) -> list[Path]:
    """The script or data file beside ``path`` that a string names, or the files of such a folder."""
    if text.partition("/")[0] not in _listed(path.parent):
        return []
    place = path.parent / text
    if place.is_file():
        return [place]
    if place.is_dir() and not (place / "__init__.py").exists():
        return [file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return []


@functools.cache
def _listed(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir() if path.name != "__pycache__")
