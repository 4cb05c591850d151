// The files of the exported folder: downloaded once, and checked against the manifest.

const BASE = new URL("./", import.meta.url);

/** An error whose message is a sentence for the reader. */
export class Problem extends Error {}

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** Address of a file of the folder. */
export const address = (path) => new URL(path, BASE).href;

async function request(path) {
  const response = await fetch(address(path), { cache: "no-cache" }).catch(() => {
    throw new Problem(`${path} could not be loaded: the server does not answer. Start it again and reload the page.`);
  });
  if (!response.ok) {
    throw new Problem(`${path} is missing on the server (HTTP ${response.status}). Copy the whole exported folder there and reload the page.`);
  }
  return response;
}

async function sha256(buffer) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Files by path; `report({progress, value})` is called while one is downloaded. */
export class Files {
  constructor(report) {
    this.report = report;
    this.blobs = new Map(); // browsers keep large blobs on disk
  }

  /** Read manifest.json, which lists the other files. */
  async open() {
    const response = await request("manifest.json");
    this.manifest = await response.json().catch(() => {
      throw new Problem("manifest.json is not valid JSON; copy the whole exported folder to the server again.");
    });
    this.listed = new Map(this.manifest.files.map((file) => [file.path, file]));
    return this.manifest;
  }

  has(path) {
    return this.listed.has(path);
  }

  /** A file as Uint8Array. */
  async bytes(path) {
    const known = this.blobs.get(path);
    if (known) return new Uint8Array(await known.arrayBuffer());
    const file = this.listed.get(path);
    if (!file) throw new Problem(`manifest.json does not list ${path}; export the student again with: flashgen export --target web`);
    const response = await request(path);
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
    const intact = done === file.size && (!crypto.subtle || (await sha256(buffer)) === file.sha256); // subtle: https and localhost only
    if (!intact) throw new Problem(`${path} is not the exported file (${done} bytes, ${file.size} expected, or altered). Copy it to the server again.`);
    this.blobs.set(path, blob);
    return new Uint8Array(buffer);
  }

  async json(path) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(path)));
  }

  async module(path) {
    await this.bytes(path);
    return import(address(path));
  }

  /** Bytes of each file of the networks. */
  weights() {
    return this.manifest.files.filter((file) => file.path.includes("/model.onnx")).map((file) => file.size);
  }
}
