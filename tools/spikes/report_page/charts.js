// The curves: panels on one axis of steps, the lane of event names above them, the overview of the run, zoom and pointer.
const GUTTER = 64, RIGHT = 14;  // pixels left and right of a plot
const LANE = 36, OVERVIEW = 46;  // pixels of height
const ALL = [facts.first_step, facts.last_step];
let view = ALL, pointer = null, chosen = -1, drag = null, waiting = false, panels = [];

function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = "11.5px system-ui, 'DejaVu Sans', sans-serif";
  return [pen, width];
}
const toX = (step, width, [first, last] = view) => GUTTER + (step - first) / (last - first || 1) * (width - GUTTER - RIGHT);
const toStep = (px, width, [first, last] = view) => first + (px - GUTTER) / (width - GUTTER - RIGHT) * (last - first);

function line(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
}

function pointsOf(series, width, span = view) {  // points: [x, lowest, highest, mean] of each pixel, or of single steps
  const {x, y} = series, [first, last] = span, plot = width - GUTTER - RIGHT, points = [];
  const from = Math.max(firstAt(x, first) - 1, 0), to = Math.min(firstAt(x, last + 1e-9) + 1, x.length);
  if (to - from <= 2 * plot || (series.dots && !series.crowd)) {
    for (let i = from; i < to; i++) points.push([toX(x[i], width, span), y[i], y[i], y[i]]);
    return {points, single: true};
  }
  let i = firstAt(x, first);
  for (let p = 0; p < plot; p++) {
    const end = p === plot - 1 ? to : firstAt(x, first + (p + 1) / plot * (last - first)), found = range(series, i, end);
    if (found) points.push([GUTTER + p + 0.5, ...found]);
    i = end;
  }
  return {points, single: false};
}

function limits(panel, drawn, width, span = view) {  // of the values in view
  const begun = toX(ALL[0] + 0.02 * (ALL[1] - ALL[0]), width, span), usable = (v) => isFinite(v) && (!panel.log || v > 0);
  let low = Infinity, high = -Infinity;
  for (const {points, series} of drawn) for (const [x, l, h, m] of points) {
    if (x < GUTTER - 1 || x > width - RIGHT + 1) continue;
    if (usable(l)) low = Math.min(low, l); else if (usable(m)) low = Math.min(low, m);
    const falls = panel.settles && x < begun && !series.dots;  // the fall at the start would flatten all else
    if (usable(h) && !falls) high = Math.max(high, h);
  }
  if (!(low < Infinity)) return [panel.log ? 0.1 : 0, 1];
  if (!(high > -Infinity)) high = low;
  if (panel.zero) low = Math.min(low, 0);
  if (panel.log) { const pad = Math.max((high / low) ** 0.06, 1.05); return [low / pad, high * pad]; }
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - (panel.zero && low === 0 ? 0 : pad), high + pad];
}

function shadeEvents(pen, width, bottom, span = view) {
  for (const r of facts.rewinds) {
    const a = toX(r.to_step, width, span), b = toX(r.from_step, width, span);
    if (b < GUTTER || a > width - RIGHT) continue;
    pen.fillStyle = "rgba(214,51,108,.07)"; pen.fillRect(a, 0, Math.max(b - a, 1), bottom);
    pen.strokeStyle = "rgba(214,51,108,.55)"; pen.setLineDash([3, 3]); line(pen, [[a, 0], [a, bottom]]); pen.setLineDash([]);
  }
  for (const s of facts.segments.slice(1)) {
    const at = toX(s.step + 0.5, width, span);
    if (at < GUTTER || at > width - RIGHT) continue;
    pen.strokeStyle = s.changes.length ? SEGMENT : "rgba(103,65,217,.35)"; pen.lineWidth = 1; pen.setLineDash([2, 3]);
    line(pen, [[at, 0], [at, bottom]]); pen.setLineDash([]);
  }
  facts.events.forEach((event, index) => {
    const a = toX(event.onset, width, span), b = Math.max(toX(event.end ?? event.peak, width, span), a + 2);
    if (b < GUTTER || a > width - RIGHT) return;
    const [rgb, strong] = event.actionable ? ["201,42,42", 0.22] : ["92,107,128", 0.26];
    pen.fillStyle = `rgba(${rgb},${index === chosen ? strong : 0.13})`;
    pen.fillRect(a, 0, b - a, bottom);
  });
}

function drawPanel(panel, last) {
  const bottom = panel.height, [pen, width] = prepare(panel.canvas, bottom + (last ? 34 : 8));
  const drawn = panel.series.filter((s) => s.x.length).map((series) => ({series, ...pointsOf(series, width)}));
  const [low, high] = limits(panel, drawn, width);
  const scale = panel.log ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
  const toY = (v) => bottom - 2 - scale(v) * (bottom - 6);
  pen.textAlign = "right"; pen.textBaseline = "middle"; pen.lineWidth = 1;
  for (const t of panel.log ? logTicks(low, high, panel.base) : ticks(low, high, panel.height > 120 ? 5 : 3)) {
    if (panel.integers && t % 1) continue;
    const y = Math.round(toY(t)) + 0.5;
    pen.strokeStyle = GRID; line(pen, [[GUTTER, y], [width - RIGHT, y]]);
    pen.fillStyle = SOFT; pen.fillText(short(t), GUTTER - 8, Math.max(toY(t), 6));
  }
  pen.save(); pen.beginPath(); pen.rect(GUTTER, 0, width - GUTTER - RIGHT, bottom); pen.clip();
  shadeEvents(pen, width, bottom);
  for (const {series, points, single} of drawn.toReversed()) {  // the run above what it left behind
    const shown = points.filter((p) => p[3] === p[3] && (!panel.log || p[3] > 0));
    pen.strokeStyle = pen.fillStyle = series.color;
    if (series.crowd && !single) drawCrowd(pen, series, toY, width, (bottom - 6) / (high - low));
    else if (series.dots) drawDots(pen, series, shown, toY);
    else drawCurve(pen, shown, single, toY, panel.log ? low * 1e-3 : -Infinity);
  }
  pen.restore();
  pen.strokeStyle = "#c6cdd8"; pen.lineWidth = 1;
  line(pen, [[GUTTER + 0.5, 0], [GUTTER + 0.5, bottom - 0.5], [width - RIGHT, bottom - 0.5]]);
  if (last) drawSteps(pen, width, bottom);
}

function drawCurve(pen, shown, single, toY, least) {  // the mean, and behind it a band from the lowest to the highest value
  if (!single) {
    pen.globalAlpha = 0.3; pen.lineWidth = 1;
    pen.beginPath();
    for (const [x, l, h] of shown) {
      const a = toY(Math.max(l, least));
      pen.moveTo(x, a + 0.4); pen.lineTo(x, Math.min(toY(h), a - 0.4));
    }
    pen.stroke(); pen.globalAlpha = 1;
  }
  pen.lineWidth = single ? 1.4 : 1.2; pen.lineJoin = "round";
  line(pen, shown.map((p) => [p[0], toY(p[3])]));
  const sparse = single && shown.length < 2 + Math.abs(shown.at(-1)?.[0] - shown[0]?.[0]) / 9;
  if (sparse) for (const [x, , , m] of shown) pen.fillRect(x - 1.75, toY(m) - 1.75, 3.5, 3.5);
}

function drawDots(pen, series, shown, toY) {
  pen.fillStyle = series.hollow ? "#fff" : series.color; pen.lineWidth = 1.5;
  for (const [x, , , m] of shown) {
    pen.beginPath(); pen.arc(x, toY(m), series.size ?? 3, 0, 7); pen.fill();
    if (series.hollow) pen.stroke();
  }
}

function drawCrowd(pen, series, toY, width, tall) {  // whole numbers, too many for dots: the darker, the more often
  const wide = 3, cells = Math.ceil((width - GUTTER - RIGHT) / wide);
  const counts = new Uint32Array(range(series, 0, series.x.length)[1] + 1);
  let i = firstAt(series.x, view[0]);
  for (let c = 0; c < cells; c++) {
    const end = firstAt(series.x, toStep(GUTTER + (c + 1) * wide, width)), all = end - i;
    counts.fill(0);
    for (; i < end; i++) counts[series.y[i]]++;
    counts.forEach((count, value) => {
      if (!count) return;
      pen.globalAlpha = Math.min(1, 1.5 * count / all);
      pen.fillRect(GUTTER + c * wide, toY(value) - tall * 0.4, wide, tall * 0.8);
    });
  }
  pen.globalAlpha = 1;
}

function drawSteps(pen, width, bottom) {
  pen.textBaseline = "top"; pen.textAlign = "center"; pen.fillStyle = SOFT;
  for (const t of ticks(...view, Math.max(3, width / 130))) if (t % 1 === 0) {
    const x = toX(t, width), half = pen.measureText(whole(t)).width / 2;
    pen.fillText(whole(t), Math.min(x, width - half), bottom + 6); line(pen, [[x, bottom], [x, bottom + 4]]);
  }
  pen.textAlign = "right"; pen.fillStyle = FAINT; pen.fillText("step", width - RIGHT, bottom + 20);
}

function drawLane() {  // names of the events and rewinds above the panels, where there is room
  const [pen, width] = prepare($("lane"), LANE), taken = [[], []];
  const chip = (step, text, ink, ground, mark, ringed) => {
    const at = Math.max(toX(step, width), GUTTER), wide = pen.measureText(text).width + 12;
    const x = Math.min(at, width - RIGHT - wide);
    pen.fillStyle = ink;
    if (mark) { pen.beginPath(); pen.moveTo(at - 4, 31); pen.lineTo(at + 4, 31); pen.lineTo(at, 36); pen.fill(); }
    const row = taken.findIndex((spans) => spans.every(([a, b]) => x + wide + 4 < a || x > b + 4));
    if (row < 0) return;
    taken[row].push([x, x + wide]);
    pen.fillStyle = ground; pen.beginPath(); pen.roundRect(x, row * 15 + 0.5, wide, 14, 4); pen.fill();
    if (ringed) { pen.strokeStyle = ink; pen.stroke(); }
    pen.fillStyle = ink; pen.fillText(text, x + 6, row * 15 + 8);
  };
  pen.textBaseline = "middle"; pen.textAlign = "left";
  const inView = (from, to) => to >= view[0] && from <= view[1];
  const events = facts.events.map((event, index) => ({...event, index})).filter((e) => inView(e.onset, e.end ?? e.peak));
  events.sort((a, b) => (b.index === chosen) - (a.index === chosen) || b.actionable - a.actionable || a.onset - b.onset);
  const name = (e) => {
    const [ink, ground] = e.actionable ? [ALARM, "#fdecec"] : [SOFT, "#eef1f5"];
    chip(e.onset, words(e.class), ink, ground, true, e.index === chosen);
  };
  events.filter((e) => e.actionable).forEach(name);
  for (const r of facts.rewinds.filter((r) => inView(r.to_step, r.from_step)))
    chip(r.to_step, `rewound ${whole(r.from_step)} to ${whole(r.to_step)}`, "#a61e4d", "#fce4ee", false, false);
  for (const s of facts.segments.slice(1).filter((s) => inView(s.step, s.step)))
    chip(s.step + 0.5, `${s.cause}${s.label ? ": " + (s.label.length > 60 ? s.label.slice(0, 57) + "…" : s.label) : ""}`, SEGMENT, "#efeafd", false, false);
  events.filter((e) => !e.actionable).forEach(name);
}

function drawOverview() {
  const [pen, width] = prepare($("overview"), OVERVIEW), series = panels[0].series[0], {points} = pointsOf(series, width, ALL);
  const [low, high] = limits(panels[0], [{points, series}], width, ALL), [a, b] = view.map((step) => toX(step, width, ALL));
  const toY = (v) => Math.max(OVERVIEW - 3 - (v - low) / (high - low) * (OVERVIEW - 8), 1);
  shadeEvents(pen, width, OVERVIEW, ALL);
  pen.strokeStyle = series.color; pen.lineWidth = 1.2;
  line(pen, points.filter((p) => p[3] === p[3]).map((p) => [p[0], toY(p[3])]));
  pen.fillStyle = "rgba(238,241,245,.78)"; pen.fillRect(0, 0, a, OVERVIEW); pen.fillRect(b, 0, width - b, OVERVIEW);
  pen.strokeStyle = "#1c5fb0"; pen.lineWidth = 1.5; pen.strokeRect(a, 0.75, Math.max(b - a, 2), OVERVIEW - 1.5);
}

function showValues() {  // at the pointer; moves with it without drawing the panels again
  const at = pointer === null ? null : Math.round(toStep(pointer, $("charts").clientWidth));
  $("where").textContent = at === null ? `steps ${whole(view[0])} to ${whole(view[1])}` : `step ${whole(at)}`;
  $("pointer").hidden = at === null;
  $("pointer").style.left = `${pointer}px`;
  const selecting = drag?.kind === "select", [a, b] = selecting ? [drag.from, drag.to].sort((p, q) => p - q) : [0, 0];
  $("selection").hidden = !selecting;
  Object.assign($("selection").style, {left: `${a}px`, width: `${b - a}px`});
  const near = Math.max((view[1] - view[0]) / 60, 1);
  for (const panel of panels) for (const series of panel.series) {
    if (!series.output) continue;
    const i = at === null ? -1 : nearest(series, at);
    series.output.textContent = i < 0 || Math.abs(series.x[i] - at) > near ? "" : short(series.y[i]);
  }
}

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawOverview(); drawLane(); showValues();
    panels.forEach((panel, i) => drawPanel(panel, i === panels.length - 1));
  });
}

function showSteps(from, to) {
  const wide = Math.max(to - from, Math.min(8, ALL[1] - ALL[0] || 1)), middle = (from + to) / 2;
  from = Math.max(middle - wide / 2, ALL[0]); to = Math.min(from + wide, ALL[1]);
  view = [Math.max(to - wide, ALL[0]), to];
  draw();
}
const zoom = (at, factor) => showSteps(at - (at - view[0]) * factor, at + (view[1] - at) * factor);

function setPanels(buffer) {
  const steps = new Map();  // series of one table share their steps
  const load = (series) => {
    const key = JSON.stringify(series.x), y = new Float32Array(buffer, series.y.at * 4, series.y.length);
    if (!steps.has(key)) steps.set(key, stepsOf(buffer, series.x));
    return {...series, x: steps.get(key), y, levels: pyramid(y), color: series.color ?? UNDONE};
  };
  const title = (panel, series) => {
    const made = element("div", {className: "title"}, element("b", {textContent: panel.title}));
    made.append(element("span", {className: "unit", textContent: panel.unit}));
    const named = series.filter((s) => s.label);
    for (const s of named) {
      const mark = element("i", {className: s.dots ? "dot" : ""});
      mark.style.borderColor = s.color; s.output = element("output", {});
      made.append(element("span", {className: "key"}, ...(named.length > 1 ? [mark, s.label] : []), s.output));
    }
    return made;
  };
  const overlays = ["selection", "pointer"].map((id) => element("div", {id, hidden: true}));
  $("charts").replaceChildren(...overlays, element("canvas", {id: "lane", height: LANE}));
  panels = facts.panels.map((panel) => {
    const series = panel.series.map(load), canvas = element("canvas", {});
    $("charts").append(element("div", {className: "panel"}, title(panel, series), canvas));
    return {...panel, series, canvas};
  });
}

function listenToCharts() {
  const charts = $("charts"), clamp = (px, width) => Math.max(GUTTER, Math.min(px, width - RIGHT));
  const px = (event) => clamp(event.clientX - charts.getBoundingClientRect().left, charts.clientWidth);
  charts.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(toStep(px(event), charts.clientWidth), 1.2 ** Math.sign(event.deltaY));
  }, {passive: false});
  charts.addEventListener("pointerdown", (event) => {
    charts.setPointerCapture(event.pointerId);
    drag = {kind: event.shiftKey ? "pan" : "select", from: px(event), to: px(event), view};
  });
  charts.addEventListener("pointermove", (event) => {
    pointer = px(event);
    if (drag) drag.to = pointer;
    if (drag?.kind === "pan") {
      const shift = toStep(drag.from, charts.clientWidth, drag.view) - toStep(drag.to, charts.clientWidth, drag.view);
      return showSteps(drag.view[0] + shift, drag.view[1] + shift);
    }
    showValues();
  });
  charts.addEventListener("pointerup", () => {
    const done = drag;
    drag = null;
    if (done?.kind === "select" && Math.abs(done.to - done.from) > 5)
      showSteps(...[done.from, done.to].sort((a, b) => a - b).map((p) => toStep(p, charts.clientWidth)));
    else showValues();
  });
  charts.addEventListener("pointerleave", () => { pointer = null; showValues(); });
  charts.addEventListener("dblclick", () => showSteps(...ALL));
}

function listenToOverview() {
  const overview = $("overview");
  const slide = (event) => {
    const at = toStep(event.offsetX, overview.clientWidth, ALL), half = (view[1] - view[0]) / 2;
    showSteps(at - half, at + half);
  };
  overview.addEventListener("pointerdown", (event) => {
    overview.setPointerCapture(event.pointerId);
    slide(event);
    overview.onpointermove = slide;
  });
  overview.addEventListener("pointerup", () => { overview.onpointermove = null; });
  $("whole").onclick = () => showSteps(...ALL);
  $("closer").onclick = () => zoom((view[0] + view[1]) / 2, 0.5);
  $("wider").onclick = () => zoom((view[0] + view[1]) / 2, 2);
}
