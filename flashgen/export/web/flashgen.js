// The worker of the page: draws pictures from an artifact of `flashgen export --target web`, in the browser alone. It does what
// flashgen/device does in Python, in the same order and the same float32 arithmetic, by the same description in the manifest.

import { Files, Problem, address, megabytes } from "./files.js";
import { evaluate, requireFinite, sample, sizeOf, toDecoder, toRgba, tokenize } from "./graph.js";
import { randn } from "./noise.js";

const ADAPTER_MS = 5000; // some drivers never answer
const RUNTIME = {
  wasm: { script: "vendor/ort.wasm.min.js", glue: "vendor/ort-wasm-simd-threaded.js", binary: "vendor/ort-wasm-simd-threaded.wasm" },
  webgpu: {
    script: "vendor/ort.webgpu.min.js",
    glue: "vendor/ort-wasm-simd-threaded.asyncify.js",
    binary: "vendor/ort-wasm-simd-threaded.asyncify.wasm",
  },
};

/** One exported artifact. Networks are loaded one at a time and released after use. */
class Pipeline {
  constructor(report) {
    this.report = report; // ({progress | warning}) for the page
    this.files = new Files(report);
    this.tokenizers = new Map();
    this.encoded = null;
  }

  async start(wanted) {
    const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
    if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
      throw new Problem(
        "This browser has no WebAssembly with SIMD, which the networks need. Use Chrome or Edge 91, Firefox 114, Safari 16.4 or newer, and leave WebAssembly switched on.",
      );
    }
    yieldMemory();
    this.manifest = await this.files.open();
    this.graph = this.manifest.extra.graph;
    if (!this.graph) throw new Problem("manifest.json has no description of the networks; export the student again with: flashgen export --target web");
    this.engine = await pickEngine(wanted);
    this.warnAboutMemory();
    const { Tokenizer } = await this.files.module("vendor/tokenizers.min.js");
    this.Tokenizer = Tokenizer;
    const { script, glue, binary } = RUNTIME[this.engine];
    this.ort = await this.files.module(script);
    await this.files.bytes(glue); // the runtime imports it itself; here a missing file gets its sentence
    const settings = this.ort.env.wasm;
    settings.wasmPaths = { mjs: address(glue), wasm: address(binary) };
    settings.wasmBinary = await this.files.bytes(binary);
    settings.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  }

  /** Texts on the page about the artifact and the engine. */
  facts() {
    const { sampler, digest, version } = this.manifest, { width, height } = sizeOf(this.graph);
    const threads = this.ort.env.wasm.numThreads;
    return [
      `${width} × ${height} px`,
      `${sampler.sigmas.length - 1} steps`,
      `${megabytes(this.files.weights().reduce((sum, size) => sum + size, 0))} of weights`,
      this.engine === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`,
      `artifact ${digest.slice(0, 8)} ${version}`,
    ];
  }

  warnAboutMemory() {
    const largest = Math.max(...this.files.weights());
    const needed = 3 * largest; // the file, the runtime's copy, weights laid out for the kernels
    const limit = Math.min(4, navigator.deviceMemory ?? 4) * 2 ** 30; // WebAssembly addresses 4 GiB
    if (needed > limit) {
      const where = limit < 2 ** 32 ? `this device reports ${megabytes(limit)}` : "a browser tab has 4.3 GB at most";
      this.report({ warning: `The largest network needs about ${megabytes(needed)} of memory and ${where}: drawing may fail. A smaller export: flashgen quantize --budget.` });
    }
  }

  /** The result of `use(session)`; the network is in memory only meanwhile. */
  async withNetwork(name, use) {
    const start = performance.now();
    const model = await this.files.bytes(`${name}/model.onnx`);
    const data = this.files.has(`${name}/model.onnx_data`) ? await this.files.bytes(`${name}/model.onnx_data`) : null;
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

  /** The arrays called `outputs` that a network gives for `feeds` {name: array}. */
  async run(session, lap, feeds, outputs) {
    const start = performance.now();
    const tensors = Object.entries(feeds).map(([name, { data, dims }]) => {
      return [name, new this.ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims)];
    });
    const results = await session.run(Object.fromEntries(tensors), outputs);
    const arrays = outputs.map((name) => ({ data: results[name].data, dims: [...results[name].dims] }));
    (this.laps[lap] ??= []).push(performance.now() - start);
    return arrays;
  }

  /** {ids, mask} of `prompts` for an encoder, arrays [rows, length]; cut texts are noted in `cuts` {text: [tokenizers]}. */
  async tokens({ tokenizer: name, length, pad_id: padId }, prompts, cuts) {
    if (!this.tokenizers.has(name)) this.tokenizers.set(name, new this.Tokenizer(await this.files.json(`${name}/tokenizer.json`), {}));
    const dims = [prompts.length, length], ids = new BigInt64Array(prompts.length * length), mask = new BigInt64Array(ids.length);
    prompts.forEach((prompt, row) => {
      const tokens = tokenize(this.tokenizers.get(name), prompt, length, padId);
      ids.set(tokens.ids, row * length);
      mask.set(tokens.mask, row * length);
      if (tokens.cut) (cuts[tokens.cut.text] ??= []).push(`${name} (${length} of ${tokens.cut.tokens} tokens)`);
    });
    return { ids: { data: ids, dims }, mask: { data: mask, dims } };
  }

  /** {conditioning, warnings} of `prompts`: the transformer's text inputs {name: array}; kept for the next picture of the same prompt. */
  async encode(prompts) {
    const key = JSON.stringify(prompts);
    if (this.encoded?.key === key) return this.encoded;
    const values = {}, cuts = {}, conditioning = {};
    for (const encoder of this.graph.encoders) {
      const { ids, mask } = await this.tokens(encoder, prompts, cuts);
      const feeds = { [encoder.ids]: ids, ...(encoder.mask ? { [encoder.mask]: mask } : {}) };
      const names = Object.values(encoder.outputs);
      const arrays = await this.withNetwork(encoder.component, (session) => this.run(session, encoder.component, feeds, names));
      Object.keys(encoder.outputs).forEach((value, i) => (values[value] = arrays[i]));
      if (encoder.mask_value) values[encoder.mask_value] = { data: Float32Array.from(mask.data, Number), dims: mask.dims };
    }
    for (const [name, expression] of Object.entries(this.graph.conditioning)) conditioning[name] = evaluate(expression, values, prompts.length);
    const warnings = Object.entries(cuts).map(([text, names]) => `The prompt is too long; “${text}” has no effect on ${names.join(", ")}.`);
    this.encoded = { key, warnings, conditioning };
    return this.encoded;
  }

  /** The picture of `prompt` from the noise of `seed` (BigInt): {rgba, width, height, laps in ms}. */
  async draw(prompt, seed) {
    this.laps = { load: 0 };
    const start = performance.now();
    const { graph } = this, { sampler } = this.manifest;
    const { conditioning, warnings } = await this.encode(sampler.guidance === 1 ? [prompt] : ["", prompt]);
    for (const warning of warnings) this.report({ warning });
    const x = randn(graph.latent_shape.reduce((a, b) => a * b), seed), steps = sampler.sigmas.length - 1;
    await this.withNetwork("transformer", async (session) => {
      const run = async (feeds) => (await this.run(session, "transformer", feeds, [graph.transformer.output]))[0].data;
      const onStep = (step) => this.report({ progress: `Step ${step + 1} of ${steps}`, value: step / steps });
      await sample(graph, sampler, x, conditioning, run, onStep);
    });
    requireFinite(x, "transformer");
    this.report({ progress: "Decoding", value: 1 });
    const latents = { data: toDecoder(graph, x), dims: [1, ...graph.latent_shape] };
    const [decoded] = await this.withNetwork("vae_decoder", (session) => this.run(session, "vae_decoder", { latent_sample: latents }, ["sample"]));
    return { rgba: toRgba(decoded.data), ...sizeOf(graph), laps: { ...this.laps, total: performance.now() - start } };
  }
}

/**
 * Gives the runtime less address space than the 4 GiB that it asks for, half as often as needed, where the browser refuses so much shared
 * memory. The runtime has no build without shared memory, so fewer threads would not help.
 */
function yieldMemory() {
  const Memory = WebAssembly.Memory;
  WebAssembly.Memory = function (settings) {
    for (let maximum = settings.maximum; ; maximum /= 2) {
      try {
        return new Memory({ ...settings, maximum });
      } catch (error) {
        if (!(maximum / 2 >= Math.max(1024, settings.initial))) throw error; // 1024 pages are 64 MiB
      }
    }
  };
  WebAssembly.Memory.prototype = Memory.prototype; // for instanceof
}

/** "webgpu" on a real adapter (software ones are slower than WebAssembly), else "wasm"; `wanted` overrides. */
async function pickEngine(wanted) {
  if (wanted === "wasm") return wanted;
  const late = new Promise((resolve) => setTimeout(resolve, ADAPTER_MS, null));
  const asked = (async () => await navigator.gpu?.requestAdapter())().catch(() => null); // async: it may throw instead of rejecting
  const adapter = await Promise.race([asked, late]);
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
    report({ ready: { manifest: pipeline.manifest, facts: pipeline.facts(), size: sizeOf(pipeline.graph) } });
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
