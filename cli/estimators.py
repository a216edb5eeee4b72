"""``osp-diag estimators``: what each number is, and who means what by it."""

from __future__ import annotations

import inspect
import json as json_format
import sys
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from osp_diag.terminal import unfiltered

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from osp_diag.estimators import Estimator

VERB = "estimators"
HELP = "list the statistics with their formulas, or explain one"

EstimatorName = Annotated[str | None, tyro.conf.arg(metavar="NAME")]

OBSERVED = {
    "activation": "of activations: the residual stream, norms, inputs of linear layers",
    "heads": "of queries, keys and values, by head",
    "attention": "of attention: sinks and logits",
    "weight": "of weights: the down projections, and on request all others",
    "gate": "of the gate and up projections of gated MLPs",
    "product": "of what goes into the down projections and what comes out",
    "state": "of the states of recurrent mixers: state-space and linear-attention layers",
    "routing": "of mixtures of experts: the router, the load of its experts and what they give",
}


def run(name: EstimatorName = None, /, *, json: bool = False) -> int:
    """List every statistic with its formula, range, floor, ceiling and source, or explain one in full.

    The floor is what noise or an even spread gives, the ceiling what the worst case gives: a number near
    its floor says "nothing there", whatever its size.

    Args:
        name: the one to explain, as `name` or `name/version`, or a family to list; all by default.
        json: print as JSON.

    Examples:
        osp-diag estimators
        osp-diag estimators osp_excess_kurtosis
        osp-diag estimators --json
    """
    from osp_diag.estimators import all_estimators, estimators_named

    classes = list(all_estimators().values()) if name is None else [type(e) for e in estimators_named(name)]
    if json:
        facts = [_facts(cls) for cls in classes]
        print(json_format.dumps(facts[0] if len(facts) == 1 else facts, ensure_ascii=False, indent=2))
        return 0
    console = _console()
    if len(classes) == 1:
        _explain(console, classes[0])
        return 0
    for kind, title in OBSERVED.items():
        if any(cls.observes == kind for cls in classes):
            console.print(_table(title, [cls for cls in classes if cls.observes == kind]))
    console.print("`osp-diag estimators NAME` explains one and lists its outputs.", markup=False)
    return 0


def _facts(cls: type[Estimator]) -> dict[str, Any]:
    """Everything that the class says about itself, JSON-able."""
    from osp_diag.estimators import describe_outputs, estimator_parameters

    estimator = cls()
    return {
        "identifier": estimator.identifier,
        "title": cls.title,
        "formula": cls.formula,
        "unit": cls.unit,
        "range": cls.range,
        "floor": cls.floor,
        "ceiling": cls.ceiling,
        "observes": cls.observes,
        "sites": list(cls.sites),
        "optional": cls.optional,
        "parameters": estimator_parameters(cls),
        "sources": [{"citation": source.citation, "url": source.url} for source in cls.sources],
        "also_used_by": list(cls.also_used_by),
        "explanation": (inspect.getdoc(cls) or "").replace("``", "`"),
        "outputs": {
            output: {"dims": list(facts.dims), "unit": facts.unit, "definition": facts.definition}
            for output, facts in describe_outputs(estimator).items()
        },
    }


def _console() -> Console:
    from rich.console import Console

    console = Console(file=unfiltered(sys.stdout))
    # A pipe has no width; 80 columns would break formulas.
    return console if console.is_terminal else Console(file=unfiltered(sys.stdout), width=140)


def _table(title: str, classes: list[type[Estimator]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"Statistics {title}", "bold"), title_justify="left", box=box.SIMPLE, show_lines=True
    )
    for heading, ratio in (
        ("estimator", 3),
        ("formula", 4),
        ("range, floor, ceiling", 3),
        ("source, users", 5),
    ):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for cls in classes:
        bounds = f"{cls.range}\nfloor: {cls.floor}\nceiling: {cls.ceiling}"
        users = [source.citation for source in cls.sources] + [f"• {use}" for use in cls.also_used_by]
        label = f"{cls.name}/{cls.version}" + ("\n(on request)" if cls.optional else "")
        table.add_row(*map(Text, (label, cls.formula, bounds, "\n".join(users))))
    return table


def _explain(console: Console, cls: type[Estimator]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    facts = _facts(cls)
    console.print(Text(f"{facts['identifier']}: {facts['title']}", "bold"))
    console.print(Padding(Text(facts["formula"]), (1, 0, 1, 2)))
    console.print(Text(facts["explanation"]))
    console.print()
    sites = ", ".join("any" if site == "*" else site for site in facts["sites"])
    parameters = ", ".join(f"{key} = {value}" for key, value in facts["parameters"].items()) or "none"
    when = "only on request" if facts["optional"] else "by default"
    lines = [
        *((key, str(facts[key])) for key in ("unit", "range", "floor", "ceiling")),
        ("sites", f"{sites}; measured {when}"),
        ("parameters", parameters),
        *(("source", " ".join(filter(None, source.values()))) for source in facts["sources"]),
        *(("see also", use) for use in facts["also_used_by"]),
    ]
    for key, text in lines:
        console.print(Text(f"{key:<11}", "dim") + Text(text))
    console.print(Text("\noutputs", "dim"))
    for output, described in facts["outputs"].items():
        dims = f"({', '.join(described['dims'])})" if described["dims"] else ""
        console.print(
            Padding(Text(f"{output}{dims} [{described['unit']}]: {described['definition']}"), (0, 0, 0, 2))
        )
