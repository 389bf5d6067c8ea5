"""Where the files lie that Slipway reads beside its modules: in a checkout, or in the installed wheel.

In a checkout `requirements/` and `dagster.yaml` are at the top. The wheel carries both in ``pipeline/data``
(`pyproject.toml`), since other distributions share the top of site-packages. All are real files: installers and worker
processes read them by path.
"""

from __future__ import annotations

from pathlib import Path

PACKAGES = Path(__file__).resolve().parent.parent
"""The folder of the packages `pipeline`, `evals`, `containers` and `registry`: the checkout, or site-packages."""

IN_WHEEL = "pipeline/data"
"""The folder of the resources in the wheel, relative to `PACKAGES`."""

_INSTALLED = (PACKAGES / IN_WHEEL).is_dir()

CHECKOUT = None if _INSTALLED else PACKAGES
"""The checkout that this code runs from; None where it was installed from a wheel."""

RESOURCES = PACKAGES / IN_WHEEL if _INSTALLED else PACKAGES
"""The folder that holds `requirements/` and `dagster.yaml`."""

REQUIREMENTS = RESOURCES / "requirements"
"""The exact pins of every environment."""
