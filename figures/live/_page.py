"""The page's parts, and what happens when a reader chooses or time goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analyses.live import standing
from figures.live._data import LARGEST, MEAN, Choice, chosen, sinks
from figures.live._layout import GRAPHS, TITLE, alert_items, cards, definition, labels_of, layout, options
from figures.live._look import INDEX
from figures.live._pictures import Shown, curves, heat_maps, scalar_curves
from osp_diag.run_following import FollowedRun

if TYPE_CHECKING:
    from dash import Dash

__all__ = ["Answers", "make_page", "pictures"]


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
    losses = [
        (
            shown,
            run.series_steps,
            {name.replace("_", " "): run.series(name) for name in ("loss", "held_out_loss")},
        )
        for shown, run in selected
        if run.series("loss").size
    ]
    speeds = [
        (shown, run.series_steps, {"tokens/s": run.series("tokens_per_second")})
        for shown, run in selected
        if run.series("tokens_per_second").size
    ]
    return {
        "kurtosis-curves": curves(values, layer=choice.layer, title=f"{choice.statistic}<br>{of_layer}"),
        "kurtosis-maps": heat_maps(values, title=identifier or choice.statistic),
        "sink-curves": curves(rates, layer=choice.layer, title=f"sink rate<br>{of_layer}", share=True),
        "sink-maps": heat_maps(rates, title="sink rate", share=True),
        "loss": scalar_curves(losses, title="loss (nats)"),
        "speed": scalar_curves(speeds, title="tokens a second", from_zero=True),
    }


class Answers:
    """What the server answers to one page; several browsers may ask at once."""

    def __init__(self, runs: Sequence[FollowedRun]) -> None:
        self.runs = list(runs)

    def choice(self, runs: Any, site: Any, statistic: Any, stratum: Any, layer: Any) -> Choice:
        """A choice from what a browser sent; anything that is not offered becomes the default."""
        places = [int(p) for p in runs or () if str(p).isdigit() and int(p) < len(self.runs)]
        given = {"site": site, "statistic": statistic, "stratum": stratum, "layer": layer}
        return Choice(tuple(sorted(set(places))), **{k: str(v) for k, v in given.items() if v})

    def refresh(self) -> None:
        """Look at every run again."""
        for run in self.runs:
            run.refresh()

    def told(self, choice: Choice) -> str:
        """Differs whenever the pictures would."""
        return json.dumps([repr(choice), [repr(run.version) for run in self.runs]])


def make_page(runs: Sequence[FollowedRun], *, every: float, server: Any) -> Dash:
    """The application, on a Flask server.

    Parameters
    ----------
    every : seconds between two looks of an open page
    """
    from dash import Dash, Input, Output, State, no_update

    answers = Answers(runs)
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
        answers.refresh()
        return layout(answers.runs, every)

    app.layout = begin

    @app.callback(
        [Output(name, "figure") for name in GRAPHS]
        + [Output(f"{name}-box", "style") for name in SIDE_BY_SIDE]
        + [Output(name, "options") for name in ("runs", "site", "statistic", "stratum", "layer")]
        + [Output(name, "children") for name in ("cards", "alerts", "definition")]
        + [Output("told", "data")],
        [Input("tick", "n_intervals")]
        + [Input(name, "value") for name in ("runs", "site", "statistic", "stratum", "layer")],
        [State("told", "data")],
    )
    def renew(
        _: Any, places: Any, site: Any, statistic: Any, stratum: Any, layer: Any, told: Any
    ) -> list[Any]:
        answers.refresh()
        choice = answers.choice(places, site, statistic, stratum, layer)
        standings = [standing(run) for run in answers.runs]
        labels = labels_of(answers.runs)
        status = cards(standings, labels)
        now = answers.told(choice)
        if now == told:
            # Nothing but time has gone by.
            return [*[no_update] * 15, status, no_update, no_update, no_update]
        drawn = pictures(answers.runs, choice)
        heights = [{"height": max(300, drawn[name]["layout"]["height"])} for name in SIDE_BY_SIDE.values()]
        return [
            *[drawn[name] for name in GRAPHS],
            *heights,
            *options(answers.runs, choice),
            status,
            alert_items(standings, labels),
            definition(answers.runs, choice),
            now,
        ]

    return app
