import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { evaluate, feeds, pack, sample, sizeOf, toDecoder, toRgba, tokenize, unpack } from "../../flashgen/export/web/graph.js";

const expected = JSON.parse(readFileSync(new URL("expected.json", import.meta.url)));
const graph = expected.description;
const floats = (numbers) => Float32Array.from(numbers);
const arrays = (group) => Object.fromEntries(Object.entries(group).map(([name, { data, dims }]) => [name, { data: floats(data), dims }]));

// ---- prompts

/** One token per word, numbered by its length, and an end token 1. */
const tokenizer = {
  encode: (text) => ({ ids: [...text.split(" ").filter(Boolean).map((word) => 10 + word.length), 1] }),
  decode: (ids) => ids.map((id) => `<${id}>`).join(" "),
};

test("tokens are padded, and the mask is 1 for tokens only", () => {
  assert.deepEqual(tokenize(tokenizer, "two red circles", 6, 7), {
    ids: BigInt64Array.from([13n, 13n, 17n, 1n, 7n, 7n]), mask: BigInt64Array.from([1n, 1n, 1n, 1n, 0n, 0n]), cut: null,
  });
  assert.deepEqual(tokenize(tokenizer, "", 2, 0).mask, BigInt64Array.from([1n, 0n]));
});

test("a long prompt keeps its end token and reports the text that was cut", () => {
  const { ids, mask, cut } = tokenize(tokenizer, "a bb ccc dddd", 3, 0);
  assert.deepEqual([...ids], [11n, 12n, 1n]);
  assert.deepEqual([...mask], [1n, 1n, 1n]);
  assert.deepEqual(cut, { text: "<13> <14>", tokens: 5 });
});

// ---- expressions

test("conditioning equals Python", () => {
  const values = arrays(expected.values);
  for (const [name, want] of Object.entries(arrays(expected.conditioning))) assert.deepEqual(evaluate(graph.conditioning[name], values, 2), want, name);
});

test("an expression is a value, concat, pad or zeros, and may be nested", () => {
  const a = { data: floats([1, 2, 3, 4]), dims: [2, 1, 2] }, b = { data: floats([5, 6, 7, 8]), dims: [2, 2, 1] };
  assert.equal(evaluate("a", { a }, 2), a);
  assert.deepEqual(evaluate({ zeros: [0, 3] }, {}, 2), { data: floats([]), dims: [2, 0, 3] });
  const nested = { concat: ["a", { pad: "b", to: 2 }, { zeros: [1, 2] }], axis: 1 };
  assert.deepEqual(evaluate(nested, { a, b }, 2), { data: floats([1, 2, 5, 0, 6, 0, 0, 0, 3, 4, 7, 0, 8, 0, 0, 0]), dims: [2, 4, 2] });
  assert.deepEqual(evaluate({ concat: ["b", "b"], axis: 2 }, { b }, 2), evaluate({ concat: ["b", "b"], axis: -1 }, { b }, 2));
});

// ---- packing and the loop

test("packing equals Python and is undone", () => {
  const x = floats(expected.latents), tokens = pack(x, graph.latent_shape, 2);
  assert.deepEqual(tokens, floats(expected.tokens));
  assert.deepEqual(unpack(tokens, graph.latent_shape, 2), x);
  assert.equal(pack(x, graph.latent_shape, 0), x);
  for (const patch of [1, 2]) assert.deepEqual(unpack(pack(x, [4, 6, 4], patch), [4, 6, 4], patch), x);
});

test("the transformer's inputs equal Python", () => {
  assert.deepEqual(feeds(graph, floats(expected.latents), 0.9, arrays(expected.conditioning), 2), arrays(expected.feeds));
  const plain = { ...graph, transformer: { ...graph.transformer, patch: 0 } };
  assert.deepEqual(feeds(plain, floats(expected.latents), 0.9, {}, 1).image, { data: floats(expected.latents), dims: [1, ...graph.latent_shape] });
});

/** The transformer of expected.py: 0.5 image + time + row, in float32. */
async function transformer({ image, time }) {
  const size = image.data.length / time.data.length;
  return image.data.map((value, i) => {
    const row = Math.floor(i / size);
    return Math.fround(Math.fround(Math.fround(0.5 * value) + time.data[row]) + row);
  });
}

for (const [name, guidance, scales] of [["plain", 1, null], ["guided", 3.5, expected.scales]]) {
  test(`${name} latents equal numpy to the last bit`, async () => {
    const steps = [], sampler = { sigmas: expected.sigmas, guidance, scales };
    const x = await sample(graph, sampler, floats(expected.latents), {}, transformer, (step) => steps.push(step));
    assert.deepEqual(x, floats(expected.drawn[name]));
    assert.deepEqual(steps, [0, 1, 2, 3]);
  });
}

// ---- pictures

test("pixels equal Python, halves and numbers beyond the range included", () => {
  const rgba = toRgba(floats(expected.sample));
  assert.deepEqual([...rgba], expected.pixels.flat().flatMap((pixel) => [...pixel, 255]));
});

test("a picture that is not finite is refused", () => {
  for (const number of [NaN, Infinity, -Infinity]) assert.throws(() => toRgba(floats([0, number, 0])), /vae_decoder gives numbers that are not finite/);
});

test("the decoder's scale and the size follow from the description", () => {
  const { scaling_factor: scaling, shift_factor: shift } = graph.vae;
  assert.deepEqual(toDecoder(graph, floats([1.5])), floats([Math.fround(1.5 / scaling) + Math.fround(shift)]));
  assert.deepEqual(sizeOf(graph), { width: 24, height: 16 });
});
