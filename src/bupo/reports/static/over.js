// Numbers over seeds, as bupo.utils.statistics has them; `data.student` holds its factors by the number of seeds.
function over(values) {
  const n = values.length, mean = values.reduce((sum, v) => sum + v, 0) / n;
  if (n < 2) return { n, mean, sd: null, low: null, high: null };
  const sd = Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (n - 1)), half = data.student[n] * sd / Math.sqrt(n);
  return { n, mean, sd, low: mean - half, high: mean + half };
}
// One decimal as Python rounds: a tie, which only quarters are, to the even digit.
function fixed(x) {
  if (!Number.isInteger(4 * x) || (4 * x) % 2 === 0) return x.toFixed(1);
  const low = Math.floor(10 * x);
  return ((low % 2 === 0 ? low : low + 1) / 10).toFixed(1);
}
// A cell's number over the seeds that are wanted: what is shown and what is exported. Null where it has none of them.
function numberOf(cell, wanted) {
  const values = cell.values.filter(([seed]) => seed === null || wanted(seed));
  if (!values.length) return null;
  const found = over(values.map(([, value]) => value)), sign = cell.kind === "difference" && found.mean >= 0 ? "+" : "";
  if (found.n === 1 && cell.problems && cell.values.length === 1) [found.low, found.high] = cell.problems;
  const rest = cell.kind === "sd" ? (found.n > 1 ? "± " + fixed(found.sd) : "")
    : found.low === null ? "" : `[${fixed(found.low)}, ${fixed(found.high)}]`;
  return { ...found, kind: cell.kind, mean_text: sign + fixed(found.mean), rest, n_text: "n=" + found.n };
}
// By x, over curves of several seeds: what each x has of them.
function overCurves(curves) {
  const at = new Map();
  for (const { x, y } of curves) x.forEach((place, i) => {
    if (y[i] === null) return;
    if (!at.has(place)) at.set(place, []);
    at.get(place).push(y[i]);
  });
  return [...at.entries()].toSorted(([a], [b]) => a - b).map(([x, values]) => ({ x, ...over(values) }));
}
