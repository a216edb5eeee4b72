"use strict";
/* How the chosen head makes its sink: words, evidence, and the parts of its logit. */
const Heads = {
  selection() {
    return State.places().map((place) => {
      const heads = DATA.heads[place];
      const row = heads.rows.findIndex((one) => one.layer === State.layer && one.head === State.head);
      return { place, row, heads };
    }).filter((one) => one.row >= 0);
  },

  draw() {
    const any = State.places().some((place) => DATA.heads[place].rows.length);
    visible("head-figure", any);
    if (!any) return;
    const container = document.getElementById("head-facts"), selection = this.selection();
    this.open = container.querySelector("details")?.open ?? false; // stays as the reader left it
    container.replaceChildren();
    const title = selection.length ? `How layer ${State.layer}, head ${State.head} makes its sink` : "How a head makes its sink";
    document.getElementById("head-title").textContent = title;
    if (!selection.length) container.append(element("p", "Choose a layer and a head, above or in the map of sinks.", { className: "none" }));
    for (const one of selection) container.append(...this.words(one));
    this.parts(selection.filter((one) => one.heads.parts.channel && one.row < one.heads.parts.channel.shape[0]));
  },

  words({ place, row, heads }) {
    const facts = heads.rows[row];
    const words = [...new Set([facts.kind, facts.channel_use, facts.geometry])].join(", ");
    const evidence = Object.entries(facts).filter(([name, value]) => typeof value === "number" && !["layer", "head"].includes(name));
    const list = element("dl", "", { className: "facts" });
    for (const [name, value] of evidence) {
      const line = document.createElement("div");
      line.append(element("dt", name.replaceAll("_", " "), { title: DATA.head_words[name] ?? "" }), element("dd", numberText(value)));
      list.append(line);
    }
    const details = Object.assign(document.createElement("details"), { open: this.open });
    details.append(element("summary", "Evidence"), list);
    return [element("p", `${DATA.runs[place].label}: ${words}`), details];
  },

  parts(selection) {
    visible("head-plot", selection.length > 0);
    if (!selection.length) return;
    const grid = panels(document.getElementById("head-plot"), 2);
    const layout = baseLayout((grid.rows === 1 ? 220 : 400) * selection.length + 40), traces = [], count = selection.length;
    selection.forEach((one, index) => {
      const run = DATA.runs[one.place], low = 1 - (index + 1) / count + 0.2 / count, high = 1 - index / count - 0.04;
      ["channel", "frequency"].forEach((kind, which) => {
        const packed = one.heads.parts[kind];
        if (!packed) return;
        const suffix = grid.suffix(2 * index + which), place = grid.place(which), size = packed.shape[1];
        const domain = { x: place.x, y: place.y.map((edge) => low + edge * (high - low)) };
        const y = range(size).map((part) => at(packed, one.row, part));
        traces.push({ type: "bar", x: range(size), y, xaxis: `x${suffix}`, yaxis: `y${suffix}`, marker: { color: shade(LINES[which ? "first" : "all"][0]) }, customdata: y.map(numberText), hovertemplate: `${kind} %{x}: %{customdata}<extra>${escaped(run.label)}, layer ${State.layer}, head ${State.head}</extra>` });
        layout[`xaxis${suffix}`] = { ...axisLook(), domain: domain.x, anchor: `y${suffix}`, title: { text: kind === "channel" ? "channel of the head" : "rotary frequency, fastest first", standoff: 4 } };
        layout[`yaxis${suffix}`] = { ...axisLook(), domain: domain.y, anchor: `x${suffix}`, title: { text: which ? "" : "part of the logit" } };
        if (!which) layout.annotations.push(panelTitle(run.label, domain));
      });
    });
    draw("head-plot", traces, layout);
  },
};
