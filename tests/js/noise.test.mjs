import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { philox, randn } from "../../flashgen/export/web/noise.js";

const expected = JSON.parse(readFileSync(new URL("expected.json", import.meta.url)));

test("randn gives torch CUDA's numbers for seed 0", () => {
  const want = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564];
  const found = randn(6, 0n);
  want.forEach((number, i) => assert.ok(Math.abs(found[i] - number) < 3e-7, `${i}: ${found[i]}`));
});

test("philox gives Random123's vector for counter and key 0", () => {
  assert.deepEqual(philox(0, 0, 0), [0x6627e8d5, 0xe169c58d]);
});

for (const [seed, want] of Object.entries(expected.noise)) {
  test(`randn equals Python for seed ${seed}`, () => {
    randn(want.length, BigInt(seed)).forEach((number, i) => assert.ok(Math.abs(number - want[i]) < 3e-7, `${i}: ${number}`));
  });
}

test("randn is standard normal and uses all 64 bits of the seed", () => {
  const found = randn(65536, 7n), mean = (f) => found.reduce((sum, x) => sum + f(x), 0) / found.length;
  assert.ok(Math.abs(mean((x) => x)) < 0.02 && Math.abs(mean((x) => x * x) - 1) < 0.02);
  assert.notDeepEqual(randn(8, 5n), randn(8, 5n + 2n ** 32n));
});
