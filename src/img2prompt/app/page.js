"use strict";

const at = (id) => document.getElementById(id);
const fill = (root, selector, text) => {
  const found = root.querySelector(selector);
  found.textContent = text;
  return found;
};
const fresh = (template) => at(template).content.firstElementChild.cloneNode(true);
const percent = (share) => (share < 0.01 ? "< 1%" : `${Math.round(100 * share)}%`);
const seconds = (count) => new Promise((resume) => setTimeout(resume, 1000 * count));
const TRIES = 5; // while the server says that it is full

let limit = Infinity;
let turn = Promise.resolve(); // pictures are sent one after another: the server shares its time among those who ask

// One picture: a place in the list at once, its answer when it is there.
function add(file, name) {
  const result = fresh("result");
  fill(result, ".name", name);
  const image = result.querySelector(".given img");
  image.addEventListener("error", () => {
    image.hidden = true;
    result.querySelector(".lost").hidden = false;
  });
  image.src = URL.createObjectURL(file);
  at("results").hidden = false;
  at("results").querySelector("ol").prepend(result);
  at("results").scrollIntoView();
  turn = turn.then(() => answer(file, name, result));
}

async function answer(file, name, result) {
  try {
    const found = await ask(file, (text) => fill(result, ".state", text));
    show(found, name, result);
    at("said").textContent = `${name}: ${found.prompt}`;
  } catch (error) {
    fill(result, ".state", error.message).classList.add("error");
    at("said").textContent = `${name}: not answered: ${error.message}`;
  }
}

async function ask(file, tell) {
  if (file.type && !file.type.startsWith("image/")) throw new Error("it is no picture");
  if (file.size > limit) throw new Error(`it is larger than ${limit >> 20} MB`);
  for (let left = TRIES; ; left -= 1) {
    tell("Waiting for the answer …");
    const form = new FormData();
    form.append("image", file);
    const response = await fetch("predict", { method: "POST", body: form }).catch(() => {
      throw new Error("the server does not answer");
    });
    const found = await response.json().catch(() => ({ error: `the server says ${response.status}` }));
    if (response.status === 503 && left > 1) {
      const wait = Number(response.headers.get("Retry-After")) || 1;
      tell(`The server is busy; asking again in ${wait} s …`);
      await seconds(wait);
      continue;
    }
    const one = found.images ? found.images[0] : found;
    if (one.error) throw new Error(one.error);
    return one;
  }
}

function show(found, name, result) {
  const image = (text) => {
    const small = document.createElement("img");
    small.alt = "";
    small.src = found.thumbnails[text];
    return small;
  };
  fill(result, ".prompt", found.prompt);
  fill(result, ".under b", found.prompt_cosine.toFixed(3));
  const button = result.querySelector(".copy");
  button.addEventListener("click", () => copy(button, result.querySelector(".prompt")));
  for (const { word, probability } of found.words) {
    const item = fresh("word");
    fill(item, ".word", word);
    item.querySelector(".bar span").style.width = `${100 * probability}%`;
    fill(item, ".number", percent(probability));
    result.querySelector(".words").append(item);
  }
  for (const { prompt, cosine } of found.nearest) {
    const item = fresh("near");
    if (found.thumbnails[prompt]) item.prepend(image(prompt));
    fill(item, ".text", prompt);
    fill(item, ".number", cosine.toFixed(3));
    result.querySelector(".nearest").append(item);
  }
  showModels(found.models, result.querySelector("table"), (text) => (found.thumbnails[text] ? [image(text)] : []));
  result.querySelector(".scroll").setAttribute("aria-label", `The models on ${name}`);
  result.querySelector(".state").hidden = true;
  result.querySelector(".answer").hidden = false;
}

function showModels(models, table, image) {
  const [top, names] = table.tHead.rows;
  top.cells[4].colSpan = models.length;
  const head = (row, text, scope, kind) => {
    const cell = document.createElement("th");
    cell.scope = scope;
    cell.className = kind;
    cell.textContent = text;
    row.append(cell);
  };
  const number = (row, value) => {
    const cell = row.insertCell();
    cell.className = "number";
    cell.textContent = value.toFixed(3);
  };
  for (const { model } of models) head(names, model, "col", "number");
  for (const { model, weight, prompt, cosine, cosines } of models) {
    const row = table.tBodies[0].insertRow();
    head(row, model, "row", "");
    number(row, weight);
    const cell = row.insertCell();
    const both = fresh("both");
    both.prepend(...image(prompt));
    fill(both, ".text", prompt);
    cell.append(both);
    number(row, cosine);
    for (const other of models) number(row, cosines[other.model]);
  }
}

async function copy(button, prompt) {
  try {
    await navigator.clipboard.writeText(prompt.textContent);
  } catch { // browsers have a clipboard for scripts only on this machine or behind TLS
    getSelection().selectAllChildren(prompt);
    document.execCommand("copy");
  }
  const before = button.textContent;
  button.textContent = "Copied";
  at("said").textContent = "Copied";
  await seconds(2);
  button.textContent = before;
}

// The ways in which pictures come.
const addAll = (files) => [...files].forEach((file) => add(file, file.name));

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => {
    addAll(input.files);
    input.value = ""; // so that the same picture can be chosen again
  });
}
document.addEventListener("paste", (event) => addAll(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  addAll(event.dataTransfer.files);
});

async function samples() {
  for (const { prompt, image } of await (await fetch("samples")).json()) {
    const item = fresh("sample");
    const small = item.querySelector("img");
    small.src = image;
    small.alt = prompt;
    item.querySelector("button").addEventListener("click", async () => {
      const blob = await (await fetch(image)).blob();
      add(new File([blob], "sample.jpg", { type: blob.type }), `A picture of “${prompt}”`);
    });
    at("samples").querySelector("ul").append(item);
    at("samples").hidden = false;
  }
}

async function health() {
  const { bundle, limits } = await (await fetch("health")).json();
  at("bundle").textContent = `, ${bundle}`;
  limit = limits.bytes;
  at("limit").textContent = `At most ${limit >> 20} MB and ${limits.pixels / 1e6} million pixels each.`;
}

samples();
health();
