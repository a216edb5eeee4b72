"use strict";
/* Tables that sort by their headings, follow the run and the layer, and can be taken away. */
const Tables = {
  wire() {
    document.querySelectorAll("table[data-name]").forEach((table) => {
      table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => this.sort(table, column)));
      table.closest(".table").querySelector(".csv").addEventListener("click", () => this.save(table));
    });
  },

  sort(table, column) {
    const heads = [...table.querySelectorAll("th")];
    const falling = heads[column].getAttribute("aria-sort") === "descending" ? false : heads[column].getAttribute("aria-sort") === "ascending" || this.numeric(table, column);
    heads.forEach((head, place) => head.setAttribute("aria-sort", place !== column ? "none" : falling ? "descending" : "ascending"));
    const body = table.tBodies[0], sign = falling ? -1 : 1;
    const rows = [...body.rows].map((row) => [row, this.value(row.cells[column])]);
    rows.sort(([, a], [, b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not known comes last either way
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    });
    body.append(...rows.map(([row]) => row));
  },

  numeric(table, column) { return [...table.tBodies[0].rows].some((row) => row.cells[column].dataset.value !== undefined); },
  value(cell) { return cell.dataset.value === undefined ? cell.textContent : cell.dataset.value === "" ? "" : Number(cell.dataset.value); },

  csv(table) {
    // A spreadsheet would take a text that begins like one for a formula.
    const quoted = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
    const heads = [...table.querySelectorAll("th button")].map((head) => quoted(head.textContent));
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => [...row.cells].map((cell) => {
      const value = this.value(cell);
      return typeof value === "number" ? String(value) : quoted(value);
    }));
    return [heads, ...rows].map((row) => row.join(",")).join("\r\n") + "\r\n";
  },

  save(table) {
    const address = URL.createObjectURL(new Blob([this.csv(table)], { type: "text/csv" }));
    element("a", "", { href: address, download: `${table.dataset.name}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  },

  followRun() {
    document.querySelectorAll(".run[data-run], tr[data-run]").forEach((one) => { one.hidden = State.run !== "all" && one.dataset.run !== State.run; });
  },

  followLayer() {
    document.querySelectorAll("table[data-name]").forEach((table) => {
      const column = [...table.querySelectorAll("th button")].findIndex((head) => head.textContent === "layer");
      if (column < 0) return;
      for (const row of table.tBodies[0].rows) row.classList.toggle("chosen", State.layer !== null && Number(row.cells[column].textContent) === State.layer);
    });
  },
};
