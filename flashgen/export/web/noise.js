// Initial noise: Philox-4x32-10 and Box-Muller, as in flashgen/noise.py.

/** The high 32 bits of the product of two 32-bit numbers. */
function multiplyHigh(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const low = a1 * b0 + ((a0 * b0) >>> 16);
  const middle = a0 * b1 + (low & 0xffff);
  return (a1 * b1 + (low >>> 16) + (middle >>> 16)) >>> 0;
}

/** The first two outputs for element `index` (below 2^32), as numbers in 0..2^32-1. */
export function philox(index, low, high) {
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
