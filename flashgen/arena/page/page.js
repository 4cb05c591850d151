// One pair of pictures after another. With data in the element #study the page is on its own and saves a file of votes; without data it
// asks its server. A vote stays in `waiting` (and in localStorage) until the server has said that it is on the disk.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const island = $("study").textContent.trim();
  const alone = island ? JSON.parse(island) : null;
  const memory = {};
  const store = {
    get(key) { try { return JSON.parse(localStorage.getItem(key)) ?? memory[key] ?? null; } catch { return memory[key] ?? null; } },
    set(key, value) { memory[key] = value; try { localStorage.setItem(key, JSON.stringify(value)); } catch { /* memory alone */ } },
  };
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
  const place = alone ? `arena-${alone.study}-${alone.slot}` : "arena";

  let me = store.get(place); // { name, token }
  let study = null;
  let votes = {}; // comparison -> { choice, seconds, time }
  let index = 0, shownAt = 0, isBusy = false;
  let waiting = [], isSending = false, isSaved = true;
  const key = () => `${place}-${study.study}-${me.name}`;

  function show(id) { for (const part of ["start", "compare", "end"]) $(part).hidden = part !== id; }
  function source(name) { return alone ? alone.pictures[name] : `picture/${name}`; }

  // ---- the server
  async function call(what, body) {
    const answer = await fetch(`api/${what}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
    const content = await answer.json().catch(() => ({ error: answer.statusText }));
    if (!answer.ok) throw Object.assign(new Error(content.error), { status: answer.status });
    return content;
  }

  async function send() {
    if (isSending || alone) return;
    isSending = true;
    for (let pause = 500; waiting.length; ) {
      try {
        await call("vote", { ...me, ...waiting[0] });
        waiting.shift();
        store.set(`${key()}-waiting`, waiting);
        pause = 500;
        state();
      } catch (error) {
        if (error.status === 400 || error.status === 409) { // sending it again would not help
          state(`${error.message}`);
          break;
        }
        state(`Not connected: ${waiting.length} ${waiting.length === 1 ? "vote waits" : "votes wait"} in this browser. Trying again ...`);
        await new Promise((done) => { setTimeout(done, pause); addEventListener("online", done, { once: true }); });
        pause = Math.min(2 * pause, 8000);
      }
    }
    isSending = false;
  }

  function state(problem = "") {
    $("state").textContent = problem;
    $("state").classList.toggle("late", Boolean(problem));
    if (!$("end").hidden) outcome(problem);
  }

  // ---- start
  async function join(name) {
    $("refused").hidden = true;
    const token = me && me.name === name ? me.token : random();
    try {
      if (alone && /^\s*judge:/i.test(name)) throw new Error("names that begin with judge: are for programs; choose another name");
      const given = alone ?? await call("join", { name, token });
      me = { name: given.rater ?? name, token };
      store.set(place, me);
      study = given;
      const kept = store.get(key()) ?? {};
      votes = alone ? kept : Object.fromEntries(Object.entries(given.votes).map(([id, choice]) => [id, { choice }]));
      waiting = alone ? [] : store.get(`${key()}-waiting`) ?? [];
      for (const vote of waiting) votes[vote.comparison] = vote;
      isSaved = Object.keys(votes).length === 0;
      const first = study.comparisons.findIndex((c) => !votes[c.id]);
      index = first < 0 ? study.comparisons.length : first;
      next();
      send();
    } catch (error) {
      $("refused").textContent = error.status === 403 ? "Open the whole link that you were given, with its token." : error.status ? error.message
        : alone ? error.message : "The server does not answer. Is it running, and is this device in its network?";
      $("refused").hidden = false;
      show("start");
    }
  }

  // ---- pairs
  function load(name) {
    return new Promise((done, fail) => {
      const image = new Image();
      image.onload = () => done(image.src);
      image.onerror = () => fail(new Error("a picture does not load"));
      image.src = source(name);
    });
  }

  async function next() {
    const comparison = study.comparisons[index];
    $("bar").max = study.comparisons.length;
    $("bar").value = index;
    if (!comparison) return finish();
    show("compare");
    isBusy = true;
    $("count").textContent = `${index + 1} of ${study.comparisons.length}`;
    $("question").textContent = study.question;
    $("prompt").textContent = comparison.prompt;
    $("tie").hidden = !study.ties;
    $("undo").disabled = index === 0;
    $("pair").classList.add("waiting");
    for (const side of ["left", "right"]) $(side).classList.remove("chosen");
    for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
      try { // both pictures appear together, so that no side wins by loading first
        const sources = await Promise.all([load(comparison.left), load(comparison.right)]);
        ["left", "right"].forEach((side, i) => { $(side).firstElementChild.src = sources[i]; });
        await Promise.all(["left", "right"].map((side) => $(side).firstElementChild.decode()));
        break;
      } catch {
        state("A picture does not load. Trying again ...");
        await new Promise((done) => setTimeout(done, pause));
        if (study.comparisons[index] !== comparison) return;
      }
    }
    if (!waiting.length) state();
    $("pair").classList.remove("waiting");
    shownAt = performance.now();
    isBusy = false;
    const following = study.comparisons[index + 1];
    if (following) for (const side of ["left", "right"]) load(following[side]).catch(() => {});
  }

  async function choose(choice) {
    if (isBusy || $("compare").hidden || (choice === "tie" && !study.ties)) return;
    isBusy = true;
    const comparison = study.comparisons[index].id;
    const vote = { comparison, choice, seconds: Math.round(performance.now() - shownAt) / 1000, time: new Date().toISOString() };
    votes[comparison] = vote;
    if (alone) store.set(key(), votes);
    else store.set(`${key()}-waiting`, (waiting.push(vote), waiting));
    isSaved = false;
    send();
    for (const side of ["left", "right"]) $(side).classList.toggle("chosen", choice === side || choice === "tie");
    await new Promise((done) => setTimeout(done, 140));
    document.activeElement?.blur();
    index += 1;
    next();
  }

  function undo() {
    if (index === 0 || !study || (isBusy && $("end").hidden)) return;
    index -= 1;
    next();
  }

  // ---- end
  function finish() {
    show("end");
    isBusy = false;
    $("who").textContent = me.name;
    $("save").hidden = !alone;
    state();
  }

  function outcome(problem) {
    $("outcome").textContent = problem || (alone
      ? `You have compared all ${study.comparisons.length} pairs. Save your votes as a file, and send the file to whoever gave you this page.`
      : waiting.length ? `Sending your last votes ...` : `All ${study.comparisons.length} votes are recorded. You can close this page.`);
  }

  const CRC = Array.from({ length: 256 }, (_, n) => { for (let i = 0; i < 8; i++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n >>> 0; });
  function line(row) {
    const text = JSON.stringify(row);
    let crc = 0xffffffff;
    for (const byte of new TextEncoder().encode(text)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
    return `{"crc":"${((crc ^ 0xffffffff) >>> 0).toString(16).padStart(8, "0")}","row":${text}}\n`;
  }

  function save() {
    const rows = [{ kind: "rater", study: study.study, slot: study.slot, rater: me.name, token: me.token }, ...Object.values(votes)];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(rows.map(line), { type: "application/jsonl" }));
    link.download = `votes-${study.slot}-${me.name.replace(/[^\p{L}\p{N}]+/gu, "-")}.jsonl`;
    link.click();
    isSaved = true;
  }

  $("join").addEventListener("submit", (event) => { event.preventDefault(); join($("name").value.trim().replace(/\s+/g, " ")); });
  $("left").addEventListener("click", () => choose("left"));
  $("right").addEventListener("click", () => choose("right"));
  $("tie").addEventListener("click", () => choose("tie"));
  $("undo").addEventListener("click", undo);
  $("back").addEventListener("click", undo);
  for (const id of ["save", "save-now"]) $(id).addEventListener("click", save);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || $("compare").hidden) return;
    const action = { ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), ArrowDown: () => choose("tie"), z: undo, Z: undo }[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  addEventListener("beforeunload", (event) => { if (alone ? !isSaved : waiting.length) event.preventDefault(); });

  $("save-now").hidden = !alone;
  $("name").value = me?.name ?? "";
  show("start");
  if (me && !alone) join(me.name);
})();
