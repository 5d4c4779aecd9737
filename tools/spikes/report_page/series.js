// Series of up to a million points: decoded once, with a pyramid of extremes so that drawing costs pixels and not points.
const FAN = 16;  // children of a node in a pyramid

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

async function decode(text) {  // the inverse of Columns.encoded in columns.py
  const stream = new Blob([fromBase64(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = planes.length / 4, bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0, from = plane * count; i < count; i++) bytes[4 * i + plane] = planes[from + i];
  return bytes.buffer;
}

function stepsOf(buffer, place) {
  if (place.stride === undefined) return new Int32Array(buffer, place.at * 4, place.length);
  const steps = new Float64Array(place.length);
  for (let i = 0; i < steps.length; i++) steps[i] = place.start + i * place.stride;
  return steps;
}

function pyramid(y) {  // levels of the lowest, highest and sum of every FAN, FAN^2, ... points
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
      s[k] += sum[i];
      w[k] += weight ? weight[i] : 1;
    }
    levels.push({low: l, high: h, sum: s, weight: w});
    low = l; high = h; sum = s; weight = w;
  }
  return levels;
}

function range(series, from, to) {  // [lowest, highest, mean] of points from..to (exclusive), null where there are none
  let low = Infinity, high = -Infinity, sum = 0, weight = 0, level = -1;
  const take = (l, h, s, w) => {
    if (l !== l) return;
    if (l < low) low = l;
    if (h > high) high = h;
    sum += s; weight += w;
  };
  while (from < to) {
    const at = level < 0 ? null : series.levels[level];
    const {y} = series, node = (i) => at ? take(at.low[i], at.high[i], at.sum[i], at.weight[i]) : take(y[i], y[i], y[i], 1);
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

function nearest(series, step) {  // index of the point nearest to `step`, -1 where there is none
  const i = firstAt(series.x, step), x = series.x;
  if (!x.length) return -1;
  return i >= x.length || (i > 0 && step - x[i - 1] <= x[i] - step) ? i - 1 : i;
}
