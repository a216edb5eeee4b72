"use strict";
/* The controls, and who listens to them. */
const Controls = {
  steps: [...new Set(DATA.runs.flatMap((run) => (run.steps.length > 1 ? run.steps : [])))].sort((a, b) => a - b),

  start() {
    const profiles = DATA.runs.flatMap((run) => run.profiles);
    this.fill("site", profiles.map((profile) => profile.site));
    this.fill("statistic", profiles.flatMap((profile) => Object.keys(profile.statistics)));
    this.fill("stratum", profiles.flatMap((profile) => profile.strata));
    const numbers = (values) => [...new Set(values)].sort((a, b) => a - b);
    this.fill("layer", numbers(DATA.runs.flatMap((run) => [...run.profiles.flatMap((one) => one.layers), ...(run.sinks?.layers ?? [])])));
    this.fill("head", range(Math.max(0, ...DATA.runs.map((run) => run.sinks?.heads ?? 0))));
    visible("head-control", DATA.runs.some((run) => run.sinks));
    const first = (id) => document.getElementById(id).value || null;
    Object.assign(State, { site: first("site"), statistic: first("statistic"), stratum: first("stratum"), step: this.steps.at(-1) ?? 0 });
    const strongest = DATA.heads.flatMap((heads) => heads.rows.slice(0, 1)).sort((a, b) => (b.sink_rate ?? 0) - (a.sink_rate ?? 0))[0];
    if (strongest && strongest.sink_rate >= 0.5) Object.assign(State, { layer: strongest.layer, head: strongest.head });
    const all = document.querySelector("[name=run]"); // browsers keep what was chosen before a reload
    if (all) all.checked = true;
    this.wire();
    this.listen();
    Tables.wire();
    Figures.watch();
    this.theme(matchMedia("(prefers-color-scheme: dark)").matches);
    this.mirror();
    this.definition();
  },

  fill(id, values) {
    const select = document.getElementById(id);
    for (const value of new Set(values)) select.append(element("option", String(value), { value: String(value) }));
  },

  wire() {
    const placeOrNone = (value) => (value === "" ? null : Number(value));
    const on = (id, event, act) => document.getElementById(id)?.addEventListener(event, (happened) => act(happened.target));
    on("runs", "change", (target) => State.set({ run: target.value }));
    on("layer", "change", (target) => State.set({ layer: placeOrNone(target.value) }));
    on("head", "change", (target) => State.set({ head: placeOrNone(target.value) }));
    for (const key of ["site", "statistic", "stratum"]) on(key, "change", (target) => State.set({ [key]: target.value }));
    on("step", "input", (target) => State.set({ step: this.steps[Number(target.value)] }));
    on("theme", "click", () => this.theme(document.documentElement.dataset.theme !== "dark", true));
    on("print", "click", () => window.print());
    document.querySelectorAll("button.go").forEach((button) => button.addEventListener("click", () => {
      State.set({ layer: Number(button.dataset.layer), ...(button.dataset.head ? { head: Number(button.dataset.head) } : {}) });
      document.getElementById("explore").scrollIntoView();
    }));
    document.getElementById("definition").addEventListener("click", (event) => {
      const details = document.getElementById(decodeURIComponent(event.target.getAttribute("href").slice(1)));
      if (details) details.open = true;
    });
    const slider = document.getElementById("step");
    slider.max = Math.max(this.steps.length - 1, 0);
    visible("step-control", this.steps.length > 1);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (media) => { if (!this.picked) this.theme(media.matches); });
    matchMedia("print").addEventListener("change", () => { this.redraw(); Figures.everything(); });
    let waiting = null;
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(waiting); waiting = setTimeout(() => this.redraw(), 150); } });
  },

  listen() {
    State.on(["run"], () => { Tables.followRun(); Figures.all(); Explorer.all(); Heads.draw(); });
    State.on(["layer"], () => { Explorer.all(); Figures.mark(); Tables.followLayer(); });
    State.on(["head"], () => { Explorer.sinks(); Figures.mark(); });
    State.on(["layer", "head"], () => Heads.draw());
    State.on(["step"], () => { Explorer.all(); });
    State.on(["site", "statistic"], () => { Explorer.profile(); Explorer.course(); this.definition(); });
    State.on(["stratum"], () => { Explorer.profile(); Explorer.course(); Explorer.channels(); });
    State.on(["step", "layer", "head"], () => this.mirror());
  },

  chooseStep(step) {
    const near = this.steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), this.steps[0]);
    State.set({ step: near });
  },

  /* What was chosen in a chart shows in the controls too. */
  mirror() {
    document.getElementById("layer").value = State.layer ?? "";
    document.getElementById("head").value = State.head ?? "";
    const slider = document.getElementById("step");
    slider.value = Math.max(this.steps.indexOf(State.step), 0);
    const text = (State.step ?? 0).toLocaleString("en-US");
    slider.setAttribute("aria-valuetext", `step ${text}`);
    document.getElementById("step-shown").textContent = text;
  },

  definition() {
    const named = DATA.runs.flatMap((run) => run.profiles).map((profile) => profile.statistics[State.statistic]?.estimator).find(Boolean);
    const there = named && document.getElementById(`definition-${named}`);
    document.getElementById("definition").setAttribute("href", there ? `#${encodeURIComponent(`definition-${named}`)}` : "#definitions");
  },

  theme(dark, picked = false) {
    this.picked ||= picked;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    button.setAttribute("aria-pressed", String(dark));
    this.redraw();
  },

  redraw() { Explorer.all(); Heads.draw(); Figures.all(); Tables.followLayer(); },
};
Controls.start();
