// One press of "Make video": a video for each seed, followed through its events, then shown in a player with its
// spritesheet. It tells what a `Run` tells.

import { events, fileAsData, post } from "./server.js";
import { fileName, videoBodyOf } from "./request.js";
import { cancel, element, seeThrough } from "./run.js";

const ENDS = ["job.completed", "job.failed", "job.cancelled"];
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class VideoRun {
  // `choice` is the form; `seeds` has at least one number. `onChange` is called when there is something new to tell.
  constructor(choice, seeds, onChange) {
    this.choice = choice;
    this.seeds = seeds;
    this.jobs = new Map(); // seed -> the job as last described
    this.images = new Map(); // seed -> data address of the thumbnail, for the history
    this.stopped = false;
    this.onChange = onChange;
    this.grid = element("div", undefined, { class: "videos" });
    this.figures = new Map();
    for (const seed of seeds) {
      const figure = element("figure");
      figure.append(element("div", undefined, { class: "pending", "aria-hidden": "true" }));
      this.figures.set(seed, figure);
      this.grid.append(figure);
    }
  }

  async start(signal) {
    await seeThrough(this, (seed) => post("v1/videos", videoBodyOf(this.choice, seed), signal), signal);
  }

  async follow(seed, signal) {
    const { id } = this.jobs.get(seed);
    for await (const { name, data } of events(`v1/jobs/${id}/events`, (one) => ENDS.includes(one.name), signal)) {
      if (name.startsWith("job.")) this.jobs.set(seed, data);
      else Object.assign(this.jobs.get(seed), data);
      this.onChange(this);
    }
    if (this.jobs.get(seed).status === "completed") await this.show(seed);
    this.onChange(this);
  }

  async show(seed) {
    const { id } = this.jobs.get(seed);
    const views = ["", "?variant=thumbnail", "?variant=spritesheet"];
    const [film, thumbnail, sheet] = await Promise.all(views.map((view) => fileAsData(`v1/videos/${id}/content${view}`)));
    const { prompt } = this.choice;
    const player = element("video", undefined, { src: film, poster: thumbnail, controls: "", playsinline: "", "aria-label": prompt });
    player.muted = true; // there is no sound; without this no browser starts by itself
    player.loop = true;
    if (!still()) player.autoplay = true;
    const loop = element("label", undefined, { class: "loop" });
    const box = element("input", undefined, { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      player.loop = box.checked;
      if (box.checked) player.play();
    });
    loop.append(box, "Loop");
    const caption = element("figcaption");
    const name = fileName(prompt, seed, 0, "mp4");
    caption.append(`Seed ${seed}`, loop, element("a", "Save", { href: film, download: name, "aria-label": `Save the video of seed ${seed}` }));
    const frames = element("details");
    const picture = element("img", undefined, { src: sheet, alt: `All frames of ${prompt}` });
    const save = element("a", "Save all frames", { href: sheet, download: name.replace(/mp4$/, "webp") });
    frames.append(element("summary", "All frames"), picture, save);
    this.figures.get(seed).replaceChildren(player, caption, frames);
    this.images.set(seed, thumbnail);
  }

  async stop() {
    this.stopped = true;
    await cancel(this);
  }

  // Videos that never came leave no empty frame behind.
  dropPending() {
    for (const figure of this.figures.values()) if (!figure.querySelector("video")) figure.remove();
  }

  get noun() {
    return "video";
  }

  get verb() {
    return "made";
  }

  get done() {
    return this.images.size;
  }

  get total() {
    return this.seeds.length;
  }

  // Of all that is to be done, in videos.
  get fraction() {
    return [...this.jobs.values()].reduce((sum, job) => sum + job.progress / 100, 0);
  }

  get status() {
    const jobs = [...this.jobs.values()];
    const soon = (job) => (job.eta_ms ? `, ready in about ${Math.max(1, Math.round(job.eta_ms / 1000))} s` : "");
    const running = jobs.find((job) => job.status === "in_progress");
    if (running) return `${running.step ? `step ${running.step} of ${running.steps}` : "begun"}${soon(running)}`;
    const queued = jobs.find((job) => job.status === "queued");
    if (!queued) return "waiting …";
    return `${queued.queue_position ? `${queued.queue_position} in the queue before this` : "next in the queue"}${soon(queued)}`;
  }

  get error() {
    return [...this.jobs.values()].find((job) => job.error)?.error ?? null;
  }

  get timings() {
    const made = [...this.jobs.values()].flatMap((job) => job.data ?? []);
    if (!made.length) return null;
    const worst = (name) => Math.max(...made.map((one) => one.timings[name]));
    return {
      queue: worst("queue_ms"),
      batch: worst("batch_ms"),
      encode: worst("encode_ms"),
      total: worst("total_ms"),
      rows: Math.max(...made.map((one) => one.batch_size)),
    };
  }
}
