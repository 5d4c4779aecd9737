// The text of the page, the table of events, and opening it all.
function choose(index) {  // an event: zoom in on it and show its map; the same again: the whole run
  chosen = chosen === index ? -1 : index;
  document.querySelectorAll("#events tr").forEach((row, i) => row.classList.toggle("chosen", i === chosen));
  if (chosen < 0) return showSteps(...ALL);
  const event = facts.events[chosen], end = event.end ?? event.peak, around = Math.max(40, 1.5 * (end - event.onset));
  showSteps(event.onset - around, end + around);
  const map = facts.heat.findIndex((heat) => heat.event === chosen);
  if (map >= 0) { $("heat-event").selectedIndex = map; drawHeat(); }
}

function eventRow(event, index) {
  const cell = (text, className = "") => element("td", {textContent: text, className});
  const step = (value) => (value === null ? "–" : whole(value));
  const rise = event.delta === null ? "–" : (event.delta >= 0 ? "+" : "−") + Math.abs(event.delta).toFixed(2);
  const tag = element("span", {textContent: words(event.class), className: event.actionable ? "tag alarm" : "tag"});
  const end = event.end === null ? "ongoing" : step(event.end);
  const numbers = [step(event.onset), step(event.peak), end, rise].map((text) => cell(text, "number"));
  const rest = [cell(words(event.first_signal)), cell(step(event.lead), "number"), cell(event.done, "wide")];
  return element("tr", {onclick: () => choose(index)}, element("td", {}, tag), ...numbers, ...rest);
}

function segmentRow(segment) {  // a click shows the steps around its start
  const cell = (text, className = "") => element("td", {textContent: text, className});
  const change = (c) => element("div", {}, element("span", {textContent: c.effect, className: c.grave ? "tag alarm" : "tag"}),
    ` ${c.name}: ${c.old} → ${c.new}${c.note ? ` (${c.note})` : ""}`);
  const changes = element("td", {className: "wide"}, ...segment.changes.map(change));
  if (!segment.changes.length) changes.textContent = segment.index > 1 ? "nothing" : "–";
  const show = () => showSteps(segment.step - 40, segment.step + 40);
  const first = [cell(String(segment.index), "number"), cell(segment.cause), cell(whole(segment.step), "number"), cell(segment.time)];
  return element("tr", {onclick: show}, ...first, changes, cell(segment.verdict, "wide"));
}

function setText() {
  for (const id of ["name", "about", "events-hint"]) $(id).textContent = facts[id.replace("-", "_")];
  for (const [value, label] of facts.figures)
    $("figures").append(element("div", {}, element("b", {textContent: value}), element("span", {textContent: label})));
  $("events").append(...facts.events.map(eventRow));
  $("segments").append(...facts.segments.map(segmentRow));
  $("segments-section").hidden = facts.segments.length === 0;
  if (!facts.events.length) document.querySelector("#events-section .scroll").remove();
}

async function open() {
  setText();
  setHeat();
  setPanels(await decode($("columns").textContent));
  $("columns").remove();
  listenToCharts();
  listenToOverview();
  window.addEventListener("resize", () => { draw(); drawHeat(); });
  draw();
  drawHeat();
  const wanted = location.hash.match(/^#(\d+)-(\d+)$/);  // report.html#1200-1500: those steps
  if (wanted) showSteps(Number(wanted[1]), Number(wanted[2]));
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.openedMs = Math.round(performance.now()); }));
}
open();
