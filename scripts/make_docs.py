"""Make docs/methods/*.md: a page a method, from its docstring; --check fails where one is out of date."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from fewbit.recipe import shipped_recipes
from fewbit.registry import ROWS, find, rows

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods"
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Source", "Differs", "Example")


def page(kind: str, name: str, found: Any) -> str:
    """Return the page of one method as Markdown."""
    text = inspect.getdoc(found) or ""
    lines = [f"# {name}", "", f"*{kind}* - `{found.__module__}.{found.__qualname__}`", ""]
    lines += _body(text)
    fields = getattr(found, "model_fields", {})
    if fields:
        lines += ["", "## Hyperparameters", "", "| name | default |", "|---|---|"]
        lines += [
            f"| `{key}` | `{field.get_default(call_default_factory=True)!r}` |"
            for key, field in fields.items()
        ]
    if kind != "sensitivity":  # no recipe has one, but a range method has the name of one
        lines += ["", "## Recipes that use it", ""]
        used = [r.name for r in shipped_recipes().values() if _uses(r.model_dump(), name)]
        lines += [f"`{'`, `'.join(used)}`" if used else "none that ships"]
    return "\n".join(lines).rstrip() + "\n"


def _body(text: str) -> list[str]:
    """Turn a Google-style docstring into Markdown: sections become headings, examples become code."""
    lines: list[str] = []
    code = inside = False
    for line in text.splitlines():
        section = re.match(rf"({'|'.join(SECTIONS)}):\s*(.*)$", line)
        if section:
            lines += ["", f"## {section[1]}", "", section[2]]
            inside = True
            continue
        bare = line.strip() if inside else line.rstrip()
        if bare.startswith(">>>") and not code:
            lines += ["", "```python"]
            code = True
        elif code and not bare:
            lines.append("```")
            code = False
        attribute = re.match(r"([a-z_, ]+): (.+)$", bare) if inside and not code else None
        lines.append(f"- `{attribute[1]}`: {attribute[2]}" if attribute else bare)
    if code:
        lines.append("```")
    return [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]


def _uses(value: Any, name: str) -> bool:
    if isinstance(value, dict):
        return any(_uses(v, name) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_uses(v, name) for v in value)
    return bool(value == name)


def pages() -> dict[Path, str]:
    """Return every page by its path, the index too."""
    made: dict[Path, str] = {}
    index = ["# Methods", "", "Made from the docstrings by `scripts/make_docs.py`.", ""]
    for kind in ROWS:
        index += [f"## {kind}", ""]
        for name in rows(kind):
            found = find(kind, name)
            made[DOCS / f"{kind}-{name}.md"] = page(kind, name, found)
            index.append(f"- [{name}]({kind}-{name}.md): {(inspect.getdoc(found) or '').splitlines()[0]}")
        index.append("")
    made[DOCS / "index.md"] = "\n".join(index).rstrip() + "\n"
    return made


def main() -> int:
    """Write or check the pages."""
    made = pages()
    if "--check" in sys.argv:
        stale = [path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
        stale += [path for path in DOCS.glob("*.md") if path not in made]
        for path in stale:
            print(f"{path}: is out of date; run scripts/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    DOCS.mkdir(parents=True, exist_ok=True)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(made)} pages in {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
