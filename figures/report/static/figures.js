"use strict";
/* The figures of the registry: the variant of the run that is shown, in the colours of the theme, with the
   chosen layer marked on every axis that counts layers, and the chosen head where it counts heads too. */
const Figures = {
  stale: new Set(),
  near: new Set(),

  /* A figure is drawn when it comes near the window, and all are before the page is printed. */
  watch() {
    const watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) this.near[isIntersecting ? "add" : "delete"](target);
      this.drawNear();
    }, { rootMargin: "600px" });
    document.querySelectorAll("figure.drawn").forEach((figure) => watcher.observe(figure));
    addEventListener("beforeprint", () => this.everything());
  },

  all() {
    document.querySelectorAll("figure.drawn").forEach((figure) => {
      const variant = this.variant(figure);
      figure.hidden = !variant;
      if (!variant) return;
      figure.querySelector("figcaption").textContent = variant.caption;
      figure.querySelector(".plot").style.cssText = `width: ${variant.layout.width}px; min-height: ${variant.layout.height}px`;
      this.stale.add(figure);
    });
    this.drawNear();
  },

  variant(figure) {
    const variants = DATA.figures[Number(figure.dataset.figure)], variant = variants[State.run];
    return typeof variant === "string" ? variants[variant] : variant; // of one run, all is that one
  },

  drawNear() { for (const figure of this.near) if (this.stale.has(figure)) setTimeout(() => this.draw(figure)); },
  everything() { for (const figure of this.stale) this.draw(figure); },

  draw(figure) {
    const variant = this.variant(figure), plot = figure.querySelector(".plot");
    if (!this.stale.delete(figure) || !variant) return;
    const layout = this.themed(variant.layout);
    layout.modebar = { bgcolor: "rgba(0,0,0,0)" };
    layout.shapes = [...(layout.shapes ?? []), ...this.marks(variant)];
    Plotly.react(plot, this.themed(variant.data).map((trace) => this.unfactored(trace)), layout, CONFIG);
    if (!plot.dataset.listens) {
      plot.dataset.listens = "yes";
      plot.on("plotly_click", (event) => this.choose(figure, event.points[0]));
    }
  },

  /* The chosen layer has changed: nothing is drawn anew but the marks. */
  mark() {
    document.querySelectorAll("figure.drawn").forEach((figure) => {
      const variant = this.variant(figure);
      if (!variant || this.stale.has(figure) || !this.layerAxes(variant.layout).length) return;
      Plotly.relayout(figure.querySelector(".plot"), { shapes: [...(this.themed(variant.layout.shapes ?? [])), ...this.marks(variant)] });
    });
  },

  /* Texts of rows and columns become those of cells. */
  unfactored(trace) {
    if (!trace.text?.rows) return trace;
    return { ...trace, text: trace.text.rows.map((row) => trace.text.columns.map((column) => `${row}<br>${column}`)) };
  },

  choose(figure, point) {
    const axes = this.layerAxes(this.variant(figure).layout);
    const hit = axes.find((one) => point[`${one.axis}axis`]?._id === one.axis + one.suffix);
    if (!hit) return;
    const value = point[hit.axis];
    if (hit.heads) State.set({ layer: Math.floor(value / hit.heads), head: value % hit.heads });
    else State.set({ layer: Math.round(value) });
  },

  /* Axes whose title says so, those that match one, and untitled ones above or below one. */
  layerAxes(layout) {
    const axes = [];
    const all = Object.entries(layout).filter(([key]) => /^[xy]axis\d*$/.test(key));
    const titled = (axis) => (axis.title?.text ?? "").split("<")[0];
    for (const [key, axis] of all) {
      const words = /^layer(?:, (\d+) heads each)?$/.exec(titled(axis));
      if (words) axes.push({ key, axis: key[0], suffix: key.slice(5), heads: words[1] ? Number(words[1]) : null, domain: axis.domain });
    }
    for (const [key, axis] of all) {
      if (titled(axis) || axes.some((one) => one.key === key)) continue;
      const like = axes.find((one) => one.axis === key[0] && (axis.matches === one.axis + one.suffix || (key[0] === "x" && axis.domain?.[0] === one.domain?.[0])));
      if (like) axes.push({ ...like, key, suffix: key.slice(5) });
    }
    return axes;
  },

  marks(variant) {
    if (State.layer === null) return [];
    return this.layerAxes(variant.layout).flatMap((one) => {
      const values = variant.data.filter((trace) => (trace[`${one.axis}axis`] ?? one.axis) === one.axis + one.suffix).flatMap((trace) => trace[one.axis]);
      const layers = Math.floor(Math.max(...values) / (one.heads ?? 1)) + 1;
      if (State.layer >= layers) return []; // of a deeper model; a mark there would stretch the axis
      const half = one.axis === "x" ? halfWidth(layers) : 0.5;
      if (!one.heads) return layerBand(one.axis, one.suffix, State.layer - half, State.layer + half);
      const first = State.layer * one.heads - 0.5;
      const inside = State.head !== null && State.head < one.heads;
      return inside ? layerBand(one.axis, one.suffix, first + State.head, first + State.head + 1) : layerBand(one.axis, one.suffix, first, first + one.heads);
    });
  },

  themed(value) { return Themes.themed(value, { dark: isDark(), grid: colour("line"), runs: DATA.colours.runs }); },
};
