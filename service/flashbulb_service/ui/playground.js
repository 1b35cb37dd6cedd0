// The playground: a form, the pictures of the last request, and that request as text. No library, no state
// but what stands on the page.

const $ = (id) => document.getElementById(id);
const form = $("form");
let models = [];
let running = null; // the AbortController of the request under way

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

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

// ------------------------------------------------------------------------------------------ the key

const KEY = "flashbulb-key"; // in the session's storage: gone with the tab

function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, key ? { ...options, headers: { ...options.headers, authorization: `Bearer ${key}` } } : options);
}

function askForKey() {
  sessionStorage.removeItem(KEY);
  showState("bad", "key needed");
  $("access").hidden = false;
  $("key").value = "";
  $("key").focus();
}

// ------------------------------------------------------------------------------------------ the request

function chosenModel() {
  return models.find((model) => model.id === $("model").value);
}

function requestBody(seed) {
  const body = { model: $("model").value, prompt: $("prompt").value.trim() || $("prompt").placeholder };
  body.n = Number($("count").value) || 1;
  body.size = $("size").value || "auto";
  if (/^\d{1,15}$/.test(seed)) body.seed = Number(seed); // anything else, the field itself refuses
  return body;
}

function pythonText(value) {
  return JSON.stringify(value); // a JSON string is a Python string
}

function shellText(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function asCurl(body) {
  return [
    `curl ${location.origin}/v1/images/generations \\`,
    ...(sessionStorage.getItem(KEY) ? [`  -H "Authorization: Bearer $FLASHBULB_API_KEY" \\`] : []),
    `  -H 'Content-Type: application/json' \\`,
    `  -d ${shellText(JSON.stringify(body))}`,
  ].join("\n");
}

function asPython(body) {
  const withKey = sessionStorage.getItem(KEY) !== null; // named, never shown
  const key = withKey ? 'os.environ["FLASHBULB_API_KEY"]' : '"none"';
  const lines = [
    "import base64",
    ...(withKey ? ["import os"] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonText(`${location.origin}/v1`)}, api_key=${key})`,
    "answer = client.images.generate(",
    `    model=${pythonText(body.model)},`,
    `    prompt=${pythonText(body.prompt)},`,
    `    n=${body.n},`,
    `    size=${pythonText(body.size)},`,
  ];
  if (body.seed !== undefined) lines.push(`    extra_body={"seed": ${body.seed}},`);
  lines.push(
    ")",
    "for i, image in enumerate(answer.data):",
    '    with open(f"image-{i}.png", "wb") as file:',
    "        file.write(base64.b64decode(image.b64_json))",
  );
  return lines.join("\n");
}

function showRequest(body) {
  $("curl").textContent = asCurl(body);
  $("python").textContent = asPython(body);
}

function refreshRequest() {
  showRequest(requestBody($("seed").value));
}

// ------------------------------------------------------------------------------------------ the answer

function showPending(count) {
  $("empty").hidden = true;
  $("timings").hidden = true;
  $("pictures").replaceChildren(
    ...Array.from({ length: count }, () => element("div", undefined, { class: "pending", "aria-hidden": "true" })),
  );
}

function showPictures(answer, prompt) {
  const figures = answer.data.map((picture, index) => {
    const source = `data:image/${answer.output_format};base64,${picture.b64_json}`;
    const figure = element("figure");
    const caption = element("figcaption", `Picture ${index + 1}`);
    const words = prompt.replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-|-$/g, "").slice(0, 80) || "picture";
    const name = `${words}-${picture.seed}-${index}.${answer.output_format}`;
    caption.append(element("a", "Save", { href: source, download: name, "aria-label": `Save picture ${index + 1}` }));
    figure.append(element("img", undefined, { src: source, alt: `${prompt}, picture ${index + 1}` }), caption);
    return figure;
  });
  $("pictures").replaceChildren(...figures);
}

function showTimings(answer) {
  const { queue_ms, batch_ms, encode_ms, total_ms } = answer.timings;
  const rows = [
    ["In the queue", queue_ms],
    ["Model", batch_ms],
    ["Encoding", encode_ms],
    ["In all", total_ms],
  ].map(([name, ms]) => [name, `${ms < 100 ? ms.toFixed(1) : Math.round(ms)} ms`]);
  rows.push(["Batch", `${answer.batch_size} picture${answer.batch_size === 1 ? "" : "s"}`]);
  rows.push(["Model used", answer.model]);
  rows.push(["Seed", answer.data[0].seed]);
  $("timings").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = element("div");
      row.append(element("dt", name), element("dd", value));
      return row;
    }),
  );
  $("timings").hidden = false;
}

async function failure(response) {
  const id = response.headers.get("x-request-id") ?? "";
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    error = {}; // an answer from something in between
  }
  const title = error.message ?? `The server answered ${response.status}.`;
  const parts = [`${response.status} ${error.code ?? ""}`.trim(), error.param && `field ${error.param}`, id];
  return { title, detail: parts.filter(Boolean).join(" · ") };
}

async function draw() {
  const seed = $("seed").value || String(Math.floor(Math.random() * 2 ** 31));
  const body = requestBody(seed);
  body.prompt = $("prompt").value.trim();
  running = new AbortController();
  $("error").hidden = true;
  setBusy(true);
  showPending(body.n);
  showRequest(body);
  try {
    const response = await ask("/v1/images/generations", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) {
      const { title, detail } = await failure(response);
      clearPictures();
      showError(title, detail);
      if (response.status === 401) askForKey();
      return;
    }
    const answer = await response.json();
    showPictures(answer, body.prompt);
    showTimings(answer);
    showState("good", "ready");
  } catch (error) {
    clearPictures();
    if (error.name !== "AbortError") {
      showState("bad", "no answer");
      showError("The server does not answer.", "Start it with: flashbulb serve");
    }
  } finally {
    running = null;
    setBusy(false);
  }
}

function clearPictures() {
  $("pictures").replaceChildren();
  $("timings").hidden = true;
  $("empty").hidden = false;
}

function setBusy(busy) {
  $("result").setAttribute("aria-busy", String(busy));
  $("draw").disabled = busy || models.length === 0;
  $("draw").textContent = busy ? "Drawing …" : "Draw";
  $("stop").hidden = !busy;
}

// ------------------------------------------------------------------------------------------ the start

function fillSizes() {
  const sizes = chosenModel()?.sizes ?? [];
  $("size").replaceChildren(...sizes.map((size) => element("option", size.replace("x", " × "), { value: size })));
}

async function start() {
  setBusy(false);
  try {
    const response = await ask("/v1/models");
    if (response.status === 401) {
      const { title, detail } = await failure(response);
      if (sessionStorage.getItem(KEY)) showError(title, detail);
      askForKey();
      return;
    }
    if (!response.ok) throw new Error(`status ${response.status}`);
    models = (await response.json()).data;
  } catch {
    showState("bad", "no answer");
    showError("The list of models could not be read.", "Reload the page when the server runs again.");
    return;
  }
  $("model").replaceChildren(...models.map((model) => element("option", model.id, { value: model.id })));
  fillSizes();
  refreshRequest();
  setBusy(false);
  await checkReady();
}

async function checkReady() {
  const ready = await fetch("/readyz").catch(() => null);
  if (ready?.ok) {
    $("error").hidden = true;
    showState("good", "ready");
  } else {
    showState("bad", "no worker");
    if (ready) {
      const { title, detail } = await failure(ready);
      showError(title, detail);
    }
  }
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
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
$("stop").addEventListener("click", () => running?.abort());
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
