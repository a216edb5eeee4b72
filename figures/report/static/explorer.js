"use strict";
/* The linked charts: profile by layer, course over training, channels, sinks. */
const Explorer = {
  entry(run) { return run.profiles.find((profile) => profile.site === State.site); },

  profile() {
    const places = State.places().filter((place) => this.entry(DATA.runs[place])?.statistics[State.statistic]);
    visible("profile-figure", places.length > 0);
    if (!places.length) return;
    const grid = panels(document.getElementById("profile-plot"), places.length);
    const layout = baseLayout(grid.rows === 1 ? 340 : 250 * grid.rows);
    layout.showlegend = true;
    layout.legend = { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top", font: { size: 12 } };
    layout.margin.t = grid.width < 500 ? 84 : 58;
    const series = places.map((place) => this.series(DATA.runs[place]));
    const values = series.flatMap((one) => [...one.lines.flatMap((line) => line.y), one.floor, one.ceiling]).filter((value) => value > 0);
    const negative = series.some((one) => one.lines.some((line) => line.y.some((value) => value < 0)));
    const log = values.length > 0 && !negative;
    const foot = log ? Math.min(...values) / 2 : null, top = log ? Math.max(...values) * 2 : null;
    const traces = [];
    series.forEach((one, index) => {
      const suffix = grid.suffix(index), domain = grid.place(index), run = DATA.runs[places[index]];
      one.lines.forEach((line) => traces.push({
        x: one.layers, y: line.y.map((value) => (value === null ? null : log ? Math.max(value, foot) : value)),
        customdata: line.y.map(numberText), type: "scatter", mode: one.layers.length > 1 ? "lines+markers" : "markers",
        marker: { size: one.layers.length > 1 ? 4 : 9 }, name: line.stratum === "all" ? "all tokens" : line.stratum,
        legendgroup: line.stratum, showlegend: index === 0, xaxis: `x${suffix}`, yaxis: `y${suffix}`,
        line: { color: shade(LINES[line.stratum]?.[0] ?? LINES.all[0]), dash: LINES[line.stratum]?.[1] ?? "solid", width: line.stratum === State.stratum ? 3.2 : 1.7 },
        hovertemplate: `${escaped(State.site)}, layer %{x}<br>${escaped(line.stratum)} tokens: %{customdata}<extra>${escaped(run.label)}</extra>`,
      }));
      for (const [bound, value] of [["Gaussian floor", one.floor], ["ceiling", one.ceiling]]) {
        if (value === undefined || !log) continue;
        layout.shapes.push({ type: "line", xref: `x${suffix} domain`, yref: `y${suffix}`, x0: 0, x1: 1, y0: value, y1: value, line: { dash: "dot", width: 1, color: colour("muted") } });
        layout.annotations.push({ text: `${bound} ${numberText(value)}`, xref: `x${suffix} domain`, yref: `y${suffix}`, x: 1, y: Math.log10(value), xanchor: "right", yanchor: bound === "ceiling" ? "bottom" : "top", showarrow: false, font: { size: 10, color: colour("muted") } });
      }
      layout[`xaxis${suffix}`] = { ...axisLook(), domain: domain.x, anchor: `y${suffix}`, title: { text: "layer", standoff: 4 }, ...(one.layers.length < 12 ? { dtick: 1 } : {}) };
      layout[`yaxis${suffix}`] = { ...axisLook(), domain: domain.y, anchor: `x${suffix}`, ...(log ? { type: "log", range: [Math.log10(foot), Math.log10(top)], dtick: 1, tickformat: "~g" } : {}), title: { text: index && grid.rows === 1 ? "" : escaped(State.statistic), standoff: 6 } };
      if (State.layer !== null && one.layers.includes(State.layer)) layout.shapes.push(layerBand("x", suffix, State.layer - halfWidth(one.layers.length), State.layer + halfWidth(one.layers.length)));
      layout.annotations.push(panelTitle(runTitle(run), domain));
    });
    draw("profile-plot", traces, layout, (point) => State.set({ layer: point.x }));
  },

  series(run) {
    const entry = this.entry(run), packed = entry.statistics[State.statistic], step = stepPlace(run);
    return {
      layers: entry.layers, floor: packed.floor, ceiling: packed.ceiling,
      lines: entry.strata.map((stratum, which) => ({ stratum, y: entry.layers.map((_, layer) => at(packed, step, layer, which)) }))
        .filter((line) => line.y.some((value) => value !== null)),
    };
  },

  /* By step, of the chosen layer or the largest of all. */
  course() {
    const places = State.places().filter((place) => DATA.runs[place].steps.length > 1 && this.entry(DATA.runs[place])?.statistics[State.statistic]);
    visible("course-figure", places.length > 0);
    if (!places.length) return;
    const layout = baseLayout(300);
    layout.showlegend = places.length > 1;
    layout.legend = { orientation: "h", x: 0, y: 1, yanchor: "bottom" };
    const traces = places.map((place) => {
      const run = DATA.runs[place], course = run.course, entry = this.entry(run);
      const whole = course && course.site === State.site && course.strata.includes(State.stratum) && course.statistics[State.statistic];
      const source = whole ? course : entry, packed = whole || entry.statistics[State.statistic];
      const steps = whole ? course.steps : run.steps, which = source.strata.indexOf(State.stratum);
      const alone = source.layers.includes(State.layer);
      const layers = alone ? [source.layers.indexOf(State.layer)] : range(source.layers.length);
      const y = steps.map((_, step) => {
        const values = which < 0 ? [] : layers.map((layer) => (whole ? at(packed, which, layer, step) : at(packed, step, layer, which))).filter((value) => value !== null);
        return values.length ? Math.max(...values) : null;
      });
      return {
        x: steps, y: y.map((value) => (value > 0 ? value : null)), name: escaped(run.label), type: "scatter", mode: "lines+markers", marker: { size: 4 },
        line: { color: runColour(place), dash: DASHES[place % DASHES.length], width: 2 }, customdata: y.map(numberText),
        hovertemplate: `step %{x:,}<br>${escaped(State.site)}, ${alone ? `layer ${State.layer}` : "largest of all layers"}, ${escaped(State.stratum)} tokens: %{customdata}<extra>${escaped(run.label)}</extra>`,
      };
    });
    layout.xaxis = { ...axisLook(), title: { text: "step", standoff: 4 } };
    layout.yaxis = { ...axisLook(), type: "log", tickformat: "~g", dtick: 1, title: { text: escaped(State.statistic) } };
    layout.shapes.push({ type: "line", xref: "x", yref: "y domain", x0: State.step, x1: State.step, y0: 0, y1: 1, line: { color: colour("raised"), width: 2 } });
    draw("course-plot", traces, layout, (point) => Controls.chooseStep(point.x));
  },

  channels() {
    const places = State.places().filter((place) => DATA.runs[place].channels);
    visible("channels-figure", places.length > 0);
    if (!places.length) return;
    const stratum = places.some((place) => DATA.runs[place].channels.strata.includes(State.stratum)) ? State.stratum : "all";
    const top = Math.log10(Math.max(10, ...places.map((place) => this.highest(DATA.runs[place].channels))));
    this.maps("channels-plot", places, (run) => {
      const map = run.channels, step = stepPlace(run), which = Math.max(map.strata.indexOf(stratum), 0), columns = map.ratio.shape[3];
      return {
        x: range(columns).map((column) => (column * map.width) / columns), y: map.layers,
        z: map.layers.map((_, layer) => range(columns).map((column) => { const ratio = at(map.ratio, step, which, layer, column); return ratio === null ? null : Math.log10(ratio); })),
        customdata: map.layers.map((_, layer) => range(columns).map((column) => [at(map.channel, step, which, layer, column), numberText(at(map.ratio, step, which, layer, column))])),
        hovertemplate: `layer %{y}<br>channel %{customdata[0]}<br>%{customdata[1]} times the median channel<br>${map.strata[which]} tokens<extra>${escaped(run.label)}</extra>`,
      };
    }, { name: "magnitude", low: 0, high: top, x: "channel", bar: `× median channel, ${stratum} tokens`, ticks: range(Math.ceil(top) + 1), texts: range(Math.ceil(top) + 1).map((power) => (10 ** power).toLocaleString("en-US")) },
    (point) => State.set({ layer: point.y }));
  },

  highest(map) { return (map.highest ??= unpacked(map.ratio).reduce((most, value) => (value > most ? value : most), 0)); },

  sinks() {
    const places = State.places().filter((place) => DATA.runs[place].sinks);
    visible("sinks-figure", places.length > 0);
    if (!places.length) return;
    this.maps("sinks-plot", places, (run) => {
      const map = run.sinks, step = stepPlace(run);
      const z = map.layers.map((_, layer) => range(map.heads).map((head) => at(map.rate, step, layer, head)));
      return { x: range(map.heads), y: map.layers, z, customdata: z.map((row) => row.map(numberText)), hovertemplate: `layer %{y}, head %{x}<br>sink rate %{customdata}<extra>${escaped(run.label)}</extra>` };
    }, { name: "share", low: 0, high: 1, x: "head", bar: "sink rate", whole: true },
    (point) => State.set({ layer: point.y, head: point.x }));
  },

  /* Heat maps of several runs on one scale. */
  maps(id, places, mapOf, look, onClick) {
    const plot = document.getElementById(id), grid = panels(plot, places.length);
    const layout = baseLayout(grid.rows === 1 ? 330 : 240 * grid.rows);
    const traces = places.map((place, index) => {
      const run = DATA.runs[place], suffix = grid.suffix(index), domain = grid.place(index), map = mapOf(run);
      layout[`xaxis${suffix}`] = { ...axisLook(), domain: domain.x, anchor: `y${suffix}`, showgrid: false, title: { text: look.x, standoff: 4 }, ...(look.whole && map.x.length < 12 ? { dtick: 1 } : {}) };
      layout[`yaxis${suffix}`] = { ...axisLook(), domain: domain.y, anchor: `x${suffix}`, showgrid: false, title: { text: index && grid.rows === 1 ? "" : "layer", standoff: 6 }, ...(map.y.length < 10 ? { dtick: 1 } : {}) };
      layout.annotations.push(panelTitle(runTitle(run), domain));
      if (State.layer !== null && map.y.includes(State.layer)) layout.shapes.push(layerBand("y", suffix, State.layer - 0.5, State.layer + 0.5));
      if (look.whole && State.head !== null && State.head < map.x.length && map.y.includes(State.layer)) {
        layout.shapes.push({ type: "rect", xref: `x${suffix}`, yref: `y${suffix}`, x0: State.head - 0.5, x1: State.head + 0.5, y0: State.layer - 0.5, y1: State.layer + 0.5, line: { color: FRAME, width: 5 } });
      }
      return { ...map, type: "heatmap", coloraxis: "coloraxis", xaxis: `x${suffix}`, yaxis: `y${suffix}` };
    });
    layout.margin.r = 90;
    layout.coloraxis = { colorscale: colourScale(look.name), cmin: look.low, cmax: look.high, colorbar: { title: { text: look.bar, side: "right", font: { size: 11 } }, thickness: 12, outlinewidth: 0, ...(look.ticks ? { tickvals: look.ticks, ticktext: look.texts } : {}) } };
    draw(id, traces, layout, onClick);
  },

  all() { this.profile(); this.course(); this.channels(); this.sinks(); },
};
