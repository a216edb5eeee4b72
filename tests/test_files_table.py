"""docs/files.md says what happens to the files that people have; no row stands there without a test."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows_of_the_page() -> list[str]:
    lines = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    return [cell for cell in cells if cell not in ("What you have", "") and set(cell) - set("-: ")]


def rows_that_are_tested() -> list[str]:
    rows = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "situation":
                    assert node.name.startswith("test_"), f"{path.name}: {node.name} is no test"
                    rows += [ast.literal_eval(argument) for argument in call.args]
    return rows


def test_every_row_has_its_test_and_every_tested_situation_its_row():
    page, tested = rows_of_the_page(), rows_that_are_tested()
    assert len(page) > 30
    assert len(set(page)) == len(page), "a row stands twice"
    assert sorted(set(tested)) == sorted(page)
