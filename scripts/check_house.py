"""Check the rules of the house that no linter knows: file and function lengths, public names, changelog."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "bench", "scripts", "tests")
MAX_FILE, MAX_FUNCTION, MAX_PUBLIC = 500, 60, 30
FRAGMENT = re.compile(r"^[a-z0-9-]+\.(added|changed|fixed|removed)\.md$")
BANNED_WORDS = ("Manager", "Utils", "Helper", "Base", "Impl")


def long_functions(path: Path, tree: ast.Module) -> list[str]:
    """Name the functions over the limit and the classes with a word that says nothing."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                where = f"{path}:{node.lineno}: function {node.name}"
                faults.append(f"{where} has {length} lines, allowed are {MAX_FUNCTION}")
        if isinstance(node, ast.ClassDef) and node.name.strip("_").endswith(BANNED_WORDS):
            faults.append(f"{path}:{node.lineno}: class {node.name}: choose a noun of the field")
    return faults


def main() -> int:
    """Print every fault; return how the process ends."""
    faults = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MAX_FILE:
            faults.append(f"{path}: {lines} lines, allowed are {MAX_FILE}")
        faults += long_functions(path, ast.parse(text))
    for fragment in (ROOT / "changes").glob("*"):
        if not FRAGMENT.match(fragment.name):
            faults.append(f"{fragment}: name it like 'search.added.md'")
    if not list((ROOT / "changes").glob("*.md")):
        faults.append("changes/: a change has a fragment there")
    print("\n".join(faults) or "the house is in order")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
