// The worker of an exported page in node: its own flashgen.js and vendor files, which are read from disk here instead of from a server.
//
// node worker.mjs FOLDER PROMPT SEED OUT      writes the picture's RGBA bytes to OUT, prints {width, height, warnings}

import { readFile, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, prompt, seed, out] = process.argv.slice(2);
const warnings = [];

globalThis.fetch = async (url) => readFile(new URL(url)).then((bytes) => new Response(bytes), () => new Response(null, { status: 404 }));
globalThis.WorkerGlobalScope = Object;
globalThis.self = {
  location: { search: "?engine=wasm" },
  crossOriginIsolated: false,
  async postMessage({ warning, error, ready, picture }) {
    if (warning) warnings.push(warning);
    if (ready) self.onmessage({ data: { prompt, seed: BigInt(seed) } });
    if (error) {
      console.error(error);
      process.exit(1);
    }
    if (!picture) return;
    await writeFile(out, picture.rgba);
    console.log(JSON.stringify({ width: picture.width, height: picture.height, warnings }));
    process.exit(0);
  },
};
if (!globalThis.navigator) globalThis.navigator = { hardwareConcurrency: 1 };
await import(new URL("flashgen.js", `${pathToFileURL(resolve(folder))}/`).href);
