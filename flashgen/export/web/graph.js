// The description of an artifact, `manifest.extra.graph`: tokens, expressions, packing, and the transformer's inputs and output. As in
// flashgen/device/graph.py and tokens.py. An array is {data, dims}; `data` is a Float32Array, or a BigInt64Array of ids and masks.

const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

/**
 * {ids, mask, cut} of a prompt: BigInt64Arrays [length] (mask: 1 for tokens, 0 for padding); cut is null, or {text, tokens} of a prompt
 * that is too long. `tokenizer` is one of @huggingface/tokenizers.
 */
export function tokenize(tokenizer, prompt, length, padId) {
  let ids = tokenizer.encode(prompt).ids, cut = null;
  if (ids.length > length) {
    cut = { text: tokenizer.decode(ids.slice(length - 1, -1)).trim(), tokens: ids.length };
    ids = [...ids.slice(0, length - 1), ids.at(-1)]; // the last one is the end token
  }
  const padded = new BigInt64Array(length).fill(BigInt(padId)), mask = new BigInt64Array(length).fill(1n, 0, ids.length);
  ids.forEach((id, place) => (padded[place] = BigInt(id)));
  return { ids: padded, mask, cut };
}

/** The array of an expression for `rows` prompts; `values` {name: array} are the encoders' outputs and masks. */
export function evaluate(expression, values, rows) {
  if (typeof expression === "string") return values[expression];
  if ("concat" in expression) return concatenate(expression.concat.map((part) => evaluate(part, values, rows)), expression.axis);
  if ("pad" in expression) return pad(evaluate(expression.pad, values, rows), expression.to);
  const dims = [rows, ...expression.zeros];
  return { data: new Float32Array(product(dims)), dims };
}

/** `parts` joined along `axis` (negative: from the end). */
function concatenate(parts, axis) {
  const dims = [...parts[0].dims], at = axis < 0 ? dims.length + axis : axis;
  dims[at] = parts.reduce((sum, part) => sum + part.dims[at], 0);
  const data = new Float32Array(product(dims)), count = product(dims.slice(0, at)), stride = product(dims.slice(at));
  let offset = 0;
  for (const part of parts) {
    const size = product(part.dims.slice(at));
    for (let i = 0; i < count; i++) data.set(part.data.subarray(i * size, (i + 1) * size), i * stride + offset);
    offset += size;
  }
  return { data, dims };
}

/** Zeros behind the last axis of an array, up to `width`. */
function pad({ data, dims }, width) {
  const last = dims.at(-1), padded = new Float32Array((data.length / last) * width);
  for (let i = 0; i * last < data.length; i++) padded.set(data.subarray(i * last, (i + 1) * last), i * width);
  return { data: padded, dims: [...dims.slice(0, -1), width] };
}

/** Calls `visit(place in latents, place in tokens)` for every number of latents [C, h, w] cut into squares of `patch`. */
function eachPlace([channels, height, width], patch, visit) {
  let place = 0;
  for (let top = 0; top < height; top += patch) {
    for (let left = 0; left < width; left += patch) {
      for (let c = 0; c < channels; c++) {
        for (let i = 0; i < patch * patch; i++) {
          visit((c * height + top + Math.floor(i / patch)) * width + left + (i % patch), place++);
        }
      }
    }
  }
}

/** Tokens [(h/p)(w/p), C p p] of latents of `shape` [C, h, w], channel-major within a token; `patch` 0: the latents themselves. */
export function pack(latents, shape, patch) {
  if (!patch) return latents;
  const tokens = new Float32Array(latents.length);
  eachPlace(shape, patch, (from, to) => (tokens[to] = latents[from]));
  return tokens;
}

/** The inverse of `pack`. */
export function unpack(tokens, shape, patch) {
  if (!patch) return tokens;
  const latents = new Float32Array(tokens.length);
  eachPlace(shape, patch, (to, from) => (latents[to] = tokens[from]));
  return latents;
}

/** All inputs {name: array} of the transformer for one picture's latents `x` at `sigma`, repeated for `rows` prompts. */
export function feeds(graph, x, sigma, conditioning, rows) {
  const { latents, timestep, timestep_scale: scale, timestep_offset: offset, patch } = graph.transformer;
  const packed = pack(x, graph.latent_shape, patch), [channels, height, width] = graph.latent_shape;
  const dims = patch ? [(height * width) / patch ** 2, channels * patch ** 2] : graph.latent_shape;
  const data = new Float32Array(rows * x.length);
  for (let row = 0; row < rows; row++) data.set(packed, row * x.length);
  const time = new Float32Array(rows).fill(scale * sigma + offset);
  return { [latents]: { data, dims: [rows, ...dims] }, ...conditioning, [timestep]: { data: time, dims: [rows] } };
}

/** v of one picture from the transformer's `output`: for one prompt, or guided by `weight` for [unconditional, conditional]. */
export function velocity(graph, output, weight) {
  const { output_scale: scale, patch } = graph.transformer;
  const v = scale === 1 ? output : output.map((value) => Math.fround(scale) * value);
  return unpack(weight === 1 ? v : guide(v, weight), graph.latent_shape, patch);
}

/** u + w (c - u) for v = [u, c], in float32 as numpy computes it. */
export function guide(v, weight) {
  const half = v.length / 2, w = Math.fround(weight);
  return Float32Array.from({ length: half }, (_, i) => v[i] + Math.fround(w * Math.fround(v[half + i] - v[i])));
}

/** One Euler step in place: x <- a x + b (sigma' - sigma) v in float32 as numpy computes it; `scale` is [a, b], or undefined for [1, 1]. */
export function eulerStep(x, v, difference, scale) {
  const a = Math.fround(scale ? scale[0] : 1), b = Math.fround(scale ? scale[1] * difference : difference);
  for (let i = 0; i < x.length; i++) x[i] = Math.fround(a * x[i]) + Math.fround(b * v[i]);
}

/** Throws unless all numbers that the network `of` gives are finite. */
export function requireFinite(numbers, of) {
  if (!numbers.every(Number.isFinite)) throw new Error(`${of} gives numbers that are not finite`);
}

/** Latents on the scale of the decoder. */
export function toDecoder(graph, x) {
  const scaling = Math.fround(graph.vae.scaling_factor), shift = Math.fround(graph.vae.shift_factor);
  return x.map((value) => Math.fround(value / scaling) + shift);
}

/** Decoder output [3, H, W] in [-1, 1] as RGBA bytes; the clamped array cuts and rounds halves to even, as numpy does. Throws for NaN and infinity. */
export function toRgba(sample) {
  requireFinite(sample, "vae_decoder");
  const pixels = sample.length / 3, rgba = new Uint8ClampedArray(4 * pixels).fill(255);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < pixels; i++) {
      rgba[4 * i + c] = Math.fround(Math.fround(Math.fround(sample[c * pixels + i] / 2) + 0.5) * 255);
    }
  }
  return rgba;
}

/** {width, height} of a picture in pixels. */
export function sizeOf(graph) {
  const [, height, width] = graph.latent_shape;
  return { width: width * graph.vae.factor, height: height * graph.vae.factor };
}

/** Latents of one picture, from noise `x` along `sigmas`; `run(feeds)` resolves to the transformer's output, `onStep(i)` precedes it. */
export async function sample(graph, sampler, x, conditioning, run, onStep = () => {}) {
  const { sigmas, guidance, scales } = sampler;
  for (let i = 0; i + 1 < sigmas.length; i++) {
    onStep(i);
    const output = await run(feeds(graph, x, sigmas[i], conditioning, guidance === 1 ? 1 : 2));
    eulerStep(x, velocity(graph, output, guidance), sigmas[i + 1] - sigmas[i], scales?.[i]);
  }
  return x;
}
