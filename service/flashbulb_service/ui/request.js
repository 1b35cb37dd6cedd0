// The form as requests, and requests as text for other programs. Pure functions.

export const MAX_SEEDS = 4; // a stream of events each, and browsers open six connections to a server

// "7", "7 9", "7,9" or "7-10" as numbers; [] when it is empty; null when it is none of these or too many.
export function parseSeeds(text) {
  const seeds = [];
  for (const part of text.trim().split(/[\s,]+/).filter(Boolean)) {
    const found = /^(\d{1,15})(?:-(\d{1,15}))?$/.exec(part);
    if (!found) return null;
    const first = Number(found[1]);
    const last = found[2] === undefined ? first : Number(found[2]);
    if (last < first || last - first >= MAX_SEEDS) return null;
    for (let seed = first; seed <= last; seed++) seeds.push(seed);
  }
  const different = [...new Set(seeds)];
  return different.length > MAX_SEEDS ? null : different;
}

export function bodyOf({ model, prompt, count, size }, seed) {
  const body = { model, prompt, n: count, size: size || "auto" };
  if (seed !== undefined) body.seed = seed;
  return body;
}

export function videoBodyOf({ model, prompt, size, seconds }, seed) {
  const body = { model, prompt, size: size || "auto" };
  if (seconds) body.seconds = seconds;
  if (seed !== undefined) body.seed = seed;
  return body;
}

// Make a video, wait for the end of its events, fetch its file.
export function videoAsCurl(base, bodies, withKey) {
  const key = withKey ? ` -H "Authorization: Bearer $FLASHBULB_API_KEY"` : "";
  return bodies
    .map((body) =>
      [
        `id=$(curl -s ${base}/v1/videos${key} \\`,
        `  -H 'Content-Type: application/json' \\`,
        `  -d ${shellText(JSON.stringify(body))} | grep -o 'video_[0-9a-f]*' | head -n 1)`,
        `curl -sN ${base}/v1/jobs/$id/events${key} > /dev/null`,
        `curl -s ${base}/v1/videos/$id/content${key} -o video${body.seed === undefined ? "" : `-${body.seed}`}.mp4`,
      ].join("\n"),
    )
    .join("\n");
}

export function videoAsPython(base, bodies, withKey) {
  const [body] = bodies;
  const seeds = bodies.map((one) => one.seed).filter((seed) => seed !== undefined);
  const many = seeds.length > 1;
  const pad = many ? "    " : "";
  const key = withKey ? 'os.environ["FLASHBULB_API_KEY"]' : '"none"'; // named, never shown
  const lines = [
    ...(withKey ? ["import os"] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonText(`${base}/v1`)}, api_key=${key})`,
    ...(many ? [`for seed in [${seeds.join(", ")}]:`] : []),
    `${pad}video = client.videos.create_and_poll(`,
    `${pad}    model=${pythonText(body.model)},`,
    `${pad}    prompt=${pythonText(body.prompt)},`,
    `${pad}    size=${pythonText(body.size)},`,
    ...(body.seconds ? [`${pad}    seconds=${pythonText(body.seconds)},`] : []),
    ...(seeds.length ? [`${pad}    extra_body={"seed": ${many ? "seed" : seeds[0]}},`] : []),
    `${pad})`,
    `${pad}client.videos.download_content(video.id).write_to_file(${many ? 'f"video-{seed}.mp4"' : '"video.mp4"'})`,
  ];
  return lines.join("\n");
}

export function asCurl(base, bodies, withKey) {
  return bodies
    .map((body) =>
      [
        `curl ${base}/v1/images/generations \\`,
        ...(withKey ? [`  -H "Authorization: Bearer $FLASHBULB_API_KEY" \\`] : []),
        `  -H 'Content-Type: application/json' \\`,
        `  -d ${shellText(JSON.stringify(body))}`,
      ].join("\n"),
    )
    .join("\n");
}

export function asPython(base, bodies, withKey) {
  const [body] = bodies;
  const seeds = bodies.map((one) => one.seed).filter((seed) => seed !== undefined);
  const many = seeds.length > 1;
  const pad = many ? "    " : "";
  const key = withKey ? 'os.environ["FLASHBULB_API_KEY"]' : '"none"'; // named, never shown
  const lines = [
    "import base64",
    ...(withKey ? ["import os"] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonText(`${base}/v1`)}, api_key=${key})`,
    ...(many ? [`for seed in [${seeds.join(", ")}]:`] : []),
    `${pad}answer = client.images.generate(`,
    `${pad}    model=${pythonText(body.model)},`,
    `${pad}    prompt=${pythonText(body.prompt)},`,
    `${pad}    n=${body.n},`,
    `${pad}    size=${pythonText(body.size)},`,
    ...(seeds.length ? [`${pad}    extra_body={"seed": ${many ? "seed" : seeds[0]}},`] : []),
    `${pad})`,
    `${pad}for i, image in enumerate(answer.data):`,
    `${pad}    with open(f"image-${many ? "{seed}-" : ""}{i}.png", "wb") as file:`,
    `${pad}        file.write(base64.b64decode(image.b64_json))`,
  ];
  return lines.join("\n");
}

// A name for a picture's file: its prompt's words, seed and number.
export function fileName(prompt, seed, index, format) {
  const words = prompt.replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-|-$/g, "").slice(0, 80) || "picture";
  return `${words}-${seed}-${index}.${format}`;
}

function pythonText(value) {
  return JSON.stringify(value); // a JSON string is a Python string
}

function shellText(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
