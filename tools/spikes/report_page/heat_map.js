// The map of layers and steps around one event.
const SCALE = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
const NOT_FINITE = 8.9;  // values from here on stand for it (NOT_FINITE in heat_map.py)
let heat = null;  // what is drawn, and where

function colorOf(t) {  // t in [-1, 1]
  const at = (Math.max(-1, Math.min(1, t)) + 1) / 2 * (SCALE.length - 1), i = Math.min(at | 0, SCALE.length - 2), f = at - i;
  return `rgb(${SCALE[i].map((c, k) => Math.round(c + f * (SCALE[i + 1][k] - c))).join(",")})`;
}

function drawHeat() {
  const map = facts.heat[$("heat-event").selectedIndex];
  if (!map) return;
  const kind = $("heat-rows").value, rows = map[kind], values = map.stats[$("heat-stat").selectedIndex][kind];
  const tall = Math.max(9, Math.min(20, 420 / rows.length)), left = 92, top = 20, n = map.steps.length;
  const [pen, width] = prepare($("heat"), top + rows.length * tall + 62);
  const plot = width - left - RIGHT, cell = plot / n, bottom = top + rows.length * tall;
  pen.textAlign = "right"; pen.textBaseline = "middle";
  rows.forEach((name, r) => {
    for (let s = 0; s < n; s++) {
      const v = values[r * n + s];
      pen.fillStyle = v === null ? "#eef0f4" : v >= NOT_FINITE ? "#4a0613" : colorOf(v / map.most);
      pen.fillRect(left + s * cell, top + r * tall, Math.ceil(cell), Math.ceil(tall));
    }
    pen.fillStyle = SOFT;
    if (tall >= 11 || r % Math.ceil(11 / tall) === 0) pen.fillText(name, left - 8, top + (r + 0.5) * tall);
  });
  const at = (step) => left + map.steps.findIndex((s) => s >= step) * cell, onset = at(map.onset);
  pen.textBaseline = "alphabetic"; pen.lineWidth = 1.5; pen.strokeStyle = INK; pen.fillStyle = INK; pen.textAlign = "center";
  if (map.steps[0] <= map.onset && map.steps[n - 1] >= map.onset) {
    line(pen, [[onset, top - 4], [onset, bottom]]); pen.fillText(`onset ${whole(map.onset)}`, onset, top - 8);
  }
  pen.strokeStyle = "#c6cdd8"; pen.lineWidth = 1; pen.strokeRect(left, top, plot, bottom - top);
  pen.fillStyle = SOFT; pen.textBaseline = "top";
  for (const t of ticks(map.steps[0], map.steps[n - 1], Math.max(3, plot / 110)))
    if (t % 1 === 0) pen.fillText(whole(t), at(t) + cell / 2, bottom + 5);
  pen.textAlign = "right"; pen.fillStyle = FAINT; pen.fillText("step", width - RIGHT, bottom + 19);
  drawHeatKey(pen, left, bottom, map.most);
  heat = {map, rows, values, left, top, tall, cell, n};
}

function drawHeatKey(pen, x, bottom, most) {
  const wide = 240;
  for (let p = 0; p < wide; p++) { pen.fillStyle = colorOf(2 * p / wide - 1); pen.fillRect(x + p, bottom + 30, 1.5, 9); }
  pen.fillStyle = SOFT; pen.textAlign = "center";
  for (const t of [-1, -0.5, 0, 0.5, 1]) {
    const v = 2 ** (t * most), text = v < 1 ? `÷ ${Math.round(1 / v)}` : `× ${Math.round(v)}`;
    pen.fillText(text, x + (t + 1) / 2 * wide, bottom + 43);
  }
  pen.textAlign = "left"; pen.fillText("of its median before the onset", x + wide + 24, bottom + 29);
}

function showHeatValue(event) {
  const {map, rows, values, left, top, tall, cell, n} = heat, box = $("heat").getBoundingClientRect();
  const s = Math.floor((event.clientX - box.left - left) / cell), r = Math.floor((event.clientY - box.top - top) / tall);
  const inside = s >= 0 && s < n && r >= 0 && r < rows.length, v = inside ? values[r * n + s] : null;
  const times = v === null ? "no value" : v >= NOT_FINITE ? "not finite" : `${short(2 ** v)} times its median`;
  $("heat-where").textContent = inside ? `${rows[r]}, step ${whole(map.steps[s])}: ${times}` : "";
}

function setHeat() {
  $("heat-section").hidden = !facts.heat.length;
  if (!facts.heat.length) return;
  for (const map of facts.heat) $("heat-event").append(element("option", {textContent: map.label}));
  for (const stat of facts.heat[0].stats) $("heat-stat").append(element("option", {textContent: stat.label}));
  $("heat-event").selectedIndex = Math.max(facts.heat.findIndex((map) => facts.events[map.event].actionable), 0);
  for (const id of ["heat-event", "heat-stat", "heat-rows"]) $(id).onchange = drawHeat;
  $("heat").onpointermove = showHeatValue;
  $("heat").onpointerleave = () => { $("heat-where").textContent = ""; };
}
