"use strict";
// What all parts of the page share: the report's facts, elements, colours, and how numbers and axes are written.
const facts = JSON.parse(document.getElementById("facts").textContent);
const INK = "#1c2230", SOFT = "#5b6475", FAINT = "#8d96a6", GRID = "#e9edf2", ALARM = "#c92a2a", UNDONE = "#d6336c", SEGMENT = "#6741d9";
const $ = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

const whole = (value) => Math.round(value).toLocaleString("en");
const words = (name) => name.replaceAll("_", " ");

function short(value) {
  if (value === undefined || value !== value) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return size >= 1000 ? whole(value) : String(Number(value.toPrecision(4)));
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * power;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return found;
}

function logTicks(low, high, base) {
  const found = [];
  if (base === 2) {
    const every = Math.max(1, Math.ceil(Math.log2(high / low) / 4));
    for (let p = Math.ceil(Math.log2(low)); 2 ** p <= high; p++) if (p % every === 0) found.push(2 ** p);
    return found;
  }
  const decades = Math.log10(high / low), every = Math.max(1, Math.ceil(decades / 5));
  const factors = decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 3] : [1];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const t of factors.map((m) => m * 10 ** p))
      if ((factors.length > 1 || p % every === 0) && t >= low && t <= high) found.push(t);
  return found.length > 1 ? found : ticks(low, high, 4);
}
