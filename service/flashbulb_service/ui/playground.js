// The playground: a form, the run under way, the runs before it, and the request as text. No library, no state but
// what stands on the page.

import { ask, askJson, dropKey, hasKey, keepKey, Refusal, refusalOf } from "./server.js";
import {
  asCurl,
  asPython,
  bodyOf,
  MAX_SEEDS,
  parseSeeds,
  videoAsCurl,
  videoAsPython,
  videoBodyOf,
} from "./request.js";
import { element, Run } from "./run.js";
import { VideoRun } from "./video.js";

const MAX_HISTORY = 24;
const ANSWER_MS = 3000;
const $ = (id) => document.getElementById(id);
const form = $("form");
let models = [];
let tab = "images"; // or "videos"

// What differs between the tabs.
const TABS = {
  images: { task: "text-to-image", Run, body: bodyOf, curl: asCurl, python: asPython, draw: "Draw", busy: "Drawing …", title: "Pictures" },
  videos: {
    task: "text-to-video",
    Run: VideoRun,
    body: videoBodyOf,
    curl: videoAsCurl,
    python: videoAsPython,
    draw: "Make video",
    busy: "Working …",
    title: "Videos",
  },
};
let running = null; // { run, controller } under way
let shown = null; // the finished run that stands in the result

function showState(kind, text) {
  $("state").dataset.kind = kind;
  $("state").textContent = text;
}

function showError(title, detail = "") {
  const box = $("error");
  box.replaceChildren(element("strong", title));
  if (detail) box.append(element("small", detail));
  box.hidden = false;
}

function askForKey() {
  dropKey();
  showState("bad", "key needed");
  $("access").hidden = false;
  $("key").value = "";
  $("key").focus();
}

// ------------------------------------------------------------------------------------------ the form

function chosenModel() {
  return models.find((model) => model.id === $("model").value);
}

function choice() {
  return {
    model: $("model").value,
    prompt: $("prompt").value.trim(),
    count: Number($("count").value) || 1,
    size: $("size").value,
    seconds: $("seconds").value,
  };
}

function fitting() {
  return models.filter((model) => model.task === TABS[tab].task);
}

function checkSeeds() {
  const seeds = parseSeeds($("seed").value);
  $("seed").setCustomValidity(seeds ? "" : `Up to ${MAX_SEEDS} numbers, such as 7 or 7, 9 or 7-10; empty for a random one.`);
  return seeds;
}

function showRequest(bodies) {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  $("curl").textContent = TABS[tab].curl(base, bodies, hasKey());
  $("python").textContent = TABS[tab].python(base, bodies, hasKey());
}

function refreshRequest() {
  const seeds = checkSeeds() ?? [];
  const asked = { ...choice(), prompt: choice().prompt || $("prompt").placeholder };
  showRequest((seeds.length ? seeds : [undefined]).map((seed) => TABS[tab].body(asked, seed)));
}

function showTab(name) {
  tab = name;
  for (const other of Object.keys(TABS)) {
    $(`tab-${other}`).setAttribute("aria-selected", String(other === tab));
    $(`tab-${other}`).tabIndex = other === tab ? 0 : -1;
  }
  $("count-field").hidden = tab === "videos";
  $("count").disabled = tab === "videos"; // what cannot be seen is not to be checked
  $("seconds-field").hidden = tab === "images";
  $("prompt").placeholder = tab === "videos" ? "rocket flying up" : "red apple";
  form.setAttribute("aria-label", tab === "videos" ? "Make videos" : "Draw pictures");
  if (!running) $("draw").textContent = TABS[tab].draw;
  $("model").replaceChildren(...fitting().map((model) => element("option", model.id, { value: model.id })));
  fillSizes();
  refreshRequest();
}

function fillSizes() {
  const sizes = chosenModel()?.sizes ?? [];
  $("size").replaceChildren(...sizes.map((size) => element("option", size.replace("x", " × "), { value: size })));
  const lengths = chosenModel()?.seconds ?? [];
  $("seconds").replaceChildren(...lengths.map((length) => element("option", `${length} s`, { value: length })));
}

// ------------------------------------------------------------------------------------------ the run

async function draw() {
  const given = checkSeeds();
  const seeds = given.length ? given : [Math.floor(Math.random() * 2 ** 31)];
  const run = new TABS[tab].Run(choice(), seeds, showProgress);
  run.tab = tab;
  const controller = new AbortController();
  keepShown();
  running = { run, controller };
  $("error").hidden = true;
  $("empty").hidden = true;
  $("timings").hidden = true;
  $("pictures").replaceChildren(run.grid);
  $("result-title").textContent = TABS[tab].title;
  showRequest(seeds.map((seed) => TABS[tab].body(run.choice, seed)));
  setBusy(true);
  showProgress(run);
  try {
    await run.start(controller.signal);
    if (run.error) showError(run.error.message, run.error.code);
    showState("good", "ready");
  } catch (error) {
    explain(error);
  } finally {
    running = null;
    run.dropPending();
    finish(run);
    setBusy(false);
  }
}

function explain(error) {
  if (error.name === "AbortError") return;
  if (error instanceof Refusal) {
    showError(error.message, error.detail);
    if (error.status === 401) askForKey();
    return;
  }
  showState("bad", "no answer");
  showError("The server does not answer.", "Start it with: flashbulb serve");
}

function finish(run) {
  if (!run.done) {
    $("pictures").replaceChildren();
    $("empty").hidden = false;
    if (run.stopped) $("live").textContent = `Stopped before a ${run.noun} was ${run.verb}.`;
    return;
  }
  shown = run;
  $("live").textContent = run.stopped
    ? `Stopped: ${run.done} of ${run.total} ${run.noun}s ${run.verb}.`
    : `${run.done} ${run.noun}${run.done === 1 ? "" : "s"} ${run.verb}.`;
  showTimings(run);
}

function showProgress(run) {
  if (running?.run !== run) return;
  $("bar").max = run.total;
  $("bar").value = run.fraction;
  $("status").textContent = run.status;
}

function showTimings(run) {
  const { queue, batch, encode, total, rows } = run.timings;
  const lines = [
    ["In the queue", queue],
    ["Model", batch],
    ["Encoding", encode],
    ["In all", total],
  ].map(([name, ms]) => [name, `${ms < 100 ? ms.toFixed(1) : Math.round(ms)} ms`]);
  lines.push(["Batch", `${rows} ${run.noun}${rows === 1 ? "" : "s"}`]);
  lines.push(["Model used", [...run.jobs.values()][0].model]);
  lines.push([run.seeds.length > 1 ? "Seeds" : "Seed", run.seeds.join(", ")]);
  $("timings").replaceChildren(
    ...lines.map(([name, value]) => {
      const line = element("div");
      line.append(element("dt", name), element("dd", value));
      return line;
    }),
  );
  $("timings").hidden = false;
}

async function stop() {
  if (!running) return;
  $("stop").disabled = true;
  const { run, controller } = running;
  await run.stop(); // the streams then tell that the jobs were cancelled
  // What is on its way is cancelled when its answer comes; a server that does not answer is not waited for.
  if (!run.jobs.size) setTimeout(() => run.jobs.size || controller.abort(), ANSWER_MS);
}

function setBusy(busy) {
  $("result").setAttribute("aria-busy", String(busy));
  $("draw").disabled = busy || models.length === 0;
  $("draw").textContent = busy ? TABS[tab].busy : TABS[tab].draw;
  $("stop").hidden = !busy;
  $("stop").disabled = false;
  $("progress").hidden = !busy;
}

// ------------------------------------------------------------------------------------------ the history

// Move the run that stands in the result to the history, the newest first.
function keepShown() {
  if (!shown) return;
  const run = shown;
  shown = null;
  const { prompt, model, size, count } = run.choice;
  const entry = element("li");
  const strip = element("div", undefined, { class: "strip" });
  for (const [key, source] of run.images) {
    strip.append(element("img", undefined, { src: source, alt: `${prompt}, ${String(key).replace("/", ", picture ")}` }));
  }
  const text = element("div", undefined, { class: "what" });
  text.append(element("strong", prompt), element("small", `${model}, ${size}, seed ${run.seeds.join(", ")}`));
  const again = element("button", "Use again", { type: "button", "aria-label": `Use again: ${prompt}` });
  again.addEventListener("click", () => {
    showTab(run.tab);
    $("prompt").value = prompt;
    $("model").value = model;
    fillSizes();
    $("size").value = size;
    if (run.choice.seconds) $("seconds").value = run.choice.seconds;
    $("count").value = count;
    $("seed").value = run.seeds.join(", ");
    refreshRequest();
    $("prompt").focus();
  });
  entry.append(strip, text, again);
  $("runs").prepend(entry);
  while ($("runs").children.length > MAX_HISTORY) $("runs").lastElementChild.remove();
  $("history").hidden = false;
}

// ------------------------------------------------------------------------------------------ the start

async function start() {
  setBusy(false);
  try {
    models = (await askJson("v1/models")).data;
  } catch (error) {
    if (error instanceof Refusal && [401, 403].includes(error.status)) {
      if (hasKey() || error.status === 403) showError(error.message, error.detail);
      askForKey();
      return;
    }
    showState("bad", "no answer");
    showError("The list of models could not be read.", "Reload the page when the server runs again.");
    return;
  }
  const offered = Object.keys(TABS).filter((name) => models.some((model) => model.task === TABS[name].task));
  $("tabs").hidden = offered.length < 2;
  showTab(offered.includes(tab) ? tab : (offered[0] ?? tab));
  setBusy(false);
  await checkReady();
}

async function checkReady() {
  const ready = await ask("readyz").catch(() => null);
  if (ready?.ok) {
    $("error").hidden = true;
    showState("good", "ready");
  } else {
    showState("bad", "no worker");
    if (ready) {
      const refusal = await refusalOf(ready);
      showError(refusal.message, refusal.detail);
    }
  }
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey($("key").value.trim());
  $("access").hidden = true;
  $("error").hidden = true;
  start();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && models.length) draw();
});
form.addEventListener("input", refreshRequest);
$("model").addEventListener("change", () => {
  fillSizes();
  refreshRequest();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
addEventListener("focus", () => {
  if ($("state").textContent === "no worker") checkReady(); // one may have come meanwhile
});
$("stop").addEventListener("click", stop);
for (const name of Object.keys(TABS)) {
  $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    showTab(tab === "images" ? "videos" : "images");
    $(`tab-${tab}`).focus();
  });
}
$("clear").addEventListener("click", () => {
  $("runs").replaceChildren();
  $("history").hidden = true;
  $("prompt").focus();
});
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = $(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source); // no clipboard outside https and localhost: select for Ctrl-C
      button.textContent = "Press Ctrl-C";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

start();
