"use strict";
/* What all charts have in common: colours of the theme, places of panels, marks of the chosen layer. */
const CONFIG = { displaylogo: false, showSendToCloud: false, responsive: false, modeBarButtonsToRemove: ["lasso2d", "select2d"], toImageButtonOptions: { format: "svg" } };
const LINES = { all: ["#0072b2", "solid"], first: ["#d55e00", "dash"], delimiter: ["#009e73", "dot"], rest: ["#cc79a7", "dashdot"] };
const FRAME = "#ff9900";
const DASHES = ["solid", "dash", "dashdot", "dot"];

/* Of a run, on any ground. */
function runColour(place) { return DATA.colours.runs[place % DATA.colours.runs.length]; }
/* A line's colour on the ground of the theme. */
function shade(text) { return isDark() ? Themes.lighter(text) : text; }
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }
function isDark() { return document.documentElement.dataset.theme === "dark" && !matchMedia("print").matches; }

function axisLook() {
  return { gridcolor: colour("line"), linecolor: colour("muted"), zeroline: false, showline: true, ticks: "outside", tickcolor: colour("muted") };
}

function baseLayout(height) {
  return {
    height, margin: { l: 62, r: 14, t: 34, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", modebar: { bgcolor: "rgba(0,0,0,0)" },
    font: { family: '"DejaVu Sans", Verdana, Arial, sans-serif', size: 12, color: colour("ink") },
    hoverlabel: { font: { size: 12 } }, showlegend: false, shapes: [], annotations: [],
  };
}

/* Panels side by side where there is room, else one under the other. */
function panels(plot, count) {
  const width = plot.clientWidth || 600;
  const across = width > 330 * count || count === 1;
  const gap = across ? 0.07 : 82 / (240 * count - 78); // for ticks, their title, and the title below
  const each = (1 - gap * (count - 1)) / count;
  return {
    rows: across ? 1 : count, width,
    place: (index) => {
      const low = index * (each + gap);
      return across ? { x: [low, low + each], y: [0, 1] } : { x: [0, 1], y: [1 - low - each, 1 - low] };
    },
    suffix: (index) => (index ? String(index + 1) : ""),
  };
}

function panelTitle(text, domain) {
  return { text: escaped(text), x: domain.x[0], y: domain.y[1], xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, yshift: 3, font: { size: 13 } };
}

function layerBand(axis, suffix, low, high) {
  const other = axis === "x" ? "y" : "x";
  return {
    // Across lines a tint will do; on a map it would change the colours, so there is a frame.
    type: "rect", layer: "above", name: "chosen-layer",
    line: { width: axis === "x" ? 1 : 2.5, color: axis === "x" ? colour("raised") : FRAME }, fillcolor: axis === "x" ? colour("mark") : "rgba(0,0,0,0)",
    [`${axis}ref`]: axis + suffix, [`${other}ref`]: `${other}${suffix} domain`, [`${axis}0`]: low, [`${axis}1`]: high, [`${other}0`]: 0, [`${other}1`]: 1,
  };
}

/* Half the width of a mark between lines: a few pixels, however many layers there are. */
function halfWidth(layers) { return Math.min(0.4, 0.06 + 0.01 * layers); }

function colourScale(name) {
  const table = DATA.colours[name];
  return table.map((value, place) => [place / (table.length - 1), value]);
}

function draw(id, traces, layout, onClick) {
  const plot = document.getElementById(id);
  layout.width = plot.clientWidth || undefined;
  Plotly.react(plot, traces, layout, CONFIG);
  if (onClick && !plot.dataset.listens) {
    plot.dataset.listens = "yes";
    plot.on("plotly_click", (event) => onClick(event.points[0]));
  }
}

function visible(id, there) { document.getElementById(id).hidden = !there; }
function runTitle(run) {
  return run.step_count > 1 ? `${run.label}, step ${run.steps[stepPlace(run)].toLocaleString("en-US")}` : run.label;
}
