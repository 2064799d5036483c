"""One self-contained HTML document, with a policy that lets only its own scripts run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from fewbit.report import marks

_HERE = Path(__file__).parent


def render_page(template: str, **content: Any) -> str:
    """Return a document made of a template of this folder.

    Every text of the content is escaped. The page's policy lets only its own two scripts run, by their
    digests, and forbids every request.

    Args:
        template: Name of the file.
        content: What the template shows, beside `policy`, `style`, `plotly` and `script`.
    """
    plotly, script = get_plotlyjs(), _read("page.js")
    return (
        _environment()
        .get_template(template)
        .render(
            policy=_policy([plotly, script]),
            style=_read("style.css"),
            plotly=plotly,
            script=script,
            **content,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["key"] = marks.key
    return environment


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{closed}; style-src 'unsafe-inline'; script-src {allowed}"
