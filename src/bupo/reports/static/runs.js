const FACETS = ["model", "method", "layer", "seed"], PANELS = 6;
const dashes = ["solid", "dash", "dot", "dashdot"];
const PREFERRED = ["reward", "entropy", "internal/entropy", "completions/mean_length", "eval", "clip_ratio/region_mean"];
const groups = data.groups.map((group, number) => {
  const place = data.groups.slice(0, number).filter(each => each.vanilla === group.vanilla).length;
  return { ...group, number, colour: group.vanilla ? "#6b7280" : colours[place % colours.length],
    dash: dashes[Math.floor(place / (group.vanilla ? 1 : colours.length)) % dashes.length] };
});
const runs = data.runs.map(run => ({ ...run, curves: Object.fromEntries(Object.entries(run.y).map(([name, { from, x, y }]) =>
  [name, { x: x || y.map((_, i) => from + i), y }])) }));
const seeds = [...new Set([...runs, ...data.layers, ...Object.values(data.passes).flat()].map(each => each.seed).concat(
  data.tables.flatMap(table => table.rows.flatMap(row => row.cells.flatMap(cell => cell && cell.values ? cell.values.map(([seed]) => seed) : [])))))]
  .filter(seed => seed !== null).toSorted((a, b) => a - b);
const chosen = Object.fromEntries(FACETS.map(facet => [facet, new Set()]));  // none chosen: all pass
const measures = PREFERRED.map(name => name === "eval" ? Object.keys(data.series).find(each => each.startsWith("eval/")) : name)
  .filter(name => name in data.series);

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

// -- what passes

const passes = (facet, value) => !chosen[facet].size || chosen[facet].has(String(value));
const wantedSeed = seed => seed === null || passes("seed", seed);
const seen = group => ["model", "method", "layer"].every(facet => passes(facet, group[facet]));
const shownRuns = () => runs.filter(run => seen(groups[run.group]) && wantedSeed(run.seed));

function fillFilters() {
  const values = { ...Object.fromEntries(["model", "method", "layer"].map(facet => [facet, [...new Set(groups.map(group => group[facet]))]])), seed: seeds };
  values.layer.sort((a, b) => (a === "none") - (b === "none") || a.localeCompare(b, "en", { numeric: true }));
  for (const facet of FACETS) {
    if (values[facet].length < 2) continue;
    const box = element("fieldset", "", element("legend", "", facet));
    for (const value of values[facet]) {
      const input = element("input");
      input.type = "checkbox"; input.name = facet; input.value = value;
      input.addEventListener("change", () => { chosen[facet][input.checked ? "add" : "delete"](input.value); changed(); });
      box.append(element("label", "", input, String(value)));
    }
    $("filters").append(box);
  }
}

// -- the address keeps what is chosen

function toAddress() {
  const words = new URLSearchParams();
  for (const facet of FACETS) for (const value of chosen[facet]) words.append(facet, value);
  if ($("single") && $("single").checked) words.append("single", "1");
  const text = "#" + words;
  if (text !== (location.hash || "#")) location.replace(text);
}
function fromAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const facet of FACETS) chosen[facet].clear();
  for (const input of $("filters").querySelectorAll("input")) {
    input.checked = words.getAll(input.name).includes(input.value);
    if (input.checked) chosen[input.name].add(input.value);
  }
  if ($("single")) $("single").checked = words.get("single") === "1";
}

// -- curves

function lineOf(group, points, digits) {
  const tails = points.map(p => p.low === null ? (p.n ? `  n=${p.n}` : "") : `  [${digits(p.low)}, ${digits(p.high)}]${p.n ? `  n=${p.n}` : ""}`);
  const banded = points.filter(p => p.low !== null), made = [];
  if (banded.length) made.push(interval(banded.map(p => p.x), banded.map(p => p.low), banded.map(p => p.high), group.colour));
  made.push({ x: points.map(p => p.x), y: points.map(p => p.mean), name: plain(group.name), mode: points.length > 25 ? "lines" : "lines+markers",
    type: "scatter", line: { color: group.colour, width: 1.8, dash: group.dash }, marker: { size: 4 }, showlegend: false,
    customdata: points.map((p, i) => digits(p.mean) + tails[i]), hovertemplate: "%{customdata}<extra>" + hovered(group.name) + "</extra>" });
  return made;
}
const digits = x => Number(x.toPrecision(4)).toString();
function narrowLayout(x, y, more) {
  const made = layout("", { hovermode: groups.length > 10 ? "closest" : "x unified", margin: { l: 48, r: 10, t: 10, b: 38 }, ...more });
  made.xaxis.title = { text: x, font: { size: 11 } }; made.yaxis.title = { text: y, font: { size: 11 } }; made.xaxis.rangemode = "normal";
  return made;
}
// The axis is that of the runs: the interval of two seeds is so wide that nothing else would be seen, and may leave it.
function reach(curves, bands) {
  const values = [...curves.flatMap(curve => curve.y), ...bands.filter(point => point.n > 2).flatMap(point => [point.low, point.high])].filter(y => y !== null);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const size = Math.max(Math.abs(low), Math.abs(high)) || 1, room = high - low > 1e-6 * size ? 0.06 * (high - low) : 0.5 * size;
  return values.length ? { range: [low - room, high + room] } : {};
}
const bandsFirst = traces => [...traces.filter(trace => trace.fill), ...traces.filter(trace => !trace.fill)];  // no line is under one
function drawPanel(panel) {
  const name = panel.measure, visible = shownRuns().filter(run => run.curves[name]), traces = [];
  const shown = groups.filter(group => visible.some(run => run.group === group.number));
  if ($("single").checked) for (const run of visible) traces.push({ ...run.curves[name], mode: "lines", type: "scatter", hoverinfo: "skip",
    showlegend: false, opacity: 0.55, line: { width: 0.8, color: groups[run.group].colour } });
  const joined = shown.map(group => overCurves(visible.filter(run => run.group === group.number).map(run => run.curves[name])));
  shown.forEach((group, i) => traces.push(...lineOf(group, joined[i], digits)));
  const firsts = new Map(shown.filter(group => group.first).map(group => [group.first, group.colour]));
  const shapes = [...firsts].flatMap(([first, colour], i) => [
    ...(i ? [] : [{ type: "rect", xref: "x", yref: "paper", x0: 0.5, x1: Math.max(...firsts.keys()) + 0.5, y0: 0, y1: 1, fillcolor: css("--shade"), line: { width: 0 }, layer: "below" }]),
    { type: "line", xref: "x", yref: "paper", x0: first + 0.5, x1: first + 0.5, y0: 0, y1: 1, line: { color: colour, width: 1, dash: "dot" } }]);
  const made = narrowLayout("rollout batch", "", { shapes });
  Object.assign(made.yaxis, reach(visible.map(run => run.curves[name]), joined.flat()));
  Plotly.react(panel.plot, bandsFirst(traces), made, { ...config, displayModeBar: false });
}
const panels = [];
function fillPanels() {
  const others = Object.keys(data.series).filter(name => !measures.includes(name));
  for (const measure of [...measures, ...others].slice(0, PANELS)) {
    const select = element("select", "", ...Object.entries(data.series).map(([name, title]) => new Option(title, name, false, name === measure)));
    const plot = element("div", "plot"), panel = { measure, plot };
    select.setAttribute("aria-label", `measure of panel ${panels.length + 1}`);
    select.addEventListener("change", () => { panel.measure = select.value; drawPanel(panel); });
    panels.push(panel);
    $("curves").append(element("figure", "", select, plot));
  }
}

// -- tables

function rowsOf(table) {
  return table.rows.map(row => ({ ...row, cells: row.cells.map(cell => cell && cell.values ? numberOf(cell, wantedSeed) : cell) }))
    .filter(row => seen(groups[row.group]) && row.cells.some(cell => cell && cell.n));
}
function cellOf(cell, first) {
  if (first) { const th = element("th", "", cell); th.scope = "row"; return th; }
  if (cell === null || typeof cell === "string") return element("td", "left", cell || "");
  return element("td", "", element("b", "", cell.mean_text), cell.rest && " ", element("span", "", cell.rest), " ", element("i", "", cell.n_text));
}
function headOf(heads, numbers) {
  return element("thead", "", element("tr", "", ...heads.map((head, i) => {
    const th = element("th", numbers(i) ? "" : "left", head); th.scope = "col"; return th;
  })));
}
function drawTables() {
  const said = new Set();  // a note that holds for several tables stands once
  $("tables").replaceChildren(...data.tables.flatMap(table => {
    const rows = rowsOf(table), isNumber = i => table.rows.some(row => row.cells[i] && row.cells[i].values);
    if (!rows.length) return [];
    const made = element("table", "numbers", headOf(table.heads, isNumber), element("tbody", "", ...rows.map(row =>
      element("tr", "", ...row.cells.map((cell, i) => cellOf(cell, i === 0))))));
    const grid = element("div", "grid", made), title = `Table ${table.number}: ${table.title}`;
    grid.tabIndex = 0; grid.setAttribute("role", "region"); grid.setAttribute("aria-label", title);
    made.dataset.table = table.number;
    const note = said.has(table.note) ? [] : [element("p", "", table.note)];
    said.add(table.note);
    return [element("h3", "", title), ...note, grid];
  }));
}
const csvCell = text => {
  const safe = text.trim() !== "" && Number.isFinite(Number(text)) || !/^ *[=+\-@\t\r\n]/.test(text) ? text : "'" + text;
  return /[",\r\n]/.test(safe) ? '"' + safe.replace(/"/g, '""') + '"' : safe;
};
function csv() {
  const lines = [["table", "method", "column", "mean", "sd", "low", "high", "n", "kind"]];
  for (const table of data.tables) for (const row of rowsOf(table)) row.cells.forEach((cell, i) => {
    if (cell && cell.n) lines.push([table.number, groups[row.group].name, table.heads[i], cell.mean, cell.sd, cell.low, cell.high, cell.n, cell.kind]);
  });
  return lines.map(line => line.map(x => x === null ? "" : csvCell(String(x))).join(",")).join("\n") + "\n";
}
const markdownCell = text => text.split(/\s+/).filter(Boolean).join(" ").replace(/([\\|[\]<>`*!])/g, "\\$1");
const markdownOf = cell => cell && cell.n ? [cell.mean_text, cell.rest, cell.n_text].filter(Boolean).join(" ") : markdownCell(cell || "");
const markdownLine = cells => `| ${cells.map(markdownOf).join(" | ")} |`;
function markdown() {
  return data.tables.map(table => [table, rowsOf(table)]).filter(([, rows]) => rows.length).map(([table, rows]) =>
    `## Table ${table.number}: ${table.title}\n\n${table.note}\n\n` +
      [markdownLine(table.heads), "|" + "---|".repeat(table.heads.length), ...rows.map(row => markdownLine(row.cells))].join("\n") + "\n").join("\n");
}

// -- pass@K, layers, dynamics, runs

function drawPasses() {
  const curves = data.passes[$("benchmark").value].filter(curve => seen(groups[curve.group]) && wantedSeed(curve.seed));
  const joined = groups.map(group => overCurves(curves.filter(curve => curve.group === group.number).map(({ k, y }) => ({ x: k, y }))));
  const traces = groups.flatMap((group, i) => joined[i].length ? lineOf(group, joined[i], digits) : []);
  const ticks = [...new Set(curves.flatMap(curve => curve.k))].toSorted((a, b) => a - b);
  const made = narrowLayout("K", "pass@K (%)");
  Object.assign(made.xaxis, { type: "log", tickvals: ticks, ticktext: ticks.map(String) });
  Object.assign(made.yaxis, reach(curves, joined.flat()));
  Plotly.react("passes", bandsFirst(traces), made, config);
}
function fillGroups(id, known) {
  const kept = $(id).value, options = known.filter(group => seen(group));
  $(id).replaceChildren(...options.map(group => new Option(group.name, group.number)));
  if (options.some(group => String(group.number) === kept)) $(id).value = kept;
}
const measured = number => data.layers.filter(each => each.group === number && wantedSeed(each.seed));
const whole = group => group.of === null ? group.number : group.of;
function layerGroups() {  // runs with an analysis of their end or a checkpoint, else models as they are
  const own = groups.filter(group => measured(group.number).length);
  const trained = [...new Set(own.filter(group => group.before !== null || group.at).map(whole))].filter(number => seen(groups[number]));
  const covered = new Set(trained.map(number => groups[number].before));
  return [...trained.map(number => groups[number]), ...own.filter(group => group.before === null && !group.at && !covered.has(group.number))];
}
function layerParts(group) {  // before training, at checkpoints, after
  const checkpoints = groups.filter(each => each.of === group.number && each.update !== null).toSorted((a, b) => a.update - b.update);
  return [...(group.before === null ? [] : [[groups[group.before], "before"]]), ...checkpoints.map(each => [each, each.at]),
    [group, group.before === null ? group.name : "after"]];
}
function layerPoints(curves) {  // of each layer its mean and interval: over seeds, or of the one analysis
  const x = curves[0][0].map((_, layer) => layer + 1);
  if (curves.length > 1) return overCurves(curves.map(([y]) => ({ x, y })));
  const [mean, low, high] = curves[0];
  return x.map((layer, i) => ({ x: layer, mean: mean[i], low: low[i], high: high[i] })).filter(point => point.mean !== null);
}
const BETWEEN = ["#7c3aed", "#2563eb", "#0891b2", "#059669", "#65a30d", "#d97706"];
function drawLayers() {
  fillGroups("layer-group", layerGroups());
  const group = groups[$("layer-group").value], measure = $("layer-measure").value;
  const parts = (group ? layerParts(group) : []).map(([each, name]) => [name, measured(each.number).map(one => one.curves[measure]).filter(Boolean)])
    .filter(([, curves]) => curves.length);
  const colourOf = (name, i) => name === "before" ? "#6b7280" : name === "after" ? "#dc2626" : parts.length === 1 ? group.colour
    : BETWEEN[Math.round((i - 1) * 5 / Math.max(1, parts.length - 3))] || BETWEEN[0];
  const traces = parts.flatMap(([name, curves], i) => lineOf({ name, colour: colourOf(name, i), dash: "solid" }, layerPoints(curves), digits)
    .map(trace => trace.hoverinfo === "skip" ? trace : { ...trace, showlegend: true, mode: "lines+markers" }));
  Plotly.react("layers", traces, narrowLayout("layer", data.layer_names[measure], { margin: { l: 56, r: 10, t: 34, b: 38 } }), config);
}
function drawDynamics() {
  fillGroups("dynamics-group", data.dynamics.map(each => groups[each.group]));
  const found = data.dynamics.find(each => each.group === Number($("dynamics-group").value) && $("dynamics-group").value !== "");
  for (const [measure, title] of [["cosine", "cosine with layer …"], ["kl", "KL to the policy of layer … (nats)"]]) {
    const lines = found ? found.lines.filter(line => line.measure === measure) : [], last = Math.max(1, lines.length - 1);
    const traces = lines.map((line, i) => ({ x: line.x, y: line.y, name: `${line.layer} → ${line.later}`, type: "scatter", mode: "lines",
      line: { width: 1.5, color: `hsl(${250 - 200 * i / last}, 65%, 50%)` } }));
    Plotly.react("dynamics-" + measure, traces, narrowLayout("rollout batches done", title, { margin: { l: 52, r: 10, t: 34, b: 38 } }), { ...config, displayModeBar: false });
  }
}
function drawRuns() {
  const rows = shownRuns().map(run => [run.folder, groups[run.group].name, String(run.seed), run.chosen || groups[run.group].layer,
    run.first === groups[run.group].planned || !groups[run.group].planned ? String(run.first) : `${run.first} of ${groups[run.group].planned}`, String(run.batches), run.finished ? "yes" : "no"]);
  $("runs").replaceChildren(headOf(["folder", "method", "seed", "layer", "phase 1", "rollout batches", "finished"], () => false),
    element("tbody", "", ...rows.map(row => element("tr", "", ...row.map((cell, i) => cellOf(cell, i === 0))))));
}

// -- all of it

function drawKey() {
  const known = groups.filter(group => seen(group) && !group.at), number = runs.filter(run => seen(groups[run.group]) && wantedSeed(run.seed)).length;
  $("key").replaceChildren(...known.map(group => {
    const own = new Set(runs.filter(run => run.group === group.number && wantedSeed(run.seed)).map(run => run.seed)).size;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const dash = { solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2" }[group.dash];
    for (const [name, value] of Object.entries({ width: 24, height: 8, "aria-hidden": true })) svg.setAttribute(name, value);
    for (const [name, value] of Object.entries({ x1: 0, x2: 24, y1: 4, y2: 4, stroke: group.colour, "stroke-width": 2.5, "stroke-dasharray": dash })) line.setAttribute(name, value);
    svg.append(line);
    return element("li", "", svg, group.name + (own ? `, ${own} seed${own > 1 ? "s" : ""}` : ""));
  }));
  $("count").textContent = known.length ? `${number} of ${runs.length} training runs, ${known.length} of ${groups.filter(group => !group.at).length} settings`
    : "Nothing passes these filters.";
  $("reset").disabled = FACETS.every(facet => !chosen[facet].size);
}
function drawAll() {
  drawKey();
  panels.forEach(drawPanel);
  drawTables();
  if ($("passes")) drawPasses();
  if ($("layers")) drawLayers();
  if ($("dynamics-group")) drawDynamics();
  if ($("runs")) drawRuns();
}
function changed() { toAddress(); drawAll(); }
fillFilters();
if ($("curves")) fillPanels();
fromAddress();
if ($("single")) $("single").addEventListener("change", changed);
if ($("benchmark")) $("benchmark").addEventListener("change", drawPasses);
if ($("layers")) ["layer-group", "layer-measure"].forEach(id => $(id).addEventListener("change", drawLayers));
if ($("dynamics-group")) $("dynamics-group").addEventListener("change", drawDynamics);
if ($("csv")) $("csv").addEventListener("click", () => download("tables.csv", csv(), "text/csv"));
if ($("markdown")) $("markdown").addEventListener("click", () => download("tables.md", markdown(), "text/markdown"));
$("reset").addEventListener("click", () => {
  for (const facet of FACETS) chosen[facet].clear();
  $("filters").querySelectorAll("input").forEach(input => { input.checked = false; });
  changed();
});
addEventListener("hashchange", () => { fromAddress(); drawAll(); });
followTheme(drawAll);
