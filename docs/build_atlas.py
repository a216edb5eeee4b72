"""Write docs/estimators.md, the atlas of statistics, from what the estimators say about themselves.

python docs/build_atlas.py            write it
python docs/build_atlas.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

from osp_diag.estimators import Estimator, all_estimators, describe_outputs, estimator_parameters

ATLAS = Path(__file__).with_name("estimators.md")

PREAMBLE = """# The atlas of statistics

Written by `python docs/build_atlas.py` from the classes in `osp_diag/estimators/`; edit those, not this file.

Every number is named, and belongs to one published or plainly stated definition. *Floor* is what noise or
an even spread gives, *ceiling* what the worst case gives: a number near its floor says "nothing there". d is
the width of the activations, T the number of tokens of a sequence, t a token, j a channel. Where a statistic
has the dimension `stratum`, it is given for `all` tokens, the `first` of each sequence, `delimiter` tokens
and the `rest`, or for the kinds of token that a model has (`cls`, `register`, `patch`, `image`). Tokens with
a NaN or Inf are left out everywhere and counted by [`nonfinite`](#nonfinite).
`osp-diag estimators NAME` prints an entry.
"""


def main(arguments: list[str]) -> int:
    """Write the atlas, or compare it with the file."""
    text = atlas()
    if "--check" not in arguments:
        ATLAS.write_text(text, encoding="utf-8")
        return 0
    if ATLAS.exists() and ATLAS.read_text(encoding="utf-8") == text:
        return 0
    print("docs/estimators.md is out of date: run `python docs/build_atlas.py`", file=sys.stderr)
    return 1


def atlas() -> str:
    """The whole file: a table of contents, then every family with its estimators."""
    contents = [
        f"- {heading(module)}: " + ", ".join(f"[`{cls.name}`](#{cls.name})" for cls in classes)
        for module, classes in families().items()
    ]
    chapters = [_chapter(module, classes) for module, classes in families().items()]
    return "\n".join([PREAMBLE, *contents, "", *chapters]).rstrip() + "\n"


def families() -> dict[str, list[type[Estimator]]]:
    """The package's estimators by the module that defines them."""
    classes: dict[str, list[type[Estimator]]] = {}
    for cls in all_estimators().values():
        if cls.__module__.startswith("osp_diag."):
            classes.setdefault(cls.__module__, []).append(cls)
    return classes


def heading(module: str) -> str:
    """What the atlas calls a module."""
    return module.rpartition(".")[2].replace("_", " ").capitalize()


def _chapter(module: str, classes: list[type[Estimator]]) -> str:
    about = _markdown(inspect.getdoc(importlib.import_module(module)) or "")
    return "\n".join([f"## {heading(module)}", "", about, "", *map(entry, classes)])


def entry(cls: type[Estimator], level: int = 3) -> str:
    """One estimator in Markdown, under a heading of a level; at level 1 it is a page of its own."""
    estimator = cls()
    facts = {
        "formula": cls.formula,
        "unit": cls.unit,
        "range": cls.range,
        "floor": cls.floor,
        "ceiling": cls.ceiling,
        "sites": ", ".join("any" if site == "*" else f"`{site}`" for site in cls.sites),
        "parameters": ", ".join(f"`{k} = {v}`" for k, v in estimator_parameters(cls).items()),
        "source": "; ".join(f"[{s.citation}]({s.url})" if s.url else s.citation for s in cls.sources),
    }
    table = ["| | |", "|---|---|"]
    table += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    outputs = ["| output | dimensions | unit | definition |", "|---|---|---|---|"]
    outputs += [
        f"| `{name}` | {', '.join(output.dims) or '–'} | {output.unit} | {_cell(output.definition)} |"
        for name, output in describe_outputs(estimator).items()
    ]
    note = ["Measured only on request.", ""] if cls.optional else []
    uses = (
        ["Who else uses which:", "", *(f"- {use}" for use in cls.also_used_by), ""]
        if cls.also_used_by
        else []
    )
    anchor = [f'<a id="{cls.name}"></a>', ""] if level > 1 else []
    head = [*anchor, f"{'#' * level} {cls.title}", "", f"`{estimator.identifier}`", ""]
    return "\n".join(
        [*head, _markdown(inspect.getdoc(cls) or ""), "", *note, *table, "", *outputs, "", *uses]
    )


def _cell(text: str) -> str:
    """A bar would end the table's cell."""
    return text.replace("|", "\\|")


def _markdown(text: str) -> str:
    """Docstrings' double backticks and roles as Markdown code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
