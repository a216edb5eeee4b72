"""The page's parts: controls, a card a run, alerts, and places for the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from osp_diag.analyses.live import Standing
from osp_diag.analyses.run_labels import labels_of
from osp_diag.figures._registry import in_report
from osp_diag.figures.live._data import LARGEST, MEAN, Choice, chosen, floor_of, offered
from osp_diag.figures.live._diagnosis import FIGURES
from osp_diag.figures.live._figures import figure_options
from osp_diag.figures.live._pictures import Shown
from osp_diag.runs.following import FollowedRun
from osp_diag.schema import stratum_words

__all__ = [
    "CONTROLS",
    "GRAPHS",
    "TITLE",
    "alert_items",
    "cards",
    "definition",
    "labels_of",
    "layout",
    "options",
    "reasons",
]

TITLE = "osp-diag, live"
GRAPHS = {
    "kurtosis-curves": "the chosen statistic by step, a line for each run",
    "kurtosis-maps": "the chosen statistic by layer and step, a map for each run",
    "sink-curves": "sink rate by step, a line for each run",
    "sink-maps": "sink rate by layer and step, a map for each run",
    "loss": "loss by step",
    "speed": "tokens a second by step",
}
FIGURES_NOTE = "Of the runs chosen above, as the report has them; drawn anew as they grow."
DIAGNOSIS_NOTE = (
    "Of the runs chosen above that have an alert, by what is recorded; made anew when another alert comes. "
    "osp-diag diagnose RUN also asks the checkpoints, and with --replay and --verify trains."
)
CONTROLS = ("runs", "site", "statistic", "stratum", "layer")
_CONFIG: Any = {
    "displaylogo": False,
    # Only these: plotly would add a button that uploads the picture to its maker.
    "modeBarButtons": [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    "plotlyServerURL": "",
}


def layout(runs: Sequence[FollowedRun], every: float) -> Any:
    """The whole page, everything chosen that there is to begin with."""
    from dash import dcc, html

    choice = Choice(tuple(range(len(runs))))
    listed_runs, sites, statistics, strata, layers = options(runs, choice)

    def listed(name: str, options: list[Any], value: str) -> Any:
        return dcc.Dropdown(options, value, id=name, clearable=False, searchable=len(options) > 8)

    def group(name: str, text: str, control: Any, kind: str = "") -> Any:
        label = html.Span(text, className="name", id=f"{name}-name")
        labelled: Any = {"aria-labelledby": f"{name}-name"}
        return html.Div([label, control], role="group", className=kind, **labelled)

    def graph(name: str) -> Any:
        described: Any = {"aria-label": GRAPHS[name]}
        drawn = dcc.Graph(id=name, config=_CONFIG, responsive=True, style={"height": "100%"})
        return html.Div(drawn, id=f"{name}-box", style={"height": 300}, role="group", **described)

    def section(name: str, title: str, note: Any, *graphs: str) -> Any:
        labelled: Any = {"aria-labelledby": f"{name}-title"}
        pair = html.Div([graph(g) for g in graphs], className="pair")
        return html.Section([html.H2(title, id=f"{name}-title"), note, pair], **labelled)

    live: Any = {"aria-live": "polite"}
    sink_note = "Share of heads and sequences in which the first token gets more than 0.3 of the attention."
    return html.Main(
        [
            dcc.Interval(id="tick", interval=round(every * 1000)),
            dcc.Store(id="shown"),
            html.H1(TITLE),
            html.Div(
                [
                    group(
                        "runs",
                        "runs",
                        dcc.Checklist(listed_runs, list(choice.runs), id="runs", inline=True),
                        "runs wide",
                    ),
                    group(
                        "statistic", "statistic", listed("statistic", statistics, choice.statistic), "wide"
                    ),
                    group("site", "site", listed("site", sites, choice.site)),
                    group("layer", "layer, of the curves", listed("layer", layers, choice.layer)),
                    group(
                        "stratum",
                        "tokens",
                        dcc.RadioItems(strata, choice.stratum, id="stratum", inline=True),
                        "strata wide",
                    ),
                ],
                className="controls",
            ),
            html.Div(id="cards", className="cards"),
            html.Ul(id="alerts", className="alerts", **live),
            _diagnosis(),
            section(
                "kurtosis",
                "Outliers by layer and step",
                html.P(id="definition", className="note"),
                "kurtosis-curves",
                "kurtosis-maps",
            ),
            section(
                "sinks",
                "Attention sinks by layer and step",
                html.P(sink_note, className="note"),
                "sink-curves",
                "sink-maps",
            ),
            section(
                "training",
                "Training",
                html.P("Loss of the training batches; dotted: of held-out tokens.", className="note"),
                "loss",
                "speed",
            ),
            _any_figure(),
        ]
    )


def _diagnosis() -> Any:
    """The section that says when something rose, what changed, and what to do; hidden without an alert."""
    from dash import dcc, html

    def graph(name: str) -> Any:
        described: Any = {"aria-label": in_report(name).heading, "role": "group"}
        plot = dcc.Graph(id=f"{name}-plot", config=_CONFIG | {"responsive": False}, responsive=False)
        box = html.Div(plot, id=f"{name}-box", className="figure", hidden=True, tabIndex="0", **described)
        return html.Div([html.H3(in_report(name).heading), box])

    labelled: Any = {"aria-labelledby": "diagnosis-title", "role": "region"}
    live: Any = {"aria-live": "polite"}
    return html.Section(
        [
            html.H2("Diagnosis", id="diagnosis-title"),
            html.P(DIAGNOSIS_NOTE, className="note"),
            html.Div(id="diagnosis-words", **live),
            html.Details(
                [
                    html.Summary("The evidence, drawn"),
                    html.Div([graph(name) for name in FIGURES], className="evidence"),
                    html.Ul(id="diagnosis-left-out", className="alerts"),
                ],
                open=True,
            ),
            dcc.Store(id="diagnosis-pictures"),
            dcc.Store(id="diagnosis-shown"),
        ],
        id="diagnosis",
        hidden=True,
        **labelled,
    )


def _any_figure() -> Any:
    """The section that draws what a reader asks for, of all figures that there are."""
    from dash import dcc, html

    labelled: Any = {"aria-labelledby": "figures-title", "role": "group"}
    live: Any = {"aria-live": "polite"}
    asked = dcc.Dropdown(figure_options(), None, id="figure", placeholder="choose a figure")
    plot = dcc.Graph(id="figure-plot", config=_CONFIG | {"responsive": False}, responsive=False)
    return html.Section(
        [
            html.H2("Figures", id="figures-title"),
            html.P(FIGURES_NOTE, className="note"),
            html.Div(asked, **labelled),
            html.Ul(id="figure-left-out", className="alerts", **live),
            html.Div(plot, id="figure-box", className="figure", hidden=True, tabIndex="0", **labelled),
            html.P(id="figure-caption", className="note"),
            dcc.Store(id="figure-picture"),
            dcc.Store(id="figure-shown"),
        ],
        **labelled | {"role": "region"},
    )


def options(runs: Sequence[FollowedRun], choice: Choice) -> list[list[dict[str, Any]]]:
    """Of each of :data:`CONTROLS`; the present choice is always among them."""
    offer = offered(runs, choice)

    def with_present(names: list[str], present: str) -> list[dict[str, Any]]:
        return [{"label": n, "value": n} for n in dict.fromkeys([*names, present])]

    named = [{"label": label, "value": place} for place, label in enumerate(labels_of(runs))]
    strata = [{"label": stratum_words(s), "value": s} for s in offer.strata or [choice.stratum]]
    layers = [{"label": "largest", "value": LARGEST}, {"label": "mean", "value": MEAN}]
    layers += [{"label": str(layer), "value": str(layer)} for layer in offer.layers]
    return [
        named,
        with_present(offer.sites, choice.site),
        with_present(offer.statistics, choice.statistic),
        strata,
        layers,
    ]


def cards(standings: Sequence[Standing], labels: Sequence[str]) -> list[Any]:
    """A card a run: where it stands."""
    from dash import html

    found = []
    for place, (one, label) in enumerate(zip(standings, labels, strict=True)):
        of = f" of {one.planned_steps:,}" if one.planned_steps is not None else ""
        step = f"step {one.last_step:,}{of}, " if one.last_step is not None else ""
        facts = [part for name, text in _facts(one) for part in (html.Dt(name), html.Dd(text))]
        parts = [html.H3(label), html.Div(one.path, className="path"), html.P(step + one.life)]
        parts += [html.P(one.problem, role="alert")] if one.problem else []
        colour = Shown(place, label).colour
        found.append(
            html.Article([*parts, html.Dl(facts)], className="card", style={"borderLeftColor": colour})
        )
    return found


def _facts(one: Standing) -> list[tuple[str, str]]:
    told = one.scalars
    facts = []
    if "loss" in told:
        held_out = f", held out {told['held_out_loss']:.4g}" if "held_out_loss" in told else ""
        facts.append(("loss", f"{told['loss']:.4g}{held_out}"))
    named = [name for name in ("learning_rate", "gradient_norm") if name in told]
    facts += [(name.replace("_", " "), f"{told[name]:.3g}") for name in named]
    if "tokens_per_second" in told:
        used = f", MFU {told['model_flops_utilisation']:.1%}" if "model_flops_utilisation" in told else ""
        facts.append(("speed", f"{told['tokens_per_second']:,.0f} tokens/s{used}"))
    if one.probing is not None:
        facts.append(("probing", f"{one.probing:.1%} of the time, {one.probes:,} probes"))
    if one.kurtosis is not None and one.kurtosis.sizes["step"]:
        over = one.kurtosis.values[:, -1] / one.kurtosis["floor"].values
        if np.isfinite(over).any():
            worst = int(np.nanargmax(over))
            where = one.kurtosis["hidden_state"].values[worst]
            facts.append(("OSP kurtosis", f"up to {over[worst]:.3g} × its floor ({where})"))
    return facts


def alert_items(standings: Sequence[Standing], labels: Sequence[str]) -> list[Any]:
    """The alerts of all runs, bad ones first."""
    from dash import html

    found = [(label, alert) for one, label in zip(standings, labels, strict=True) for alert in one.alerts]
    found.sort(key=lambda pair: pair[1].severity != "bad")
    return [
        html.Li([html.Strong(f"{label}: "), alert.sentence], className=alert.severity)
        for label, alert in found
    ]


def reasons(left_out: Sequence[str]) -> list[Any]:
    """Why a figure is not drawn, or not of some runs."""
    from dash import html

    return [html.Li([html.Strong("not drawn: "), reason], className="watch") for reason in left_out]


def definition(runs: Sequence[FollowedRun], choice: Choice) -> str:
    """What the chosen statistic is, as the run itself defines it."""
    for place in choice.runs:
        values = chosen(runs[place], choice)
        if values is not None:
            attrs = values.attrs
            told = [str(attrs[key]) for key in ("estimator", "definition") if key in attrs]
            floor = floor_of(values)
            told += [f"dotted: the floor, {floor:.3g}"] if floor is not None else []
            return "; ".join(told)
    return f"No chosen run holds {choice.statistic} at {choice.site}."
