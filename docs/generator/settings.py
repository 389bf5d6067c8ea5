"""The variables that Slipway reads, from the fields of `pipeline.settings.Settings`."""

from __future__ import annotations

from dataclasses import fields

from fields import cell, meanings, page, row

from pipeline.settings import Settings


def environment() -> str:
    """Every variable, its default and its meaning."""
    told = meanings(Settings)
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    rows += [
        row(f"`{each.metadata['variable']}`", cell(each.metadata["default"]), cell(told[each.name]))
        for each in fields(Settings)
        if "variable" in each.metadata
    ]
    intro = (
        "Slipway reads these variables once, when it starts. Those of proxies, certificates and credentials are in "
        "[a table of their own](../network.md)."
    )
    return page("Environment variables", intro, ["\n".join(rows)])


PAGES = {"reference/environment.md": environment}
