"""What happens on the page when a reader chooses or time goes by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from osp_diag.analyses.live import standing
from osp_diag.figures._registry import names
from osp_diag.figures.live._data import LARGEST, MEAN, Choice, chosen, scalars, sinks
from osp_diag.figures.live._diagnosis import FIGURES, AlertDiagnoses, Panel, words
from osp_diag.figures.live._figures import AskedFigures
from osp_diag.figures.live._layout import (
    CONTROLS,
    GRAPHS,
    TITLE,
    alert_items,
    cards,
    definition,
    labels_of,
    layout,
    options,
    reasons,
)
from osp_diag.figures.live._look import FIGURE_SCRIPT, INDEX, evidence_script
from osp_diag.figures.live._pictures import Shown, curves, heat_maps, scalar_curves
from osp_diag.runs.following import FollowedRun

if TYPE_CHECKING:
    from dash import Dash

__all__ = ["Watched", "make_page", "pictures"]


LOSSES = ("loss", "held_out_loss", "validation_loss")
FIGURE_PARTS = {
    "picture": ("figure-picture", "data"),
    "caption": ("figure-caption", "children"),
    "left_out": ("figure-left-out", "children"),
    "shown": ("figure-shown", "data"),
}
"""What a figure that was asked for changes on the page."""
DIAGNOSIS_PARTS = {
    "diagnosis": ("diagnosis", "hidden"),
    "diagnosis-words": ("diagnosis-words", "children"),
    "diagnosis-pictures": ("diagnosis-pictures", "data"),
    "diagnosis-left-out": ("diagnosis-left-out", "children"),
    "diagnosis-shown": ("diagnosis-shown", "data"),
}
"""What a new diagnosis changes on the page."""
SIDE_BY_SIDE = {name: f"{name.split('-')[0]}-maps" for name in list(GRAPHS)[:4]}
"""Picture → the maps whose height its box has."""


def pictures(runs: Sequence[FollowedRun], choice: Choice) -> dict[str, dict[str, Any]]:
    """The pictures of a choice, by the names of :data:`GRAPHS`."""
    labels = labels_of(runs)
    selected = [(Shown(place, labels[place]), runs[place]) for place in choice.runs]
    values = [(shown, found) for shown, run in selected if (found := chosen(run, choice)) is not None]
    rates = [(shown, found) for shown, run in selected if (found := sinks(run)) is not None]
    identifier = next((str(v.attrs["estimator"]) for _, v in values if "estimator" in v.attrs), "")
    of_layer = {LARGEST: "largest of layers", MEAN: "mean of layers"}.get(
        choice.layer, f"layer {choice.layer}"
    )
    losses = [(shown, *scalars(run, *LOSSES)) for shown, run in selected]
    speeds = [(shown, *scalars(run, "tokens_per_second")) for shown, run in selected]
    return {
        "kurtosis-curves": curves(
            values, layer=choice.layer, title=f"{escape(choice.statistic)}<br>{of_layer}"
        ),
        "kurtosis-maps": heat_maps(values, title=identifier or choice.statistic),
        "sink-curves": curves(rates, layer=choice.layer, title=f"sink rate<br>{of_layer}", share=True),
        "sink-maps": heat_maps(rates, title="sink rate", share=True),
        "loss": scalar_curves(losses, title="loss (nats)"),
        "speed": scalar_curves(speeds, title="tokens a second", from_zero=True),
    }


class Watched:
    """The runs of a page; several browsers may ask about them at once."""

    def __init__(self, runs: Sequence[FollowedRun]) -> None:
        self.runs = list(runs)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Looked at again, and left as they are for as long as an answer is made."""
        with ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run.lock)
                run.refresh()
            yield

    def choice(self, runs: Any, site: Any, statistic: Any, stratum: Any, layer: Any) -> Choice:
        """What a browser sent, as a choice; names that no run holds find nothing."""
        numbers = {str(place): place for place in range(len(self.runs))}
        named = runs if isinstance(runs, (list, tuple)) else ()
        places = {numbers[text] for place in named if (text := str(place)) in numbers}
        given = {"site": site, "statistic": statistic, "stratum": stratum, "layer": layer}
        return Choice(tuple(sorted(places)), **{name: str(value) for name, value in given.items() if value})

    def version(self, choice: Choice) -> str:
        """Differs whenever the pictures of the choice would."""
        return repr((choice, [run.version for run in self.runs]))


def diagnosis_parts(panel: Panel | None, shown: Any) -> dict[str, Any]:
    """What changes on a page that shows another version; a section without one is hidden."""
    if panel is None:
        return {} if shown is None else {"diagnosis": True, "diagnosis-shown": None}
    if panel.version == shown:
        return {}
    return {
        "diagnosis": False,
        "diagnosis-words": words(panel),
        "diagnosis-pictures": dict(panel.pictures),
        "diagnosis-left-out": reasons(panel.left_out),
        "diagnosis-shown": panel.version,
    }


def make_page(runs: Sequence[FollowedRun], *, every: float, server: Any) -> Dash:
    """The application, on a Flask server.

    Parameters
    ----------
    every : seconds between two looks of an open page
    """
    from dash import Dash, Input, Output, State, no_update

    watched = Watched(runs)
    app = Dash(
        "osp_diag_live",
        server=server,
        title=TITLE,
        update_title="",
        index_string=INDEX,
        include_assets_files=False,
        serve_locally=True,
        add_log_handler=False,
        enable_mcp=False,
    )

    def begin() -> Any:
        with watched.still():
            return layout(watched.runs, every)

    app.layout = begin
    outputs = {name: Output(name, "figure") for name in GRAPHS}
    outputs |= {f"{name}-box": Output(f"{name}-box", "style") for name in SIDE_BY_SIDE}
    outputs |= {name: Output(name, "options") for name in CONTROLS}
    outputs |= {name: Output(name, "children") for name in ("cards", "alerts", "definition")}
    outputs |= {"shown": Output("shown", "data")}
    outputs |= {name: Output(*place) for name, place in DIAGNOSIS_PARTS.items()}
    diagnoses = AlertDiagnoses(watched.runs)

    @app.callback(
        outputs,
        [Input("tick", "n_intervals"), *(Input(name, "value") for name in CONTROLS)],
        [State("shown", "data"), State("diagnosis-shown", "data")],
    )
    def renew(
        _: Any, places: Any, site: Any, statistic: Any, stratum: Any, layer: Any, shown: Any, diagnosed: Any
    ) -> dict[str, Any]:
        choice = watched.choice(places, site, statistic, stratum, layer)
        with watched.still():
            standings = [standing(run) for run in watched.runs]
            labels = labels_of(watched.runs)
            answer: dict[str, Any] = dict.fromkeys(outputs, no_update)
            answer["cards"] = cards(standings, labels)
            answer |= diagnosis_parts(diagnoses.look(standings, choice.runs), diagnosed)
            now = watched.version(choice)
            if now == shown:  # nothing but time has gone by
                return answer
            drawn = pictures(watched.runs, choice)
            answer |= drawn
            for name, maps in SIDE_BY_SIDE.items():
                answer[f"{name}-box"] = {"height": max(300, drawn[maps]["layout"]["height"])}
            answer |= dict(zip(CONTROLS, options(watched.runs, choice), strict=True))
            answer["alerts"] = alert_items(standings, labels)
            answer["definition"] = definition(watched.runs, choice)
            return answer | {"shown": now}

    figures = AskedFigures(watched.runs)

    @app.callback(
        {name: Output(*place) for name, place in FIGURE_PARTS.items()},
        [Input("tick", "n_intervals"), Input("figure", "value"), Input("runs", "value")],
        [State("figure-shown", "data")],
    )
    def draw_figure(_: Any, name: Any, places: Any, shown: Any) -> dict[str, Any]:
        nothing: dict[str, Any] = dict.fromkeys(FIGURE_PARTS, no_update)
        if name not in names():
            return nothing if shown is None else dict.fromkeys(FIGURE_PARTS)
        with watched.still():
            choice = watched.choice(places, None, None, None, None)
        figure = figures.answer(name, choice.runs)
        if figure is None or figure.version == shown:
            return nothing
        return {
            "picture": figure.picture,
            "caption": figure.caption,
            "left_out": reasons(figure.left_out),
            "shown": figure.version,
        }

    for name in FIGURES:
        app.clientside_callback(
            evidence_script(name),
            [
                Output(f"{name}-plot", "figure"),
                Output(f"{name}-box", "hidden"),
                Output(f"{name}-plot", "style"),
            ],
            [Input("diagnosis-pictures", "data"), Input("tick", "n_intervals")],
        )
    app.clientside_callback(
        FIGURE_SCRIPT,
        [Output("figure-plot", "figure"), Output("figure-box", "hidden"), Output("figure-plot", "style")],
        [Input("figure-picture", "data"), Input("tick", "n_intervals")],
    )
    return app
