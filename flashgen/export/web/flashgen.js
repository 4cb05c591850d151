// The worker of the page: draws pictures from an artifact of `flashgen export --target web`, in the browser alone. It does what
// flashgen/device does in Python, in the same order and the same float32 arithmetic.

const BASE = new URL("./", import.meta.url);
const RUNTIME = {
  wasm: { script: "vendor/ort.wasm.min.js", glue: "vendor/ort-wasm-simd-threaded.js", binary: "vendor/ort-wasm-simd-threaded.wasm" },
  webgpu: {
    script: "vendor/ort.webgpu.min.js",
    glue: "vendor/ort-wasm-simd-threaded.asyncify.js",
    binary: "vendor/ort-wasm-simd-threaded.asyncify.wasm",
  },
};
const CLIPS = [["text_encoder", "tokenizer"], ["text_encoder_2", "tokenizer_2"]];

/** An error whose message is a sentence for the reader. */
class Problem extends Error {}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

// ---- Noise: Philox-4x32-10 and Box-Muller, as in flashgen/device/noise.py ----

/** The high 32 bits of the product of two 32-bit numbers. */
function multiplyHigh(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const low = a1 * b0 + ((a0 * b0) >>> 16);
  const middle = a0 * b1 + (low & 0xffff);
  return (a1 * b1 + (low >>> 16) + (middle >>> 16)) >>> 0;
}

/** The first two outputs for element `index` (below 2^32), as numbers in 0..2^32-1. */
function philox(index, low, high) {
  let c0 = 0, c1 = 0, c2 = index >>> 0, c3 = 0;
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, c0), low0 = Math.imul(0xd2511f53, c0);
    const high1 = multiplyHigh(0xcd9e8d57, c2), low1 = Math.imul(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ low) >>> 0, low1 >>> 0, (high0 ^ c3 ^ high) >>> 0, low0 >>> 0];
    low = (low + 0x9e3779b9) >>> 0;
    high = (high + 0xbb67ae85) >>> 0;
  }
  return [c0, c1];
}

/** `count` standard normal numbers as Float32Array for a BigInt `seed` in 0..2^64-1. */
export function randn(count, seed) {
  const low = Number(seed & 0xffffffffn), high = Number(seed >> 32n);
  return Float32Array.from({ length: count }, (_, index) => {
    const [x, y] = philox(index, low, high);
    return Math.sqrt(-2 * Math.log((x + 0.5) * 2 ** -32)) * Math.sin(2 * Math.PI * ((y + 0.5) * 2 ** -32));
  });
}

// ---- Prompts: as in flashgen/device/tokens.py ----

/** {ids: BigInt64Array [length], cut: null or {text that did not fit, tokens found}}. `tokenizer` is one of @huggingface/tokenizers. */
export function tokenize(tokenizer, prompt, length, padId) {
  let ids = tokenizer.encode(prompt).ids, cut = null;
  if (ids.length > length) {
    cut = { text: tokenizer.decode(ids.slice(length - 1, -1)).trim(), tokens: ids.length };
    ids = [...ids.slice(0, length - 1), ids.at(-1)]; // the last one is the end token
  }
  const padded = new BigInt64Array(length).fill(BigInt(padId));
  ids.forEach((id, place) => (padded[place] = BigInt(id)));
  return { ids: padded, cut };
}

// ---- Sampling: as in flashgen/device/sampler.py and flashgen/flow/ode.py ----

/** One Euler step in place: x <- a x + b (sigma' - sigma) v in float32, as numpy computes it. */
export function eulerStep(x, v, difference, scale) {
  const a = Math.fround(scale ? scale[0] : 1), b = Math.fround(scale ? scale[1] * difference : difference);
  for (let i = 0; i < x.length; i++) x[i] = Math.fround(a * x[i]) + Math.fround(b * v[i]);
}

/** u + w (c - u) for v = [u, c], in float32. */
function guide(v, weight) {
  const half = v.length / 2, w = Math.fround(weight);
  return Float32Array.from({ length: half }, (_, i) => v[i] + Math.fround(w * Math.fround(v[half + i] - v[i])));
}

/** Decoder output [3, H, W] in [-1, 1] as RGBA bytes; the clamped array cuts and rounds halves to even, as numpy does. */
function toRgba(sample) {
  const pixels = sample.length / 3, rgba = new Uint8ClampedArray(4 * pixels).fill(255);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < pixels; i++) {
      rgba[4 * i + c] = Math.fround(Math.fround(Math.fround(sample[c * pixels + i] / 2) + 0.5) * 255);
    }
  }
  return rgba;
}

/** One exported artifact. Networks are loaded one at a time and released after use. */
class Pipeline {
  constructor(report) {
    this.report = report; // ({progress | warning}) for the page
    this.blobs = new Map(); // what was downloaded; browsers keep large blobs on disk
    this.tokenizers = new Map();
    this.encoded = null;
  }

  async start(wanted) {
    const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
    if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
      throw new Problem(
        "This browser has no WebAssembly with SIMD, which the networks need. Use Chrome or Edge 91, Firefox 89, Safari 16.4 or newer, and leave WebAssembly switched on.",
      );
    }
    const response = await this.request("manifest.json");
    this.manifest = await response.json().catch(() => {
      throw new Problem("manifest.json is not valid JSON; copy the whole exported folder to the server again.");
    });
    this.files = new Map(this.manifest.files.map((file) => [file.path, file]));
    this.engine = await pickEngine(wanted);
    this.warnAboutMemory();
    const { Tokenizer } = await this.module("vendor/tokenizers.min.js");
    this.Tokenizer = Tokenizer;
    const { script, glue, binary } = RUNTIME[this.engine];
    this.ort = await this.module(script);
    await this.bytes(glue); // the runtime imports it itself; here a missing file gets its sentence
    const settings = this.ort.env.wasm;
    settings.wasmPaths = { mjs: new URL(glue, BASE).href, wasm: new URL(binary, BASE).href };
    settings.wasmBinary = await this.bytes(binary);
    settings.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  }

  /** What the page says about the artifact and how it runs. */
  facts() {
    const { sampler, digest, version } = this.manifest;
    const threads = this.ort.env.wasm.numThreads;
    return [
      `${sampler.size_px} × ${sampler.size_px} px`,
      `${sampler.sigmas.length - 1} steps`,
      `${megabytes(this.weights().reduce((sum, size) => sum + size, 0))} of weights`,
      this.engine === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`,
      `artifact ${digest.slice(0, 8)} ${version}`,
    ];
  }

  /** Bytes of each file of the networks. */
  weights() {
    return this.manifest.files.filter((file) => file.path.includes("/model.onnx")).map((file) => file.size);
  }

  warnAboutMemory() {
    const largest = Math.max(...this.weights());
    const needed = 3 * largest; // the file, the runtime's copy, weights laid out for the kernels
    const limit = Math.min(4, navigator.deviceMemory ?? 4) * 2 ** 30; // WebAssembly addresses 4 GiB
    if (needed > limit) {
      const where = limit < 2 ** 32 ? `this device reports ${megabytes(limit)}` : "a browser tab has 4.3 GB at most";
      this.report({ warning: `The largest network needs about ${megabytes(needed)} of memory and ${where}: drawing may fail. A smaller export: flashgen quantize --budget.` });
    }
  }

  async request(path) {
    const response = await fetch(new URL(path, BASE), { cache: "no-cache" }).catch(() => {
      throw new Problem(`${path} could not be loaded: the server does not answer. Start it again and reload the page.`);
    });
    if (!response.ok) {
      throw new Problem(`${path} is missing on the server (HTTP ${response.status}). Copy the whole exported folder there and reload the page.`);
    }
    return response;
  }

  /** A file of the artifact as Uint8Array, checked against the manifest and downloaded once. */
  async bytes(path) {
    const known = this.blobs.get(path);
    if (known) return new Uint8Array(await known.arrayBuffer());
    const file = this.files.get(path);
    if (!file) throw new Problem(`manifest.json does not list ${path}; export the student again with: flashgen export --target web`);
    const response = await this.request(path);
    const chunks = [];
    let done = 0;
    for (let reader = response.body.getReader(); ; ) {
      const { value, done: end } = await reader.read().catch(() => {
        throw new Problem(`The connection broke while loading ${path}. Reload the page.`);
      });
      if (end) break;
      chunks.push(value);
      done += value.length;
      this.report({ progress: `Loading ${path}, ${megabytes(done)} of ${megabytes(file.size)}`, value: done / file.size });
    }
    const blob = new Blob(chunks);
    const buffer = await blob.arrayBuffer();
    const whole = done === file.size && (!crypto.subtle || (await sha256(buffer)) === file.sha256); // subtle: https and localhost only
    if (!whole) throw new Problem(`${path} is not the exported file (${done} bytes, ${file.size} expected, or altered). Copy it to the server again.`);
    this.blobs.set(path, blob);
    return new Uint8Array(buffer);
  }

  async json(path) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(path)));
  }

  async module(path) {
    await this.bytes(path);
    return import(new URL(path, BASE).href);
  }

  /** What `use(session)` gives; the network is in memory only meanwhile. */
  async withNetwork(name, use) {
    const start = performance.now();
    const model = await this.bytes(`${name}/model.onnx`);
    const data = this.files.has(`${name}/model.onnx_data`) ? await this.bytes(`${name}/model.onnx_data`) : null;
    const options = { executionProviders: [this.engine], externalData: data ? [{ path: "model.onnx_data", data }] : [], logSeverityLevel: 3 };
    this.report({ progress: `Preparing ${name}` });
    const session = await this.ort.InferenceSession.create(model, options);
    this.laps.load += performance.now() - start;
    try {
      return await use(session);
    } finally {
      await session.release();
    }
  }

  /** Runs a network on `feeds` {name: [array, dims]} and returns its `outputs` as Float32Arrays. */
  async run(session, lap, feeds, outputs) {
    const start = performance.now();
    const tensors = Object.entries(feeds).map(([name, [data, dims]]) => {
      return [name, new this.ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims)];
    });
    const results = await session.run(Object.fromEntries(tensors), outputs);
    const arrays = outputs.map((name) => results[name].data);
    (this.laps[lap] ??= []).push(performance.now() - start);
    return arrays;
  }

  /** Ids [rows, length] of `prompts`; what is cut off a prompt is noted in `cuts` {text: [tokenizers]}. */
  async tokens(name, prompts, cuts) {
    const { length, pad_id } = this.manifest.extra.tokenizers[name];
    if (!this.tokenizers.has(name)) this.tokenizers.set(name, new this.Tokenizer(await this.json(`${name}/tokenizer.json`), {}));
    const ids = new BigInt64Array(prompts.length * length);
    prompts.forEach((prompt, row) => {
      const found = tokenize(this.tokenizers.get(name), prompt, length, pad_id);
      ids.set(found.ids, row * length);
      if (found.cut) (cuts[found.cut.text] ??= []).push(`${name} (${length} of ${found.cut.tokens} tokens)`);
    });
    return [ids, [prompts.length, length]];
  }

  /** Embeddings [rows, tokens, width] and pooled [rows, P] of `prompts`, kept for the next picture of the same prompt. */
  async encode(prompts) {
    const key = JSON.stringify(prompts);
    if (this.encoded?.key === key) return this.encoded;
    const { sampler, extra } = this.manifest;
    const rows = prompts.length, width = extra.joint_dim, length = sampler.clip_tokens + sampler.t5_tokens;
    const embeds = new Float32Array(rows * length * width), pooled = [], cuts = {};
    let column = 0;
    for (const [encoder, tokenizer] of CLIPS) {
      const ids = await this.tokens(tokenizer, prompts, cuts);
      const [hidden, text] = await this.withNetwork(encoder, (session) => {
        const layers = session.outputNames.flatMap((name) => /^hidden_states\.(\d+)$/.exec(name)?.[1] ?? []).map(Number);
        return this.run(session, encoder, { input_ids: ids }, [`hidden_states.${Math.max(...layers)}`, "text_embeds"]);
      });
      const features = hidden.length / (rows * sampler.clip_tokens);
      for (let row = 0; row < rows; row++) {
        for (let token = 0; token < sampler.clip_tokens; token++) {
          const from = (row * sampler.clip_tokens + token) * features;
          embeds.set(hidden.subarray(from, from + features), (row * length + token) * width + column);
        }
      }
      column += features;
      pooled.push(text);
    }
    if (this.files.has("text_encoder_3/model.onnx")) {
      const ids = await this.tokens("tokenizer_3", prompts, cuts);
      const [t5] = await this.withNetwork("text_encoder_3", (session) => {
        return this.run(session, "text_encoder_3", { input_ids: ids }, ["last_hidden_state"]);
      });
      const size = sampler.t5_tokens * width;
      for (let row = 0; row < rows; row++) {
        embeds.set(t5.subarray(row * size, (row + 1) * size), (row * length + sampler.clip_tokens) * width);
      }
    } // without T5 its tokens, if any, stay zeros
    const size = pooled.reduce((sum, p) => sum + p.length, 0) / rows, joined = [];
    for (let row = 0; row < rows; row++) {
      for (const p of pooled) joined.push(...p.subarray((row * p.length) / rows, ((row + 1) * p.length) / rows));
    }
    const warnings = Object.entries(cuts).map(([text, names]) => `The prompt is too long; “${text}” has no effect on ${names.join(", ")}.`);
    this.encoded = { key, warnings, embeds: [embeds, [rows, length, width]], pooled: [Float32Array.from(joined), [rows, size]] };
    return this.encoded;
  }

  /** The picture of `prompt` from the noise of `seed` (BigInt): {rgba, width, height, laps in ms}. */
  async draw(prompt, seed) {
    this.laps = { load: 0 };
    const start = performance.now();
    const { sampler, extra } = this.manifest;
    const guided = sampler.guidance !== 1;
    const { embeds, pooled, warnings } = await this.encode(guided ? ["", prompt] : [prompt]);
    for (const warning of warnings) this.report({ warning });
    const shape = extra.latent_shape, x = randn(shape.reduce((a, b) => a * b), seed);
    const steps = sampler.sigmas.length - 1;
    await this.withNetwork("transformer", async (session) => {
      for (let step = 0; step < steps; step++) {
        this.report({ progress: `Step ${step + 1} of ${steps}`, value: step / steps });
        const [sigma, next] = sampler.sigmas.slice(step, step + 2);
        const rows = guided ? 2 : 1, doubled = new Float32Array(rows * x.length);
        for (let row = 0; row < rows; row++) doubled.set(x, row * x.length);
        const feeds = { hidden_states: [doubled, [rows, ...shape]], encoder_hidden_states: embeds, pooled_projections: pooled };
        feeds.timestep = [new Float32Array(rows).fill(1000 * sigma), [rows]];
        const [v] = await this.run(session, "transformer", feeds, ["out_hidden_states"]);
        eulerStep(x, guided ? guide(v, sampler.guidance) : v, next - sigma, sampler.scales?.[step]);
      }
    });
    if (!x.every(Number.isFinite)) throw new Error(`the numbers overflow on ${this.engine}`);
    const scaling = Math.fround(extra.vae.scaling_factor), shift = Math.fround(extra.vae.shift_factor);
    const latents = x.map((value) => Math.fround(value / scaling) + shift);
    this.report({ progress: "Decoding", value: 1 });
    const [sample] = await this.withNetwork("vae_decoder", (session) => {
      return this.run(session, "vae_decoder", { latent_sample: [latents, [1, ...shape]] }, ["sample"]);
    });
    const side = Math.round(Math.sqrt(sample.length / 3));
    return { rgba: toRgba(sample), width: side, height: side, laps: { ...this.laps, total: performance.now() - start } };
  }
}

async function sha256(buffer) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** "webgpu" on a real adapter (software ones are slower than WebAssembly), else "wasm"; `wanted` overrides. */
async function pickEngine(wanted) {
  if (wanted === "wasm") return wanted;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const real = adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  if (wanted === "webgpu" && !adapter) throw new Problem("This browser gives no WebGPU adapter; leave ?engine=webgpu out of the address.");
  return real || wanted === "webgpu" ? "webgpu" : "wasm";
}

/** A sentence for whatever went wrong. */
function explain(error) {
  if (error instanceof Problem) return error.message;
  const text = String(error?.message ?? error);
  if (error instanceof RangeError || typeof error === "number" || /memory|alloc|out of bounds/i.test(text)) {
    return `This browser tab ran out of memory (${text}). Close other tabs and programs and try again, or export a smaller model: flashgen quantize --budget.`;
  }
  return `Drawing failed: ${text}. Reload the page; if it happens again, try another browser.`;
}

function startWorker() {
  const report = (message) => self.postMessage(message);
  const wanted = new URLSearchParams(self.location.search).get("engine");
  let pipeline = new Pipeline(report);
  const restart = async (engine) => {
    await pipeline.start(engine);
    report({ ready: { manifest: pipeline.manifest, facts: pipeline.facts() } });
  };
  let started = restart(wanted);
  started.catch((error) => report({ error: explain(error) }));
  self.onmessage = async ({ data: { prompt, seed } }) => {
    try {
      await started;
      let picture;
      try {
        picture = await pipeline.draw(prompt, seed);
      } catch (error) {
        if (pipeline.engine !== "webgpu" || wanted === "webgpu" || error instanceof Problem) throw error;
        report({ warning: `WebGPU failed here (${error?.message ?? error}); WebAssembly draws instead.` });
        pipeline = new Pipeline(report);
        await (started = restart("wasm"));
        picture = await pipeline.draw(prompt, seed);
      }
      self.postMessage({ picture: { ...picture, prompt, seed } }, [picture.rgba.buffer]);
    } catch (error) {
      report({ error: explain(error) });
    }
  };
}

if (typeof WorkerGlobalScope !== "undefined") startWorker();
