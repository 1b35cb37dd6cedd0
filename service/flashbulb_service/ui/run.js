// One press of "Draw": a job for each seed, watched through its events, shown in rows that fill as pictures come.

import { askJson, events, fileAsData, post } from "./server.js";
import { bodyOf, fileName } from "./request.js";

const ENDS = ["job.completed", "job.failed", "job.cancelled"];

export function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Queue a job for each seed, then follow all of them to their ends; an error ends what was begun, as nobody sees it.
export async function seeThrough(run, queue, signal) {
  try {
    for (const seed of run.seeds) {
      if (run.stopped) break;
      run.jobs.set(seed, await queue(seed));
    }
    if (run.stopped) await cancel(run); // one was on its way when it was stopped
    run.onChange(run);
    await Promise.all([...run.jobs.keys()].map((seed) => run.follow(seed, signal)));
  } catch (error) {
    await cancel(run);
    throw error;
  }
}

export async function cancel(run) {
  await Promise.allSettled([...run.jobs.values()].map(({ id }) => askJson(`v1/jobs/${id}`, { method: "DELETE" })));
}

export class Run {
  // `choice` is the form; `seeds` has at least one number. `onChange` is called when there is something new to tell.
  constructor(choice, seeds, onChange) {
    this.choice = choice;
    this.seeds = seeds;
    this.jobs = new Map(); // seed -> the job as last described
    this.images = new Map(); // "seed/index" -> data address
    this.stopped = false;
    this.onChange = onChange;
    this.grid = element("div", undefined, { class: "rows" });
    this.figures = new Map();
    for (const seed of seeds) this.grid.append(this.makeRow(seed));
  }

  makeRow(seed) {
    const row = element("div", undefined, { class: "row" });
    if (this.seeds.length > 1) row.append(element("h3", `Seed ${seed}`));
    const pictures = element("div", undefined, { class: "pictures" });
    for (let index = 0; index < this.choice.count; index++) {
      const figure = element("figure");
      figure.append(element("div", undefined, { class: "pending", "aria-hidden": "true" }));
      this.figures.set(`${seed}/${index}`, figure);
      pictures.append(figure);
    }
    row.append(pictures);
    return row;
  }

  async start(signal) {
    await seeThrough(this, (seed) => post("v1/jobs", bodyOf(this.choice, seed), signal), signal);
  }

  async follow(seed, signal) {
    const { id } = this.jobs.get(seed);
    for await (const { name, data } of events(`v1/jobs/${id}/events`, (one) => ENDS.includes(one.name), signal)) {
      if (name.startsWith("job.")) this.jobs.set(seed, data);
      else Object.assign(this.jobs.get(seed), { ...pick(data) });
      if (name === "picture.preview") await this.show(seed, data.index, data.url, { preview: true });
      if (name === "picture.done" || name.startsWith("job.")) await this.showFinished(seed);
      this.onChange(this);
    }
  }

  async showFinished(seed) {
    const job = this.jobs.get(seed);
    const known = job.data.every(({ index }) => this.images.has(`${seed}/${index}`));
    if (known && job.data.length === Math.round((job.progress / 100) * job.n)) return;
    const fresh = known ? await askJson(`v1/jobs/${job.id}`) : job; // an event tells progress, the job the addresses
    this.jobs.set(seed, fresh);
    for (const { index, url } of fresh.data) {
      if (!this.images.has(`${seed}/${index}`)) await this.show(seed, index, url, {});
    }
  }

  async show(seed, index, url, { preview = false }) {
    const key = `${seed}/${index}`;
    if (this.images.has(key)) return; // a preview that came late
    const file = new URL(url, location.href).pathname.split("/").pop(); // the same file, by the way this page came
    const source = await fileAsData(`v1/images/results/${file}`);
    if (!preview) this.images.set(key, source);
    const { prompt } = this.choice;
    const alt = `${prompt}, picture ${index + 1}`;
    const image = element("img", undefined, { src: source, alt: preview ? `Preview of ${alt}` : alt });
    if (preview) image.className = "preview";
    const caption = element("figcaption", preview ? "Preview" : `Picture ${index + 1}`);
    if (!preview) {
      const name = fileName(prompt, seed, index, this.jobs.get(seed).output_format);
      const label = `Save picture ${index + 1}${this.seeds.length > 1 ? ` of seed ${seed}` : ""}`;
      caption.append(element("a", "Save", { href: source, download: name, "aria-label": label }));
    }
    this.figures.get(key).replaceChildren(image, caption);
  }

  async stop() {
    this.stopped = true;
    await cancel(this);
  }

  // Pictures that never came leave no empty frame behind.
  dropPending() {
    for (const figure of this.figures.values()) if (!figure.querySelector("img:not(.preview)")) figure.remove();
  }

  get noun() {
    return "picture";
  }

  get verb() {
    return "drawn";
  }

  get done() {
    return this.images.size;
  }

  get fraction() {
    return this.done;
  }

  get total() {
    return this.seeds.length * this.choice.count;
  }

  // What is happening, in words.
  get status() {
    const jobs = [...this.jobs.values()];
    if (jobs.some((job) => job.status === "in_progress") || this.done) return `${this.done} of ${this.total} drawn`;
    const positions = jobs.map((job) => job.queue_position).filter((position) => position !== null);
    if (!positions.length) return "waiting …";
    const ahead = Math.max(...positions);
    const etas = jobs.map((job) => job.eta_ms).filter((ms) => ms);
    const soon = etas.length ? `, ready in about ${seconds(Math.max(...etas))}` : "";
    return `${ahead ? `${ahead} in the queue before this` : "next in the queue"}${soon}`;
  }

  get error() {
    return [...this.jobs.values()].find((job) => job.error)?.error ?? null;
  }

  // The slowest picture's times, as the images route tells them.
  get timings() {
    const pictures = [...this.jobs.values()].flatMap((job) => job.data);
    if (!pictures.length) return null;
    const worst = (name) => Math.max(...pictures.map((picture) => picture.timings[name]));
    return {
      queue: worst("queue_ms"),
      batch: worst("batch_ms"),
      encode: worst("encode_ms"),
      total: worst("total_ms"),
      rows: Math.max(...pictures.map((picture) => picture.batch_size)),
    };
  }
}

function pick({ status, progress, queue_position, eta_ms }) {
  return { status, progress, queue_position, eta_ms };
}

function seconds(ms) {
  return ms < 950 ? "a second" : `${Math.round(ms / 1000)} s`;
}
