"""HTML pages from templates: everything escaped, code in backticks, and the colours of the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evals.report.svg import page_colours

_TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:  # noqa: ANN401 - the template's
    """Fill a template of ``templates/``; a value that it needs and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = quoted
    light, dark = map(Markup, page_colours())
    return environment.get_template(template).render(**values, light=light, dark=dark)


def quoted(text: str) -> Markup:
    """Show text in backticks as code, with everything escaped."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    return Markup().join(
        Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in enumerate(parts)
    )
