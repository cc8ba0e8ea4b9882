"use strict";

// Tables: the heads become buttons; a click sorts by that column, another one the other way round.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
};

function compare(a, b) {
  if (typeof a === typeof b) {
    return typeof a === "number" ? a - b : a.localeCompare(b, "en");
  }
  return typeof a === "number" ? -1 : 1; // what is unknown comes last
}

function sortBy(head, table) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  rows.sort((a, b) => (down ? -1 : 1) * compare(valueOf(a, head.cellIndex), valueOf(b, head.cellIndex)));
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(head, table));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  }
}

// Lists: a field above shows only the items that hold all the words in it.
for (const [number, list] of document.querySelectorAll("[data-filter]").entries()) {
  const items = [...list.querySelectorAll("[data-item]")];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const field = document.createElement("p");
  field.className = "filter";
  const label = document.createElement("label");
  label.textContent = "Search";
  const what = document.createElement("span");
  what.className = "unseen";
  what.textContent = ` in: ${list.dataset.filter}`;
  label.append(what);
  const input = document.createElement("input");
  input.type = "search";
  input.id = `filter-${number}`;
  label.htmlFor = input.id;
  const count = document.createElement("output");
  count.htmlFor.add(input.id);
  field.append(label, input, count);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    let shown = 0;
    items.forEach((item, place) => {
      item.hidden = !words.every((word) => texts[place].includes(word));
      shown += item.hidden ? 0 : 1;
    });
    count.textContent = input.value.trim() ? `${shown} of ${items.length}` : "";
  });
  if (list.matches("section")) list.querySelector("h3, ol").before(field);
  else list.before(field);
}

// run.js, which the stages write beside this page's folder, calls `stage` once for each of them. An <object> is asked
// for it first: unlike a missing script, a missing object is no error in the console.
const there = document.getElementById("run-there");
const ran = [];

function stage(record) {
  ran.push(record);
}

function showRun() {
  const body = there.querySelector("tbody");
  for (const { name, seconds, peak_gb: peak, commit } of ran) {
    const row = body.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    for (const [number, digits] of [[seconds, 1], [peak, 2]]) {
      const cell = row.insertCell();
      cell.className = "number";
      cell.dataset.value = number;
      cell.textContent = number.toFixed(digits);
    }
    row.insertCell().textContent = commit;
  }
  const last = ran.at(-1);
  const sum = ran.reduce((total, { seconds }) => total + seconds, 0);
  const versions = Object.entries(last.versions).map(([name, version]) => `${name} ${version}`);
  document.getElementById("run-about").textContent =
    `${Math.round(sum)} seconds in all, at most ${Math.max(...ran.map((r) => r.peak_gb)).toFixed(2)} GB. `
    + `The last stage ran with ${versions.join(", ")}.`;
  there.hidden = false;
  document.getElementById("run-none").hidden = true;
}

if (there) {
  const probe = document.createElement("object");
  probe.type = "text/plain";
  probe.data = "../run.js";
  probe.className = "unseen";
  probe.setAttribute("aria-hidden", "true");
  probe.tabIndex = -1;
  probe.addEventListener("error", () => probe.remove());
  probe.addEventListener("load", () => {
    const script = document.createElement("script");
    script.src = probe.data;
    script.addEventListener("load", () => ran.length && showRun());
    document.body.append(script);
    probe.remove();
  });
  document.body.append(probe);
}
