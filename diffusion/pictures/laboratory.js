// The laboratory: the tables of process/samplers.py, run by the update of process/loop.py, on points
// of a 2-D mixture of Gaussians, whose predicted x0 is known exactly.
// Points are x, y, x, y, ... in a Float64Array; those of the two classes alternate.
"use strict";
const [EXACT, ...tables] = D.laboratory.map(
  ([options, start, levels, keep, to_x, to_y]) => ({ options, start, levels, keep, to_x, to_y: to_y ?? to_x }));
const TABLES = {};                  // by sampler, eta, spacing and steps
for (const table of tables) {
  const [sampler, steps, spacing, eta] = table.options;
  (((TABLES[sampler] ??= {})[eta] ??= {})[spacing] ??= {})[steps] = table;
}
const COLUMNS = ["x", "y", "d0", "d1", "d2", "d3", "noise"], NOISE = 6;
const POINTS = 500, STD = 0.16, ARM = 8, SPAN = 5;    // SPAN: the width of the picture
const MEANS = [1, -1].map(side => Array.from({ length: ARM }, (_, i) => {   // two arms of a spiral
  const radius = side * (0.4 + 1.05 * i / (ARM - 1)), angle = Math.PI * (0.1 + 1.15 * i / (ARM - 1));
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}));

// --- the mathematics
function normals(seed) {            // mulberry32 and Box-Muller: the same numbers in every browser
  const uniform = () => {
    seed = seed + 0x6D2B79F5 | 0;
    let z = Math.imul(seed ^ seed >>> 15, 1 | seed);
    z = z + Math.imul(z ^ z >>> 7, 61 | z) ^ z;
    return ((z ^ z >>> 14) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return () => Float64Array.from({ length: 2 * POINTS }, normal);
}
const EPS = normals(1)();           // every run starts from this noise

// the mean of a class's components, given x_t, and the log of the class's density there
const logs = new Float64Array(ARM);
function posterior(means, x, y, alpha, variance) {
  let max = -Infinity, mass = 0, mx = 0, my = 0;
  for (let k = 0; k < ARM; k++) {
    logs[k] = -((x - alpha * means[k][0]) ** 2 + (y - alpha * means[k][1]) ** 2) / (2 * variance);
    max = Math.max(max, logs[k]);
  }
  for (let k = 0; k < ARM; k++) {
    const e = Math.exp(logs[k] - max);
    mass += e; mx += e * means[k][0]; my += e * means[k][1];
  }
  return [mx / mass, my / mass, max + Math.log(mass)];
}

// what a perfect network predicts: uncond + weight (cond - uncond), cond being the point's own class
function predict(points, [alpha, sigma], weight) {
  const variance = (alpha * STD) ** 2 + sigma ** 2, gain = alpha * STD ** 2 / variance;
  const x0 = new Float64Array(points.length);
  for (let n = 0; n < points.length; n += 2) {
    const x = points[n], y = points[n + 1], own = n / 2 % 2;
    let [mx, my, log] = posterior(MEANS[own], x, y, alpha, variance);
    if (weight !== 1) {
      const [ox, oy, other] = posterior(MEANS[1 - own], x, y, alpha, variance);
      const away = (weight - 1) / (1 + Math.exp(log - other));   // of what cond and uncond differ in
      mx += away * (mx - ox); my += away * (my - oy);
    }
    x0[n] = gain * x + (1 - gain * alpha) * mx;
    x0[n + 1] = gain * y + (1 - gain * alpha) * my;
  }
  return x0;
}

function combine(weights, known) {
  const sum = new Float64Array(2 * POINTS);
  weights.forEach((weight, column) => {
    if (weight) for (let n = 0; n < sum.length; n++) sum[n] += weight * known[column][n];
  });
  return sum;
}

// the general linear method: the states at which a table evaluates, and its end
function runTable(table, weight) {
  let x = EPS.map(v => table.start * v), y = x, past = [];
  const states = [y], noise = normals(2);
  table.to_x.forEach((row, i) => {
    const x0 = predict(y, table.levels[i], weight);
    const known = [x, y, x0, past[0], past[1], past[2], row[NOISE] ? noise() : null];
    past = [combine(table.keep[i], [y, x0]), ...past].slice(0, 3);
    x = combine(row, known);
    y = table.to_y === table.to_x ? x : combine(table.to_y[i], known);
    states.push(y);
  });
  return states;
}

const endOf = (table, weight) => runTable(table, weight).pop();
const rms = (a, b) => Math.sqrt(a.reduce((sum, v, n) => sum + (v - b[n]) ** 2, 0) / POINTS);
function energy(a, b) {             // 2 E|a - b| - E|a - a'| - E|b - b'|, 0 for equal distributions
  const mean = (a, b) => {
    let sum = 0;
    for (let n = 0; n < a.length; n += 2)
      for (let m = 0; m < b.length; m += 2)
        sum += Math.sqrt((a[n] - b[m]) ** 2 + (a[n + 1] - b[m + 1]) ** 2);
    return sum / POINTS ** 2;
  };
  return 2 * mean(a, b) - mean(a, a) - mean(b, b);
}

// --- what is chosen, and what follows from it
const lab = { sampler: "dpmpp_2m", eta: "0", spacing: "logsnr", steps: "10", weight: 1,
              states: [], u: 1, drawn: Infinity, playing: false, jobs: [], cache: new Map() };
const ODE = Object.keys(TABLES).filter(name => TABLES[name]["0"] && !name.endsWith("_sde"));
const tableOf = (sampler, eta, steps) => TABLES[sampler][eta][lab.spacing][steps];
const isRandom = table => table.to_x.some(row => row[NOISE]);
const short = v => !v ? "0" : v === Infinity ? "\u221e" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e4 ? v.toExponential(1) : v.toPrecision(3);

function cached(key, make) {
  if (!lab.cache.has(key)) lab.cache.set(key, make());
  return lab.cache.get(key);
}
const exactEnd = () => cached(`exact ${lab.weight}`, () => endOf(EXACT, lab.weight));
const errorOf = (sampler, steps) => cached(`${sampler} ${steps} ${lab.spacing} ${lab.weight}`,
  () => rms(endOf(tableOf(sampler, "0", steps), lab.weight), exactEnd()));

function choose(changes) {
  Object.assign(lab, changes);
  const fill = (key, values) => {   // the choices that there are; the first where there is no such one
    if (!values.includes(lab[key])) lab[key] = values[0];
    $("lab-" + key).replaceChildren(...values.map(v => new Option(v, v, false, v === lab[key])));
    $("lab-" + key).disabled = values.length < 2;
    return values;
  };
  fill("sampler", Object.keys(TABLES));
  fill("eta", Object.keys(TABLES[lab.sampler]));
  fill("spacing", Object.keys(TABLES[lab.sampler][lab.eta]));
  lab.counts = fill("steps", Object.keys(TABLES[lab.sampler][lab.eta][lab.spacing]));
  $("lab-weight").value = lab.weight;
  $("lab-weighttext").textContent = lab.weight.toFixed(1);
  lab.table = tableOf(lab.sampler, lab.eta, lab.steps);
  const states = runTable(lab.table, lab.weight), end = states[states.length - 1];
  // for the eye x_t is divided by its scale, where that is above 1, as in the pictures
  lab.states = states.map((points, i) => points.map(v => v / Math.max(1, Math.hypot(...lab.table.levels[i]))));
  lab.drawn = Infinity;
  $("lab-error").textContent = isRandom(lab.table) ? "none: random" : short(rms(end, exactEnd()));
  $("lab-energy").textContent = short(energy(end, exactEnd()));
  showTable();
  showAt(lab.playing ? lab.u : 1);
  const idle = !lab.jobs.length;
  lab.jobs = ODE.flatMap(name => lab.counts.map(steps => [name, steps]));
  if (idle) requestAnimationFrame(compute);
}
function compute() {                // the curves of all samplers, a few milliseconds a frame
  for (const end = performance.now() + 8; lab.jobs.length && performance.now() < end;) errorOf(...lab.jobs.shift());
  if (lab.jobs.length) requestAnimationFrame(compute); else compare();
}

// --- the picture
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const trails = document.createElement("canvas");

function density() {                // of the mixture, in the colours of its classes
  const image = document.createElement("canvas"), side = image.width = image.height = 200;
  const context = image.getContext("2d"), data = context.createImageData(side, side);
  const colours = [colour("--accent"), colour("--dot")].map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
  for (let n = 0; n < side * side; n++) {
    const [x, y] = [n % side, Math.floor(n / side)].map(v => SPAN * ((v + 0.5) / side - 0.5));
    const [a, b] = MEANS.map(means => Math.exp(posterior(means, x, y, 1, STD ** 2)[2]));
    colours[0].forEach((v, c) => { data.data[4 * n + c] = (a * v + b * colours[1][c]) / (a + b); });
    data.data[4 * n + 3] = 90 * Math.min(1, a + b);
  }
  context.putImageData(data, 0, 0);
  return image;
}

function at(u) {                    // between two states; u from 0, noise, to 1, the end
  const last = lab.states.length - 1, i = Math.min(Math.floor(u * last), last - 1);
  return lab.states[i].map((v, n) => v + (u * last - i) * (lab.states[i + 1][n] - v));
}
const toPixels = points => points.map(v => trails.width * (0.5 + v / SPAN));

function follow(from, to) {         // adds to the trails
  const last = lab.states.length - 1, context = trails.getContext("2d");
  const between = lab.states.filter((_, i) => i > from * last && i < to * last);
  const stops = [at(from), ...between, at(to)].map(toPixels);
  context.globalAlpha = isRandom(lab.table) ? 0.12 : 0.4;
  context.lineWidth = trails.width / 900;
  for (const arm of [0, 1]) {
    context.strokeStyle = colour(arm ? "--dot" : "--accent");
    context.beginPath();
    for (let n = 2 * arm; n < 2 * POINTS; n += 4)
      stops.forEach((p, i) => i ? context.lineTo(p[n], p[n + 1]) : context.moveTo(p[n], p[n + 1]));
    context.stroke();
  }
}

function showAt(u) {
  const canvas = $("lab-canvas"), size = Math.round(canvas.clientWidth * devicePixelRatio);
  if (!size) return;                // hidden
  if (canvas.width !== size || !lab.density) { canvas.width = canvas.height = size; lab.density = density(); lab.drawn = Infinity; }
  if (u < lab.drawn) { trails.width = trails.height = size; lab.drawn = 0; }
  follow(lab.drawn, u);
  lab.drawn = lab.u = u;
  const context = canvas.getContext("2d");
  const dots = (points, r, first, every, fill) => {
    const p = toPixels(points);
    context.fillStyle = fill;
    for (let n = first; n < p.length; n += every) context.fillRect(p[n] - r, p[n + 1] - r, 2 * r, 2 * r);
  };
  context.clearRect(0, 0, size, size);
  context.drawImage(lab.density, 0, 0, size, size);
  context.drawImage(trails, 0, 0);
  dots(exactEnd(), size / 500, 0, 2, colour("--ink"));
  dots(at(u), size / 280, 0, 4, colour("--accent"));
  dots(at(u), size / 280, 2, 4, colour("--dot"));
  $("lab-time").value = 1000 * u;
  $("lab-play").textContent = lab.playing ? "Pause" : "Play";
  const row = Math.min(Math.floor(u * (lab.states.length - 1)), lab.states.length - 2);
  [...$("lab-table").tBodies[0].rows].forEach((tr, i) => tr.classList.toggle("now", i === row));
}

// --- the numbers
function showTable() {
  const cells = (kind, texts) => {
    const tr = document.createElement("tr");
    tr.append(...texts.map(text => Object.assign(document.createElement(kind), { textContent: text })));
    return tr;
  };
  const columns = [["x\u2032", lab.table.to_x], ["y\u2032", lab.table.to_y === lab.table.to_x ? [] : lab.table.to_y]].flatMap(([state, rows]) =>
    COLUMNS.map((name, c) => ({ rows, c, name })).filter(({ c }) => rows.some(row => row[c]))
      .map((column, i) => ({ ...column, name: (i ? "+ " : state + " = ") + column.name })));
  $("lab-table").tHead.replaceChildren(cells("th", ["row", "\u03c3 / \u03b1", ...columns.map(column => column.name)]));
  $("lab-table").tBodies[0].replaceChildren(...lab.table.to_x.map((_, i) => cells("td",
    [i + 1, short(lab.table.levels[i][1] / lab.table.levels[i][0]), ...columns.map(({ rows, c }) => short(rows[i][c]))])));
  $("lab-past").textContent = lab.table.keep.some(([p]) => p) ? "the noise eps" : "the x0";
}

function compare() {                // the error over the steps, and the samplers by their error
  const W = 420, H = 250, L = 40, last = lab.counts[lab.counts.length - 1];
  const px = s => L + 8 + Math.log(s) / Math.log(last) * (W - L - 22);
  const py = e => 12 + (1 - Math.max(-5, Math.min(1, Math.log10(e)))) / 6 * (H - 44);
  const plot = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "error over evaluations" });
  for (let p = -5; p <= 1; p++)
    plot.append(svg("line", { x1: L, x2: W - 6, y1: py(10 ** p), y2: py(10 ** p), stroke: "var(--line)" }),
                svg("text", { x: L - 6, y: py(10 ** p) + 4, "text-anchor": "end" }, p ? "1e" + p : "1"));
  for (const s of lab.counts) plot.append(svg("text", { x: px(s), y: H - 8, "text-anchor": "middle" }, s));
  const curve = (name, look) => plot.append(svg("polyline", { ...look, fill: "none",
    points: lab.counts.map(s => px(s) + "," + py(errorOf(name, s))).join(" ") }));
  for (const name of ODE) curve(name, { stroke: "var(--soft)", opacity: 0.5 });
  if (!isRandom(lab.table)) {
    curve(lab.sampler, { stroke: "var(--accent)", "stroke-width": 2.5 });
    plot.append(svg("circle", { cx: px(lab.steps), cy: py(errorOf(lab.sampler, lab.steps)), r: 5, fill: "var(--dot)" }));
  }
  $("lab-plot").replaceChildren(plot);
  const before = lab.counts[lab.counts.length - 2];
  const order = () => Math.log(errorOf(lab.sampler, before) / errorOf(lab.sampler, last)) / Math.log(last / before);
  $("lab-ordertext").textContent = `order, from ${before} to ${last} steps`;
  $("lab-order").textContent = isRandom(lab.table) ? "none" : order().toFixed(1);
  const ranked = ODE.map(name => [errorOf(name, lab.steps), name]).sort(([a], [b]) => a - b);
  $("lab-rank").replaceChildren(...ranked.map(([error, name]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${name}  ${short(error)}` });
    button.setAttribute("aria-pressed", name === lab.sampler);
    button.onclick = () => choose({ sampler: name, eta: "0" });
    return button;
  }));
}

// --- moving
function playLab() {
  lab.playing = !lab.playing;
  lab.before = undefined;
  if (lab.playing) requestAnimationFrame(tickLab);
  showAt(lab.playing && lab.u === 1 ? 0 : lab.u);
}
function tickLab(now) {
  if (!lab.playing) return;
  const u = Math.min(1, lab.u + Math.min(100, now - (lab.before ?? now)) / 3000);   // three seconds
  lab.before = now;
  lab.playing = u < 1;
  showAt(u);
  requestAnimationFrame(tickLab);
}
function tab(name) {                // shows the pictures or the laboratory
  for (const other of ["pictures", "laboratory"]) {
    $(other).hidden = other !== name;
    $("tab-" + other).setAttribute("aria-selected", other === name);
  }
  if (name === "laboratory") choose(); else lab.playing = false;
}
for (const name of ["pictures", "laboratory"]) $("tab-" + name).onclick = () => tab(name);
for (const key of ["sampler", "eta", "spacing", "steps"]) $("lab-" + key).onchange = e => choose({ [key]: e.target.value });
$("lab-weight").oninput = e => choose({ weight: Number(e.target.value) });
$("lab-time").oninput = e => { lab.playing = false; showAt(e.target.value / 1000); };
$("lab-play").onclick = playLab;
window.addEventListener("resize", () => showAt(lab.u));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { lab.density = null; showAt(lab.u); });
document.addEventListener("keydown", e => {
  if (e.key !== " " || $("laboratory").hidden || ["SELECT", "BUTTON"].includes(e.target.tagName)) return;
  e.preventDefault();
  playLab();
});
if (location.hash === "#lab") tab("laboratory");
