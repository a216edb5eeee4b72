"use strict";
/* Figures are drawn for paper. On a page they take its ground, and on a dark one its grid and light lines. */
const Themes = {
  /* A copy with colours for the page: `look` says whether it is dark, the colour of its grid, and those of the
     runs, which are the same on any ground. */
  themed(value, look, key = "") {
    if (Array.isArray(value)) return key === "colorscale" ? value : value.map((one) => (one !== null && typeof one === "object" ? this.themed(one, look, key) : one));
    if (value !== null && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, this.themed(one, look, name)]));
    if (typeof value !== "string" || !/colou?r$/.test(key)) return value;
    if (/bgcolor$|backgroundcolor$/.test(key)) return "rgba(0,0,0,0)";
    if (!look.dark || look.runs.includes(value)) return value;
    if (key === "gridcolor") return look.grid;
    return this.lighter(value);
  },

  /* Dark colours become light ones of the same hue; pale tints, which stand back on white, become dark. */
  lighter(text) {
    const digits = /^#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})$/i.exec(text);
    if (!digits) return text;
    const parts = digits.slice(1).map((part) => parseInt(part, 16) / 255);
    const high = Math.max(...parts), low = Math.min(...parts), spread = high - low, light = (high + low) / 2;
    if (light === 1) return text; // marks on maps
    const grey = spread < 0.04;
    const turn = grey ? 0 : high === parts[0] ? (parts[1] - parts[2]) / spread : high === parts[1] ? 2 + (parts[2] - parts[0]) / spread : 4 + (parts[0] - parts[1]) / spread;
    const saturation = grey ? 0 : Math.max(0.45, spread / (1 - Math.abs(2 * light - 1)));
    const pale = light > 0.7 && spread < 0.25;
    const lightness = grey ? Math.max(0.82 - light * 0.3, light) : pale ? 0.36 : Math.max(light, 0.68);
    return `hsl(${Math.round((turn * 60 + 360) % 360)}, ${Math.round(saturation * 100)}%, ${Math.round(lightness * 100)}%)`;
  },
};
