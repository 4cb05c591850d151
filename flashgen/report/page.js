"use strict";
// Plots, the slider over two pictures, and pictures in full size. The page is complete without this script, apart from these.

const data = JSON.parse(document.getElementById("data").textContent);
const colors = { domain: data.letters, range: data.letters.map((_, i) => `var(--key${i % 10})`) };
const style = { fontSize: "12px", fontFamily: "inherit", overflow: "visible" };

// ---- Plots: SVG in the page's own colours, so that light and dark need no second drawing ----

const spread = (values) => Math.max(...values) / Math.min(...values);
const titled = (d) => `${d.letter} ${d.name}`;

function scatter({ metric, cost, up, points, frontier }, width) {
  const log = Math.min(...points.map((d) => d.x)) > 0 && spread(points.map((d) => d.x)) > 8;
  return Plot.plot({
    width, height: Math.min(340, Math.max(250, width * 0.62)), style, marginLeft: 52, marginRight: 24, marginBottom: 40, inset: 14,
    x: { label: `${cost} →`, labelAnchor: "right", type: log ? "log" : "linear", nice: !log, ticks: Math.max(3, width / 90), tickFormat: log ? "~g" : undefined },
    y: { label: up ? `↑ ${metric}` : `↑ ${metric} (less is better: axis turned)`, reverse: !up, nice: true, grid: true },
    color: colors,
    marks: [
      Plot.line(frontier.map((i) => points[i]), { x: "x", y: "y", curve: "step-after", stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "4 4" }),
      Plot.ruleX(points.filter((d) => d.ys), { x: "x", y1: (d) => d.ys[0], y2: (d) => d.ys[1], stroke: "letter", strokeWidth: 1.5 }),
      Plot.ruleY(points.filter((d) => d.xs), { y: "y", x1: (d) => d.xs[0], x2: (d) => d.xs[1], stroke: "letter", strokeWidth: 1.5 }),
      Plot.dot(points, { x: "x", y: "y", fill: "letter", r: 3 }),
      Plot.text(points, { x: "x", y: "y", text: "letter", fill: "letter", fontWeight: 700, fontSize: 13, dx: 10, dy: -10, stroke: "var(--card)", strokeWidth: 4 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (d) => `${titled(d)}\n${metric} ${d.y.toPrecision(3)}\n${d.x.toPrecision(3)} ${cost}` })),
    ],
  });
}

function bar({ metric, parts, bars }, width) {
  const letters = data.letters.filter((letter) => bars.some((d) => d.letter === letter));
  const columns = width > 640 && parts.length > 2 ? 2 : 1; // of parts, so that wide screens need half the height
  const at = (d) => parts.indexOf(d.part);
  const rows = Math.ceil(parts.length / columns);
  const place = { fx: (d) => at(d) % columns, fy: (d) => Math.floor(at(d) / columns) };
  return Plot.plot({
    width, height: rows * (letters.length * 17 + 34) + 34, style, marginLeft: 30, marginRight: 44, marginTop: 26, marginBottom: 24,
    x: { label: null, grid: true, nice: true, ticks: 5 },
    y: { domain: letters, label: null, tickSize: 0 },
    fx: { axis: null, padding: 0.12 }, fy: { axis: null, padding: 0.24 },
    color: colors,
    marks: [
      Plot.barX(bars, { ...place, y: "letter", x: "x", fill: "letter", fillOpacity: 0.6, insetTop: 1, insetBottom: 1, title: (d) => `${titled(d)}\n${d.part}: ${d.x.toPrecision(3)}` }),
      Plot.ruleY(bars.filter((d) => d.xs), { ...place, y: "letter", x1: (d) => d.xs[0], x2: (d) => d.xs[1], stroke: "currentColor", strokeWidth: 1.5 }),
      Plot.text(bars, { ...place, y: "letter", x: (d) => Math.max(d.x, d.xs ? d.xs[1] : d.x), text: (d) => d.x.toPrecision(3), textAnchor: "start", dx: 6, fill: "currentColor", fontSize: 11 }),
      Plot.text(parts.map((part) => ({ part })), { ...place, frameAnchor: "top-left", text: "part", dy: -16, fontWeight: 600, fontSize: 12.5 }),
      Plot.ruleX([0]),
    ],
  });
}

for (const figure of document.querySelectorAll("figure.plot")) {
  const { kind, index } = figure.dataset, holder = figure.querySelector("[role=img]");
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(holder.clientWidth);
    if (width && width !== drawn) holder.replaceChildren((kind === "bars" ? bar : scatter)(data[kind][index], (drawn = width)));
  }).observe(holder);
}

// ---- Pictures in full size ----

const links = [...document.querySelectorAll("#gallery a")];
const number = (link, name) => Number(link.dataset[name]);
const linkOf = (artifact, prompt) => links.find((link) => number(link, "artifact") === artifact && number(link, "prompt") === prompt);
const lightbox = document.getElementById("lightbox"), view = lightbox.querySelector(".view"), big = lightbox.querySelector("img");
const zoom = lightbox.querySelector(".zoom");
let current = null;

function show(link) {
  if (!link) return;
  const picture = link.querySelector("img");
  current = link;
  big.src = picture.src;
  big.alt = picture.alt;
  big.className = picture.className;
  lightbox.querySelector(".caption").textContent = `${picture.alt} · ${link.closest(".row").querySelector("p").textContent}`;
  lightbox.querySelector(".buttons a").href = link.href;
  if (!lightbox.open) lightbox.showModal();
}

/** The nearest picture of another artifact or of another prompt, round the end; pictures that do not exist are passed over. */
function step(artifacts, rows) {
  const prompts = [...new Set(links.map((link) => number(link, "prompt")))];
  let artifact = number(current, "artifact"), row = prompts.indexOf(number(current, "prompt"));
  const wrap = (value, count) => ((value % count) + count) % count;
  for (let tries = 0; tries < Math.max(data.letters.length, prompts.length); tries++) {
    artifact = wrap(artifact + artifacts, data.letters.length);
    row = wrap(row + rows, prompts.length);
    const link = linkOf(artifact, prompts[row]);
    if (link) return show(link);
  }
}

function setZoom(on) {
  view.classList.toggle("zoomed", on);
  zoom.setAttribute("aria-pressed", on);
  view.scrollTo((view.scrollWidth - view.clientWidth) / 2, (view.scrollHeight - view.clientHeight) / 2);
}

for (const link of links) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // the original in another tab
    event.preventDefault();
    show(link);
  });
}
lightbox.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (target === big || button === zoom) setZoom(!view.classList.contains("zoomed"));
  else if (target === lightbox || target === view || button?.className === "close") lightbox.close();
  else if (button) step(Number(button.dataset.step ?? 0), Number(button.dataset.row ?? 0));
});
lightbox.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "z") setZoom(!view.classList.contains("zoomed"));
  if (!moves[event.key]) return;
  event.preventDefault();
  step(...moves[event.key]);
});
lightbox.addEventListener("close", () => {
  setZoom(false);
  current.focus();
});

// ---- The slider ----

const swipe = document.getElementById("swipe");
if (swipe && links.length) {
  const field = (name) => swipe.querySelector(`select[name=${name}]`), stage = swipe.querySelector(".stage"), range = swipe.querySelector("[type=range]");
  const cut = () => stage.style.setProperty("--cut", `${range.value}%`);
  const fill = () => {
    for (const side of ["left", "right"]) {
      const image = stage.querySelector(`img.${side}`), picture = linkOf(Number(field(side).value), Number(field("prompt").value))?.querySelector("img");
      const tag = stage.querySelector(`.${side}.tag`), artifact = Number(field(side).value);
      tag.textContent = data.letters[artifact];
      tag.style.setProperty("--key", `var(--key${artifact % 10})`);
      image.hidden = !picture;
      if (!picture) continue;
      image.src = picture.src;
      image.alt = picture.alt;
      image.classList.toggle("small", picture.classList.contains("small"));
      stage.style.aspectRatio = `${picture.getAttribute("width")} / ${picture.getAttribute("height")}`;
    }
  };
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = stage.getBoundingClientRect();
    range.value = (100 * (event.clientX - box.left)) / box.width;
    cut();
  };
  field("right").selectedIndex = 1;
  for (const name of ["left", "right", "prompt"]) field(name).addEventListener("change", fill);
  range.addEventListener("input", cut);
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  swipe.hidden = false;
  fill();
  cut();
}
