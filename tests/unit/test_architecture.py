"""The lines between the packages: arrows point one way, and the registry is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("pipeline", "evals", "containers", "registry")
MAY_IMPORT = {
    "pipeline": {"evals", "containers", "registry"},
    "evals": {"containers", "registry"},
    "containers": {"registry"},
    "registry": set(),
}


def imports(package: str) -> set[str]:
    """Top-level names that a package imports, anywhere in its code."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_packages_point_one_way(package: str) -> None:
    others = set(PACKAGES) - {package}
    assert imports(package) & others <= MAY_IMPORT[package]


def test_the_gateway_needs_nothing_of_ours_but_itself() -> None:
    """Neither its environment nor its image has more (`containers.image.gateway_image`)."""
    assert not imports("containers/gateway") & (set(PACKAGES) - {"containers"})


@pytest.mark.parametrize("package", ["evals", "containers", "registry"])
def test_only_the_pipeline_knows_dagster(package: str) -> None:
    assert "dagster" not in imports(package)


@pytest.mark.parametrize(
    "module",
    [
        "stages.table",
        "store.artifacts",
        "workers.runner",
        "spec",
        "settings",
        "sources.source",
        "quantization.quantize",
        "stages.promotion",
        "stages.preflight",
        "operations.retention",
        "stages.unchanged",
    ],
)
def test_the_domain_does_not_know_dagster(module: str) -> None:
    program = f"import sys, pipeline.{module}; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_registry_is_imported_without_anything_heavy() -> None:
    heavy = ("dagster", "torch", "docker", "pandas", "mlflow", "scipy", "evals", "containers", "pipeline")
    program = f"import sys, registry; sys.exit(', '.join(set({heavy!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
