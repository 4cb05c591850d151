// The page: the form, and the PNG that it offers. A worker (flashgen.js) draws, so that the page answers while a network computes.

// ---- The PNG: pixels by the browser, text chunks as `flashgen generate` writes them ----

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return ~crc >>> 0;
}

/** An iTXt chunk, which holds any Unicode text. */
function textChunk(keyword, text) {
  const body = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${text}`);
  const chunk = new DataView(new ArrayBuffer(body.length + 8));
  chunk.setUint32(0, body.length - 4);
  new Uint8Array(chunk.buffer).set(body, 4);
  chunk.setUint32(body.length + 4, crc32(body));
  return chunk.buffer;
}

async function toPng({ rgba, width, height }, texts) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  const plain = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const chunks = Object.entries(texts).map(([keyword, text]) => textChunk(keyword, String(text)));
  return new Blob([plain.slice(0, 33), ...chunks, plain.slice(33)], { type: "image/png" }); // 33: signature and IHDR
}

// ---- The form ----

const at = (id) => document.getElementById(id);
const form = at("form"), bar = at("bar");
let worker = null, manifest = null, busy = false;

const show = (id, text) => {
  at(id).textContent = text;
  at(id).hidden = !text;
};
const setBusy = (value) => {
  busy = value;
  at("draw").textContent = value ? "Stop" : "Draw";
  at("draw").classList.toggle("quiet", value);
  at("frame").classList.toggle("busy", value);
  bar.hidden = !value;
};
const stop = () => {
  worker?.terminate(); // what it holds may be broken; the next picture starts afresh
  worker = null;
  setBusy(false);
};
const fail = (text) => {
  show("error", text);
  show("status", "");
  stop();
};
const warn = (text) => {
  const lines = new Set([...at("warning").textContent.split("\n"), text].filter(Boolean));
  show("warning", [...lines].join("\n"));
};

function listen({ data }) {
  if (data.progress) {
    show("status", data.progress);
    if (data.value === undefined) bar.removeAttribute("value");
    else bar.value = data.value;
  }
  if (data.warning) warn(data.warning);
  if (data.error) fail(data.error);
  if (data.ready) describe(data.ready);
  if (data.picture) finish(data.picture);
}

function start() {
  worker = new Worker(new URL(`flashgen.js${location.search}`, import.meta.url), { type: "module" });
  worker.onmessage = listen;
  worker.onerror = (event) => {
    event.preventDefault();
    const reason = event.message ? ` (${event.message})` : ": it or a module that it imports is missing on the server, or the browser is too old";
    fail(`flashgen.js did not start${reason}. The page needs Chrome or Edge 91, Firefox 114, Safari 16.4 or newer.`);
  };
}

function describe(ready) {
  manifest = ready.manifest;
  at("facts").textContent = ready.facts.join(" · ");
  Object.assign(at("picture"), ready.size);
  at("frame").style.aspectRatio = ready.size.width / ready.size.height;
  if (!busy) show("status", "Ready.");
}

async function finish(picture) {
  const { prompt, seed, laps } = picture;
  const { sampler, digest, flashgen_version } = manifest;
  const sigmas = JSON.stringify(sampler.sigmas.map((sigma) => Number(sigma.toFixed(9))));
  const texts = { prompt, seed, sigmas, artifact: digest, flashgen: flashgen_version };
  if (sampler.guidance !== 1) Object.assign(texts, { guidance: sampler.guidance, negative: "" });
  const url = URL.createObjectURL(await toPng(picture, texts));
  const entry = { url, prompt, seed, laps, name: `flashgen-${seed}.png` };
  setBusy(false);
  show("status", `Drawn in ${(laps.total / 1000).toFixed(2)} s, of which ${(laps.load / 1000).toFixed(2)} s loading networks.`);
  present(entry);
  const thumbnail = Object.assign(document.createElement("button"), { type: "button", title: `${prompt}, seed ${seed}` });
  thumbnail.append(Object.assign(document.createElement("img"), { src: url, alt: prompt }));
  thumbnail.onclick = () => {
    present(entry);
    Object.assign(at("prompt"), { value: prompt });
    Object.assign(at("seed"), { value: seed });
  };
  at("earlier").prepend(thumbnail);
  at("earlier").hidden = at("earlier").children.length < 2;
}

function present({ url, prompt, seed, laps, name }) {
  Object.assign(at("picture"), { src: url, alt: prompt, hidden: false });
  at("picture").dataset.laps = JSON.stringify(laps);
  at("empty").hidden = true;
  at("frame").scrollIntoView({ block: "nearest", behavior: "smooth" }); // on phones it is below the form
  at("caption").textContent = `${prompt}, seed ${seed}`;
  Object.assign(at("download"), { href: url, download: name, hidden: false });
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (busy) {
    stop();
    return show("status", "Stopped.");
  }
  const prompt = at("prompt").value.trim(), seed = at("seed").value.trim();
  show("error", "");
  show("warning", "");
  if (!prompt) return show("error", "The prompt is empty; write what to draw.");
  if (!/^\d{1,20}$/.test(seed) || BigInt(seed) >= 2n ** 64n) return show("error", "The seed is a whole number from 0 to 18446744073709551615.");
  if (!worker) start();
  setBusy(true);
  worker.postMessage({ prompt, seed: BigInt(seed) });
};
at("random").onclick = () => (at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]);
at("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy) form.requestSubmit();
};
at("draw").disabled = false;
show("status", "Loading");
start();
