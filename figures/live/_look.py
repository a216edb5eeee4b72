"""How the page looks, in light and in dark; kept in the page itself, so that no file has to be served."""

from __future__ import annotations

import json
from importlib.resources import files

from osp_diag.figures.styles import RUN_COLOURS

__all__ = ["FIGURE_SCRIPT", "INDEX", "evidence_script"]

STYLES = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #5b636b; --paper: #ffffff; --card: #f4f5f7;
  --rule: #d7dbdf; --grid: #e6e8eb; --bad: #b3261e; --watch: #8a5a00; --focus: #1a66c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a2aab2; --paper: #14171a;
  --card: #1e2226; --rule: #3a4046; --grid: #2b3036; --bad: #ff8a80; --watch: #f0b849; --focus: #7fb4f5; } }
:root { --Dash-Fill-Inverse-Strong: var(--paper); --Dash-Fill-Inverse-strong: var(--paper);
  --Dash-Text-Primary: var(--ink); --Dash-Text-Strong: var(--ink); --Dash-Text-Weak: var(--soft);
  --Dash-Stroke-Strong: var(--soft); --Dash-Stroke-Weak: var(--rule);
  --Dash-Fill-Interactive-Strong: var(--focus); --Dash-Fill-Interactive-Weak: var(--card);
  --Dash-Fill-Primary-Hover: var(--card); --Dash-Fill-Primary-Active: var(--card); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 12px 16px 40px; }
h1 { font-size: 1.25rem; margin: 4px 0 10px; } h2 { font-size: 1.05rem; margin: 22px 0 2px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p.note { color: var(--soft); margin: 0 0 4px; font-size: .9rem; }
.controls { display: flex; flex-wrap: wrap; gap: 10px 18px; padding: 10px 12px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; }
.controls > div { min-width: 150px; flex: 1 1 150px; } .controls > div.wide { flex: 2 1 260px; }
.controls span.name { display: block; font-size: .82rem; color: var(--soft); }
.dash-options-list-option, .dash-dropdown { color: var(--ink); }
.dash-options-list { background: transparent; } .dash-options-list-option { background: transparent;
  padding: 2px 0; margin-right: 14px; overflow-wrap: anywhere; }
.dash-dropdown-content .dash-options-list-option { padding: 3px 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 10px;
  margin-top: 12px; }
.card { background: var(--card); border: 1px solid var(--rule); border-left: 5px solid; border-radius: 6px;
  padding: 8px 12px; }
.card p { margin: 2px 0; } .card dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px;
  margin: 4px 0 0; }
.card dt { color: var(--soft); } .card dd { margin: 0; font-variant-numeric: tabular-nums; }
.path { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
.alerts { margin: 12px 0 0; padding: 0; list-style: none; }
.alerts li { border-left: 5px solid var(--watch); background: var(--card); padding: 6px 12px;
  margin-bottom: 6px; border-radius: 4px; overflow-wrap: anywhere; }
.alerts li.bad { border-color: var(--bad); } .alerts strong { color: var(--watch); }
.alerts li.bad strong { color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 20px; align-items: start; }
@media (max-width: 860px) { .pair { grid-template-columns: minmax(0, 1fr); }
  main { padding: 8px 10px 32px; } }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.pair .js-plotly-plot .main-svg .cartesianlayer text, .pair .js-plotly-plot .main-svg .infolayer text,
.pair .js-plotly-plot .main-svg .legend text { fill: var(--ink) !important; }
.pair .js-plotly-plot .gridlayer path { stroke: var(--grid) !important; }
.diagnosis ol { margin: 4px 0; padding-left: 22px; } .diagnosis ul { margin: 2px 0 6px; padding-left: 18px;
  color: var(--soft); overflow-wrap: anywhere; } .diagnosis p { margin: 4px 0; }
.evidence { display: flex; flex-wrap: wrap; gap: 8px 24px; margin-top: 8px; }
.evidence > div { min-width: 0; max-width: 100%; } summary { cursor: pointer; }
.figure { overflow-x: auto; margin-top: 8px; }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important; }
"""

SCRIPT = (
    (files("osp_diag.figures.report") / "static" / "themes.js").read_text(encoding="utf-8")
    + f"const RUNS = {json.dumps(RUN_COLOURS)};"
    + """
const Page = {
  dark: matchMedia("(prefers-color-scheme: dark)"),
  drawn: {},
  /* A figure in the colours of the page; nothing new if neither it nor they have changed. */
  figure(place, picture) {
    const dark = this.dark.matches, last = this.drawn[place];
    if (last && last[0] === picture && last[1] === dark) return Array(3).fill(dash_clientside.no_update);
    this.drawn[place] = [picture, dark];
    if (!picture) return [{ data: [], layout: {} }, true, {}];
    const grid = getComputedStyle(document.documentElement).getPropertyValue("--grid").trim();
    const size = { width: `${picture.layout.width}px`, height: `${picture.layout.height}px` };
    const themed = Themes.themed(picture, { dark, grid, runs: RUNS });
    Object.assign(themed.layout, { modebar: { bgcolor: "rgba(0,0,0,0)" }, uirevision: "kept" });
    return [themed, false, size];
  },
};
"""
)
FIGURE_SCRIPT = "(picture, _) => Page.figure('figure', picture)"
"""What the browser does with a figure that it was sent, and from time to time."""


def evidence_script(name: str) -> str:
    """The same for a figure of the diagnosis."""
    return f"(pictures, _) => Page.figure('{name}', pictures?.{name} ?? null)"


INDEX = (
    """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<link rel="icon" href="data:,"><title>{%title%}</title>{%css%}<style>"""
    + STYLES
    + """</style><script>"""
    + SCRIPT
    + """</script></head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""
)
