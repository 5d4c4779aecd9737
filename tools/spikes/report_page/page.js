"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const $ = (id) => document.getElementById(id);
const GUTTER = 64, RIGHT = 14, FAN = 16;  // pixels left and right of a plot; children of a node in a pyramid
const INK = "#1c2230", SOFT = "#5b6475", FAINT = "#8d96a6", GRID = "#e9edf2", ALARM = "#c92a2a", UNDONE = "#d6336c";
let view = [facts.first_step, facts.last_step], pointer = null, chosen = -1, drag = null, waiting = false;

function element(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// ---- columns: float32, bytes of one weight side by side, deflated; decoded once ----
function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}
async function decode(text) {
  const bytes = fromBase64(text);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = planes.length / 4, words = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0, from = plane * count; i < count; i++) words[4 * i + plane] = planes[from + i];
  return words.buffer;
}
const column = (buffer, place) => new Float32Array(buffer, place.at * 4, place.length);
function stepsOf(buffer, place) {
  if (place.stride === undefined) return new Int32Array(buffer, place.at * 4, place.length);
  const steps = new Float64Array(place.length);
  for (let i = 0; i < steps.length; i++) steps[i] = place.start + i * place.stride;
  return steps;
}

// ---- lowest, highest and mean of every FAN, FAN^2, ... points, so that drawing costs pixels and not points ----
function pyramid(y) {
  let low = y, high = y, sum = y, weight = null;
  const levels = [];
  while (low.length > 2 * FAN) {
    const n = Math.ceil(low.length / FAN);
    const l = new Float32Array(n).fill(NaN), h = new Float32Array(n).fill(NaN), s = new Float64Array(n), w = new Float64Array(n);
    for (let i = 0; i < low.length; i++) {
      const k = (i / FAN) | 0, a = low[i], b = high[i];
      if (a !== a) continue;
      if (!(l[k] <= a)) l[k] = a;
      if (!(h[k] >= b)) h[k] = b;
      s[k] += sum[i]; w[k] += weight ? weight[i] : 1;
    }
    levels.push({low: l, high: h, sum: s, weight: w});
    low = l; high = h; sum = s; weight = w;
  }
  return levels;
}
function range(series, from, to) {  // [lowest, highest, mean] of points from..to (exclusive)
  let low = Infinity, high = -Infinity, sum = 0, weight = 0, level = -1;
  const take = (l, h, s, w) => { if (l === l) { if (l < low) low = l; if (h > high) high = h; sum += s; weight += w; } };
  while (from < to) {
    const at = level < 0 ? null : series.levels[level];
    const node = (i) => at ? take(at.low[i], at.high[i], at.sum[i], at.weight[i]) : take(series.y[i], series.y[i], series.y[i], 1);
    if (level + 1 >= series.levels.length) { while (from < to) node(from++); break; }
    while (from < to && from % FAN) node(from++);
    while (from < to && to % FAN) node(--to);
    from /= FAN; to /= FAN; level++;
  }
  return weight ? [low, high, sum / weight] : null;
}
function firstAt(x, step) {  // index of the first point at or after `step`
  let from = 0, to = x.length;
  while (from < to) { const mid = (from + to) >> 1; if (x[mid] < step) from = mid + 1; else to = mid; }
  return from;
}
function nearest(series, step) {
  const i = firstAt(series.x, step), x = series.x;
  if (!x.length) return -1;
  return i >= x.length || (i > 0 && step - x[i - 1] <= x[i] - step) ? i - 1 : i;
}

// ---- numbers and axes ----
function short(value) {
  if (value === undefined || value !== value) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}
const whole = (value) => Math.round(value).toLocaleString("en");
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * power;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return found;
}
function logTicks(low, high, base) {
  if (base === 2) {
    const every = Math.max(1, Math.ceil(Math.log2(high / low) / 4)), powers = [];
    for (let p = Math.ceil(Math.log2(low)); 2 ** p <= high; p++) if (p % every === 0) powers.push(2 ** p);
    return powers;
  }
  const found = [], decades = Math.log10(high / low), every = Math.max(1, Math.ceil(decades / 5));
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 3] : [1])
      if ((m > 1 || p % every === 0) && m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
  return found.length > 1 ? found : ticks(low, high, 4);
}

// ---- drawing ----
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = "11.5px system-ui, 'DejaVu Sans', sans-serif";
  return [pen, width];
}
const toX = (step, width) => GUTTER + (step - view[0]) / (view[1] - view[0] || 1) * (width - GUTTER - RIGHT);
const toStep = (px, width) => view[0] + (px - GUTTER) / (width - GUTTER - RIGHT) * (view[1] - view[0]);

function columnsOf(series, width) {  // what a panel draws: per pixel [x, lowest, highest, mean], or single points
  const from = Math.max(firstAt(series.x, view[0]) - 1, 0), to = Math.min(firstAt(series.x, view[1] + 1e-9) + 1, series.x.length);
  const plot = width - GUTTER - RIGHT;
  if (to - from <= 2 * plot || (series.dots && !series.crowd)) {
    const points = [];
    for (let i = from; i < to; i++) points.push([toX(series.x[i], width), series.y[i], series.y[i], series.y[i], series.x[i]]);
    return {points, single: true};
  }
  const points = [];
  let i = firstAt(series.x, view[0]);
  for (let p = 0; p < plot; p++) {
    const end = firstAt(series.x, view[0] + (p + 1) / plot * (view[1] - view[0]));
    const found = range(series, i, p === plot - 1 ? to : end);
    if (found) points.push([GUTTER + p + 0.5, ...found]);
    i = end;
  }
  return {points, single: false};
}
function limits(panel, drawn, width) {
  let low = Infinity, high = -Infinity;
  const begun = toX(facts.first_step + 0.02 * (facts.last_step - facts.first_step), width), usable = (v) => isFinite(v) && (!panel.log || v > 0);
  const tops = [];
  for (const {points, series} of drawn) for (const [x, l, h, m] of points) {
    if (x < GUTTER - 1 || x > width - RIGHT + 1) continue;
    if (usable(l)) low = Math.min(low, l); else if (usable(m)) low = Math.min(low, m);
    if (usable(h) && !(panel.settles && x < begun && !series.dots)) tops.push(h);  // the fall at the start would flatten all else
  }
  for (const top of tops) if (top > high) high = top;
  if (!(low < Infinity)) return [panel.log ? 0.1 : 0, 1];
  if (!(high > -Infinity)) high = low;
  if (panel.zero) low = Math.min(low, 0);
  if (panel.log) { const pad = Math.max((high / low) ** 0.06, 1.05); return [low / pad, high * pad]; }
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - (panel.zero && low === 0 ? 0 : pad), high + pad];
}
function shade(pen, width, top, bottom) {
  for (const r of facts.rewinds) {
    const a = toX(r.to_step, width), b = toX(r.from_step, width);
    if (b < GUTTER || a > width - RIGHT) continue;
    pen.fillStyle = "rgba(214,51,108,.07)"; pen.fillRect(a, top, Math.max(b - a, 1), bottom - top);
    pen.strokeStyle = "rgba(214,51,108,.55)"; pen.setLineDash([3, 3]); line(pen, [[a, top], [a, bottom]]); pen.setLineDash([]);
  }
  facts.events.forEach((event, index) => {
    const a = toX(event.onset, width), b = Math.max(toX(event.end ?? event.peak, width), a + 2);
    if (b < GUTTER || a > width - RIGHT) return;
    pen.fillStyle = event.actionable ? `rgba(201,42,42,${index === chosen ? 0.22 : 0.13})` : `rgba(92,107,128,${index === chosen ? 0.26 : 0.13})`;
    pen.fillRect(a, top, b - a, bottom - top);
  });
}
function line(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
}
function drawPanel(panel, last) {
  const height = panel.height + (last ? 34 : 8), [pen, width] = prepare(panel.canvas, height), bottom = panel.height;
  const drawn = panel.series.filter((s) => s.x.length).map((series) => ({series, ...columnsOf(series, width)}));
  const [low, high] = limits(panel, drawn, width);
  const scale = panel.log ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
  const toY = (v) => bottom - 2 - scale(v) * (bottom - 6);
  pen.textAlign = "right"; pen.textBaseline = "middle"; pen.lineWidth = 1;
  for (const t of panel.log ? logTicks(low, high, panel.base) : ticks(low, high, panel.height > 120 ? 5 : 3)) {
    if (panel.integers && t % 1) continue;
    pen.strokeStyle = GRID; line(pen, [[GUTTER, Math.round(toY(t)) + 0.5], [width - RIGHT, Math.round(toY(t)) + 0.5]]);
    pen.fillStyle = SOFT; pen.fillText(short(t), GUTTER - 8, Math.max(toY(t), 6));
  }
  pen.save(); pen.beginPath(); pen.rect(GUTTER, 0, width - GUTTER - RIGHT, bottom); pen.clip();
  shade(pen, width, 0, bottom);
  for (const {series, points, single} of drawn.toReversed()) {  // the run above what it left behind
    const shown = points.filter((p) => p[3] === p[3] && (!panel.log || p[3] > 0));
    pen.strokeStyle = pen.fillStyle = series.color;
    if (series.crowd && !single) { drawCrowd(pen, series, toY, width, (bottom - 6) / (high - low)); continue; }
    if (series.dots) {
      for (const [x, , , m] of shown) { pen.beginPath(); pen.arc(x, toY(m), series.size ?? 3, 0, 7); pen.fillStyle = series.hollow ? "#fff" : series.color; pen.fill(); if (series.hollow) { pen.lineWidth = 1.5; pen.stroke(); } }
      continue;
    }
    if (!single) {
      pen.globalAlpha = 0.3; pen.lineWidth = 1;
      pen.beginPath();
      for (const [x, l, h] of shown) { const a = toY(panel.log ? Math.max(l, low * 1e-3) : l), b = toY(h); pen.moveTo(x, a + 0.4); pen.lineTo(x, Math.min(b, a - 0.4)); }
      pen.stroke(); pen.globalAlpha = 1;
    }
    pen.lineWidth = single ? 1.4 : 1.2; pen.lineJoin = "round";
    line(pen, shown.map((p) => [p[0], toY(p[3])]));
    if (single && shown.length < 2 + Math.abs(shown.at(-1)?.[0] - shown[0]?.[0]) / 9) for (const [x, , , m] of shown) { pen.fillStyle = series.color; pen.fillRect(x - 1.75, toY(m) - 1.75, 3.5, 3.5); }
  }
  if (pointer !== null) { pen.strokeStyle = "rgba(28,34,48,.45)"; pen.lineWidth = 1; line(pen, [[toX(pointer, width), 0], [toX(pointer, width), bottom]]); }
  if (drag && drag.kind === "choose") { pen.fillStyle = "rgba(28,95,176,.14)"; pen.fillRect(Math.min(drag.from, drag.to), 0, Math.abs(drag.to - drag.from), bottom); }
  pen.restore();
  pen.strokeStyle = "#c6cdd8"; pen.lineWidth = 1; line(pen, [[GUTTER + 0.5, 0], [GUTTER + 0.5, bottom - 0.5], [width - RIGHT, bottom - 0.5]]);
  if (last) {
    pen.textBaseline = "top"; pen.textAlign = "center"; pen.fillStyle = SOFT;
    for (const t of ticks(view[0], view[1], Math.max(3, width / 130))) if (t % 1 === 0) {
      const wide = pen.measureText(whole(t)).width / 2;
      pen.fillText(whole(t), Math.min(toX(t, width), width - wide), bottom + 6); line(pen, [[toX(t, width), bottom], [toX(t, width), bottom + 4]]);
    }
    pen.textAlign = "right"; pen.fillStyle = FAINT; pen.fillText("step", width - RIGHT, bottom + 20);
  }
}
function drawCrowd(pen, series, toY, width, tall) {  // whole numbers, too many for dots: the darker, the more often
  const wide = 3, cells = Math.ceil((width - GUTTER - RIGHT) / wide), counts = new Map();
  let i = firstAt(series.x, view[0]);
  for (let c = 0; c < cells; c++) {
    const end = firstAt(series.x, toStep(GUTTER + (c + 1) * wide, width)), all = end - i;
    counts.clear();
    for (; i < end; i++) counts.set(series.y[i], (counts.get(series.y[i]) ?? 0) + 1);
    for (const [value, count] of counts) { pen.globalAlpha = Math.min(1, 1.5 * count / all); pen.fillRect(GUTTER + c * wide, toY(value) - tall * 0.4, wide, tall * 0.8); }
  }
  pen.globalAlpha = 1;
}
function drawLane() {  // names of the events and rewinds above the panels, where there is room
  const [pen, width] = prepare($("lane"), 36), taken = [[], []];
  const chip = (step, text, ink, ground, mark, ringed) => {
    const at = Math.max(toX(step, width), GUTTER), wide = pen.measureText(text).width + 12, x = Math.min(at, width - RIGHT - wide);
    pen.fillStyle = ink; pen.beginPath(); pen.moveTo(at - 4, 31); pen.lineTo(at + 4, 31); pen.lineTo(at, 36); if (mark) pen.fill();
    const row = taken.findIndex((spans) => spans.every(([a, b]) => x + wide + 4 < a || x > b + 4));
    if (row < 0) return;
    taken[row].push([x, x + wide]);
    pen.fillStyle = ground; pen.beginPath(); pen.roundRect(x, row * 15 + 0.5, wide, 14, 4); pen.fill();
    if (ringed) { pen.strokeStyle = ink; pen.stroke(); }
    pen.fillStyle = ink; pen.fillText(text, x + 6, row * 15 + 8);
  };
  pen.textBaseline = "middle"; pen.textAlign = "left";
  const seen = (from, to) => to >= view[0] && from <= view[1];
  const events = facts.events.map((event, index) => ({...event, index})).filter((e) => seen(e.onset, e.end ?? e.peak));
  events.sort((a, b) => (b.index === chosen) - (a.index === chosen) || b.actionable - a.actionable || a.onset - b.onset);
  const name = (e) => chip(e.onset, e.class.replaceAll("_", " "), e.actionable ? ALARM : SOFT, e.actionable ? "#fdecec" : "#eef1f5", true, e.index === chosen);
  events.filter((e) => e.actionable).forEach(name);
  for (const r of facts.rewinds.filter((r) => seen(r.to_step, r.from_step))) chip(r.to_step, `rewound ${whole(r.from_step)} to ${whole(r.to_step)}`, "#a61e4d", "#fce4ee", false, false);
  events.filter((e) => !e.actionable).forEach(name);
}
function drawOverview() {
  const kept = view, [pen, width] = prepare($("overview"), 46);
  view = [facts.first_step, facts.last_step];
  const series = panels[0].series[0], {points} = columnsOf(series, width);
  let [low, high] = limits(panels[0], [{points, series}], width);
  const toY = (v) => 43 - (v - low) / (high - low) * 38;
  shade(pen, width, 0, 46);
  pen.strokeStyle = series.color; pen.lineWidth = 1.2; line(pen, points.filter((p) => p[3] === p[3]).map((p) => [p[0], Math.max(toY(p[3]), 1)]));
  const [a, b] = [toX(kept[0], width), toX(kept[1], width)];
  view = kept;
  pen.fillStyle = "rgba(238,241,245,.78)"; pen.fillRect(0, 0, a, 46); pen.fillRect(b, 0, width - b, 46);
  pen.strokeStyle = "#1c5fb0"; pen.lineWidth = 1.5; pen.strokeRect(a, 0.75, Math.max(b - a, 2), 44.5);
}
function tell() {
  const at = pointer === null ? null : Math.round(pointer);
  $("where").textContent = at === null ? `steps ${whole(view[0])} to ${whole(view[1])}` : `step ${whole(at)}`;
  for (const panel of panels) for (const series of panel.series) {
    if (!series.output) continue;
    const i = at === null ? -1 : nearest(series, at), far = i < 0 || Math.abs(series.x[i] - at) > Math.max((view[1] - view[0]) / 60, 1);
    series.output.textContent = far ? "" : short(series.y[i]);
  }
}
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false; drawOverview(); drawLane(); panels.forEach((panel, i) => drawPanel(panel, i === panels.length - 1)); tell();
  });
}
function look(from, to) {
  const least = Math.min(8, facts.last_step - facts.first_step || 1), wide = Math.max(to - from, least);
  const middle = (from + to) / 2;
  from = Math.max(middle - wide / 2, facts.first_step); to = Math.min(from + wide, facts.last_step); from = Math.max(to - wide, facts.first_step);
  view = [from, to]; draw();
}
function zoom(at, factor) { look(at - (at - view[0]) * factor, at + (view[1] - at) * factor); }

// ---- the map of layers and steps around one event ----
const COLD = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
function shadeOf(t) {  // t in [-1, 1]
  const at = (Math.max(-1, Math.min(1, t)) + 1) / 2 * (COLD.length - 1), i = Math.min(at | 0, COLD.length - 2), f = at - i;
  return `rgb(${COLD[i].map((c, k) => Math.round(c + f * (COLD[i + 1][k] - c))).join(",")})`;
}
let heatPlace = null;
function drawHeat() {
  const map = facts.heat[$("heat-event").selectedIndex];
  if (!map) return;
  const stat = map.stats[$("heat-stat").selectedIndex], rows = map[$("heat-rows").value], values = stat[$("heat-rows").value];
  const tall = Math.max(9, Math.min(20, 420 / rows.length)), left = 92, top = 20, n = map.steps.length;
  const [pen, width] = prepare($("heat"), top + rows.length * tall + 62), plot = width - left - RIGHT, cell = plot / n, bottom = top + rows.length * tall;
  rows.forEach((name, r) => {
    for (let s = 0; s < n; s++) {
      const v = values[r * n + s];
      pen.fillStyle = v !== null ? (v >= 8.9 ? "#4a0613" : shadeOf(v / map.most)) : "#eef0f4";  // over the top: not a finite number
      pen.fillRect(left + s * cell, top + r * tall, Math.ceil(cell), Math.ceil(tall));
    }
    pen.fillStyle = SOFT; pen.textAlign = "right"; pen.textBaseline = "middle";
    if (tall >= 11 || r % Math.ceil(11 / tall) === 0) pen.fillText(name, left - 8, top + (r + 0.5) * tall);
  });
  const at = (step) => left + (map.steps.findIndex((s) => s >= step)) * cell;
  pen.textBaseline = "alphabetic"; pen.lineWidth = 1.5; pen.strokeStyle = INK; pen.fillStyle = INK; pen.textAlign = "center";
  if (map.steps[0] <= map.onset && map.steps[n - 1] >= map.onset) {
    line(pen, [[at(map.onset), top - 4], [at(map.onset), bottom]]); pen.fillText(`onset ${whole(map.onset)}`, at(map.onset), top - 8);
  }
  pen.strokeStyle = "#c6cdd8"; pen.lineWidth = 1; pen.strokeRect(left, top, plot, bottom - top);
  pen.fillStyle = SOFT; pen.textBaseline = "top";
  for (const t of ticks(map.steps[0], map.steps[n - 1], Math.max(3, plot / 110))) if (t % 1 === 0) pen.fillText(whole(t), at(t) + cell / 2, bottom + 5);
  pen.textAlign = "right"; pen.fillStyle = FAINT; pen.fillText("step", width - RIGHT, bottom + 19);
  const [x, wide] = [left, 240];  // the key
  for (let p = 0; p < wide; p++) { pen.fillStyle = shadeOf(2 * p / wide - 1); pen.fillRect(x + p, bottom + 30, 1.5, 9); }
  pen.fillStyle = SOFT; pen.textAlign = "center";
  [-1, -0.5, 0, 0.5, 1].forEach((t) => { const v = 2 ** (t * map.most); pen.fillText(v < 1 ? `÷ ${Math.round(1 / v)}` : `× ${Math.round(v)}`, x + (t + 1) / 2 * wide, bottom + 43); });
  pen.textAlign = "left"; pen.fillText("of its median before the onset", x + wide + 24, bottom + 29);
  heatPlace = {map, stat, rows, values, left, top, tall, cell, n};
}
function tellHeat(event) {
  const p = heatPlace, box = $("heat").getBoundingClientRect();
  const s = Math.floor((event.clientX - box.left - p.left) / p.cell), r = Math.floor((event.clientY - box.top - p.top) / p.tall);
  const inside = s >= 0 && s < p.n && r >= 0 && r < p.rows.length, v = inside ? p.values[r * p.n + s] : null;
  const times = v >= 8.9 ? "not finite" : v !== null ? `${short(2 ** v)} times its usual` : "no value";
  $("heat-where").textContent = inside ? `${p.rows[r]}, step ${whole(p.map.steps[s])}: ${times}` : "";
}
function setHeat() {
  $("heat-section").hidden = !facts.heat.length;
  if (!facts.heat.length) return;
  $("heat-title").textContent = "Which layer moved first";
  $("heat-hint").textContent = "Each statistic by layer and step, against its own median before the onset. Dark: not finite. Grey: not recorded.";
  for (const map of facts.heat) $("heat-event").append(element("option", {textContent: map.label}));
  for (const stat of facts.heat[0].stats) $("heat-stat").append(element("option", {textContent: stat.label}));
  for (const [value, text] of [["layers", "by layer"], ["parts", "by part"]]) $("heat-rows").append(element("option", {value, textContent: text}));
  $("heat-event").selectedIndex = Math.max(facts.heat.findIndex((map) => facts.events[map.event].actionable), 0);
  for (const id of ["heat-event", "heat-stat", "heat-rows"]) $(id).onchange = drawHeat;
  $("heat").onpointermove = tellHeat;
  $("heat").onpointerleave = () => { $("heat-where").textContent = ""; };
}

// ---- the page ----
let panels = [];
function choose(index) {
  chosen = chosen === index ? -1 : index;
  document.querySelectorAll("#events tr").forEach((row, i) => row.classList.toggle("chosen", i === chosen));
  if (chosen < 0) return look(facts.first_step, facts.last_step);
  const event = facts.events[chosen], end = event.end ?? event.peak, around = Math.max(40, 1.5 * (end - event.onset));
  look(event.onset - around, end + around);
  const map = facts.heat.findIndex((heat) => heat.event === chosen);
  if (map >= 0) { $("heat-event").selectedIndex = map; drawHeat(); }
}
function setText() {
  $("name").textContent = facts.name; $("about").textContent = facts.about; $("footer").textContent = facts.footer; $("events-hint").textContent = facts.events_hint;
  for (const [value, label] of facts.figures) $("figures").append(element("div", {}, element("b", {textContent: value}), element("span", {textContent: label})));
  facts.events.forEach((event, index) => {
    const cell = (text, kind = "") => element("td", {textContent: text, className: kind});
    const step = (value) => (value === null ? "–" : whole(value));
    const kind = element("td", {}, element("span", {textContent: event.class.replaceAll("_", " "), className: event.actionable ? "tag alarm" : "tag"}));
    const row = element("tr", {onclick: () => choose(index)}, kind, cell(step(event.onset), "number"), cell(step(event.peak), "number"), cell(event.end === null ? "goes on" : step(event.end), "number"),
      cell(event.delta === null ? "–" : (event.delta >= 0 ? "+" : "−") + Math.abs(event.delta).toFixed(2), "number"), cell(event.first_signal.replaceAll("_", " ")), cell(step(event.lead), "number"), cell(event.done, "wide"));
    $("events").append(row);
  });
  if (!facts.events.length) document.querySelector("#events-section .scroll").remove();
}
function setPanels(buffer) {
  const steps = new Map();  // series of one table share their steps
  const load = (series, color) => {
    const key = JSON.stringify(series.x);
    if (!steps.has(key)) steps.set(key, stepsOf(buffer, series.x));
    const y = column(buffer, series.y);
    return {...series, x: steps.get(key), y, levels: pyramid(y), color: series.color ?? color};
  };
  $("charts").replaceChildren(element("canvas", {id: "lane", height: 36}));
  panels = facts.panels.map((panel) => {
    const series = panel.series.map((s) => load(s, UNDONE)), title = element("div", {className: "title"}, element("b", {textContent: panel.title}), element("span", {className: "unit", textContent: panel.unit}));
    const several = series.filter((s) => s.label).length > 1;
    for (const s of series) if (s.label) {
      const mark = element("i", {className: s.dots ? "dot" : ""});
      mark.style.borderColor = s.color; s.output = element("output", {});
      title.append(several ? element("span", {className: "key"}, mark, s.label, s.output) : element("span", {className: "key"}, s.output));
    }
    const canvas = element("canvas", {}), holder = element("div", {className: "panel"}, title, canvas);
    $("charts").append(holder);
    return {...panel, series, canvas};
  });
}
function listen() {
  const charts = $("charts"), overview = $("overview"), clamp = (px, width) => Math.max(GUTTER, Math.min(px, width - RIGHT));
  const px = (event) => clamp(event.clientX - charts.getBoundingClientRect().left, charts.clientWidth);
  charts.addEventListener("wheel", (event) => { event.preventDefault(); zoom(toStep(px(event), charts.clientWidth), 1.2 ** Math.sign(event.deltaY)); }, {passive: false});
  charts.addEventListener("pointerdown", (event) => { charts.setPointerCapture(event.pointerId); drag = {kind: event.shiftKey ? "move" : "choose", from: px(event), to: px(event), view}; });
  charts.addEventListener("pointermove", (event) => {
    pointer = toStep(px(event), charts.clientWidth);
    if (drag) {
      drag.to = px(event);
      const shift = (drag.from - drag.to) / (charts.clientWidth - GUTTER - RIGHT) * (drag.view[1] - drag.view[0]);
      if (drag.kind === "move") return look(drag.view[0] + shift, drag.view[1] + shift);
    }
    draw();
  });
  charts.addEventListener("pointerup", () => {
    const done = drag; drag = null;
    if (done && done.kind === "choose" && Math.abs(done.to - done.from) > 5) look(...[done.from, done.to].sort((a, b) => a - b).map((p) => toStep(p, charts.clientWidth)));
    else draw();
  });
  charts.addEventListener("pointerleave", () => { pointer = null; draw(); });
  charts.addEventListener("dblclick", () => look(facts.first_step, facts.last_step));
  const slide = (event) => {
    const at = facts.first_step + (clamp(event.offsetX, overview.clientWidth) - GUTTER) / (overview.clientWidth - GUTTER - RIGHT) * (facts.last_step - facts.first_step), half = (view[1] - view[0]) / 2;
    look(at - half, at + half);
  };
  overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); slide(event); overview.onpointermove = slide; });
  overview.addEventListener("pointerup", () => { overview.onpointermove = null; });
  $("whole").onclick = () => look(facts.first_step, facts.last_step);
  $("closer").onclick = () => zoom((view[0] + view[1]) / 2, 0.5);
  $("wider").onclick = () => zoom((view[0] + view[1]) / 2, 2);
  window.addEventListener("resize", () => { draw(); drawHeat(); });
}
async function open() {
  setText(); setHeat();
  setPanels(await decode($("columns").textContent));
  $("columns").remove();
  listen(); draw(); drawHeat();
  const wanted = location.hash.match(/^#(\d+)-(\d+)$/);  // report.html#1200-1500: those steps
  if (wanted) look(Number(wanted[1]), Number(wanted[2]));
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.openedMs = Math.round(performance.now()); }));
}
open();
