"use strict";
/* What is chosen, and who wants to know. Text from runs reaches the page only through textContent, or
   through escaped(), since plotly reads some HTML in its labels. */
const DATA = JSON.parse(document.getElementById("data").textContent);

const State = {
  run: "all", step: null, layer: null, head: null, site: null, statistic: null, stratum: "all",
  listeners: [],
  set(changes) {
    Object.assign(this, changes);
    const keys = Object.keys(changes);
    this.listeners.filter(([watched]) => watched.some((key) => keys.includes(key))).forEach(([, act]) => act());
  },
  on(keys, act) { this.listeners.push([keys, act]); },
  places() { return DATA.runs.map((_, place) => place).filter((place) => this.run === "all" || Number(this.run) === place); },
};

/* Arrays come as base64: 4-byte floats, 2-byte whole numbers, or 2-byte logarithms. */
function unpacked(packed) {
  if (packed.values) return packed.values;
  const text = atob(packed.data);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  if (packed.kind === "f4") packed.values = new Float32Array(bytes.buffer);
  else {
    const codes = new Uint16Array(bytes.buffer);
    const factor = Math.log(packed.high / packed.low) / 65534;
    packed.values = packed.kind === "u2" ? codes
      : Float32Array.from(codes, (code) => (code === 65535 ? NaN : packed.low * Math.exp(code * factor)));
  }
  packed.data = null;
  return packed.values;
}

/* The value at places along the array's dimensions. */
function at(packed, ...places) {
  let flat = 0;
  packed.shape.forEach((size, dim) => { flat = flat * size + places[dim]; });
  const value = unpacked(packed)[flat];
  return Number.isFinite(value) ? value : null;
}

function range(count) { return Array.from({ length: count }, (_, place) => place); }

function escaped(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%\u200b{");
}

function numberText(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "not known";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

/* The place of the step shown in a run: the last one not after the slider's. */
function stepPlace(run) {
  const later = run.steps.findIndex((step) => step > State.step);
  return later === -1 ? run.steps.length - 1 : Math.max(later - 1, 0);
}

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text ?? "" }, properties);
}
