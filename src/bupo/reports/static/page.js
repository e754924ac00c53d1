const modelOf = label => data.models.find(m => m.meta.label === label);
function band(values, label, colour, dash) {
  const keep = values.mean.map((v, i) => i).filter(i => values.mean[i] !== null);
  const x = keep.map(i => i + 1), pick = k => keep.map(i => values[k][i]);
  const traces = [];
  if (values.low.some(v => v !== null)) traces.push(interval(x, pick("low"), pick("high"), colour));
  traces.push({ x, y: pick("mean"), name: plain(label), mode: "lines+markers", line: { color: colour, width: 1.8, dash: dash || "solid" },
    marker: { size: 5 }, customdata: keep.map(i => [values.low[i], values.high[i], values.std[i]]),
    hovertemplate: "%{y:.4f}  [%{customdata[0]:.4f}, %{customdata[1]:.4f}]  sd %{customdata[2]:.3f}<extra>" + hovered(label) + "</extra>" });
  return traces;
}
function drawCurve() {
  const key = $("measure").value;
  const traces = data.models.flatMap((m, i) => band(data.layers[m.meta.label][key], m.meta.label, colours[i % colours.length]));
  Plotly.react("curve", traces, layout(data.names[key]), config);
}
function drawFlow() {  // one line through the model: H^0, then each layer's ATTN write, FFN write and output
  const rows = data.layers[$("flowmodel").value], at = (name, i) => ["mean", "low", "high"].map(k => rows[name][k][i]);
  const points = [{ x: 0, kind: 0, name: "H^0", values: at("entropy_layer_input", 0) }];
  rows.entropy_layer.mean.forEach((_, i) => [["entropy_attn", "A", 1], ["entropy_ffn", "F", 2], ["entropy_layer", "H", 0]]
    .forEach(([key, letter, kind], step) => points.push({ x: i + (step + 1) / 3, kind, name: `${letter}^${i + 1}`, values: at(key, i) })));
  const line = { x: points.map(p => p.x), y: points.map(p => p.values[0]), mode: "lines", line: { color: css("--soft"), width: 1 },
    hoverinfo: "skip", showlegend: false };
  const marks = [["layer output", "circle"], ["ATTN write", "triangle-up"], ["FFN write", "square"]].map(([name, symbol], kind) => {
    const own = points.filter(p => p.kind === kind);
    return { x: own.map(p => p.x), y: own.map(p => p.values[0]), name, mode: "markers", marker: { color: colours[kind], size: 6, symbol },
      error_y: { type: "data", symmetric: false, thickness: 1, width: 0, array: own.map(p => p.values[2] - p.values[0]),
        arrayminus: own.map(p => p.values[0] - p.values[1]) }, text: own.map(p => p.name), customdata: own.map(p => p.values),
      hovertemplate: "%{text}: %{y:.4f}  [%{customdata[1]:.4f}, %{customdata[2]:.4f}]<extra></extra>" };
  });
  Plotly.react("flow", [line, ...marks], layout("entropy (nats)", { hovermode: "closest" }), config);
}
function drawSimilarity() {
  const kind = $("pairs").value, z = modelOf($("simmodel").value)[kind], axis = z.map((_, i) => i + 1);
  const look = kind === "kl"
    ? { z: z.map(row => row.map(x => Math.log10(1 + x))), customdata: z, colorscale: "Viridis",
        colorbar: { tickvals: [0, 1, 2, 3, 4].map(e => Math.log10(1 + 10 ** e)), ticktext: ["1", "10", "100", "1000", "10000"] },
        hovertemplate: "from layer %{y} to %{x}: %{customdata:.3f} nats<extra></extra>" }
    : { z, zmin: -1, zmax: 1, colorscale: [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]],
        hovertemplate: "layers %{x} and %{y}: %{z:.3f}<extra></extra>" };
  Plotly.react("similarity", [{ type: "heatmap", x: axis, y: axis, ...look }], layout("layer", { hovermode: "closest" }), config);
}
function fillAnswers() {
  const views = data.views[$("viewmodel").value];
  $("answer").replaceChildren(...views.map((v, i) => new Option((i + 1) + ": " + v.tokens.slice(0, 12).join(""), i)));
  drawCells();
}
function drawCells() {
  const view = data.views[$("viewmodel").value][$("answer").value], kind = $("shade").value;
  $("prompt").textContent = view.prompt;
  drawCells.scale = view.entropy.reduce((a, row) => row.reduce((b, x) => Math.max(b, x), a), 1e-6);
  const head = document.createElement("tr");
  head.append(document.createElement("th"));
  view.tokens.forEach(t => { const th = document.createElement("th"); th.scope = "col"; th.textContent = t; head.append(th); });
  const thead = document.createElement("thead"); thead.append(head);
  const body = document.createElement("tbody");
  for (let layer = view.entropy.length - 1; layer >= 0; layer--) {
    const tr = document.createElement("tr"), th = document.createElement("th");
    th.scope = "row"; th.textContent = layer + 1; tr.append(th);
    view.tokens.forEach((_, token) => {
      const td = document.createElement("td"), [share, text] = cellOf(view, layer, token, kind);
      td.textContent = text; td.dataset.layer = layer; td.dataset.token = token; td.tabIndex = -1;
      td.style.background = `color-mix(in srgb, ${kind === "entropy" ? "#f59e0b" : "#60a5fa"} ${Math.round(100 * share)}%, #eef1f5)`;
      tr.append(td);
    });
    body.append(tr);
  }
  $("cells").replaceChildren(thead, body);
  body.querySelector("td").tabIndex = 0;
  $("cell").textContent = "No cell chosen.";
}
function cellOf(view, layer, token, kind) {
  if (kind === "entropy") return [view.entropy[layer][token] / drawCells.scale, view.entropy[layer][token].toFixed(2)];
  if (kind === "chosen") return [view.chosen[layer][token], view.chosen[layer][token].toFixed(2)];
  const [text, p] = view.top[layer][token][0];
  return [p, text];
}
function choose(td, focus) {
  $("cells").querySelectorAll("[aria-selected]").forEach(c => { c.removeAttribute("aria-selected"); c.tabIndex = -1; });
  td.setAttribute("aria-selected", "true"); td.tabIndex = 0;
  if (focus) td.focus();
  const view = data.views[$("viewmodel").value][$("answer").value], layer = +td.dataset.layer, token = +td.dataset.token;
  const title = document.createElement("p");
  title.textContent = `layer ${layer + 1}, token ${token + 1} (${JSON.stringify(view.tokens[token])}): entropy ` +
    `${view.entropy[layer][token].toFixed(3)} nats, probability of the generated token ${view.chosen[layer][token].toFixed(4)}`;
  const bars = view.top[layer][token].map(([text, p]) => {
    const row = document.createElement("div"), code = document.createElement("code"), box = document.createElement("span"),
      bar = document.createElement("b"), value = document.createElement("span");
    row.className = "bar"; code.textContent = text; bar.style.width = 100 * p + "%"; value.textContent = p.toFixed(4);
    box.append(bar); row.append(code, box, value);
    return row;
  });
  $("cell").replaceChildren(title, ...bars);
}
$("cells").addEventListener("click", e => { const td = e.target.closest("td"); if (td) choose(td, true); });
$("cells").addEventListener("keydown", e => {
  const td = e.target.closest("td"); if (!td) return;
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[e.key];
  if (!step && e.key !== "Enter" && e.key !== " ") return;
  e.preventDefault();
  const [up, right] = step || [0, 0];
  const next = $("cells").querySelector(`td[data-layer="${+td.dataset.layer + up}"][data-token="${+td.dataset.token + right}"]`);
  if (next) choose(next, true);
});
function drawAll() { drawCurve(); drawFlow(); drawSimilarity(); }
$("measure").addEventListener("change", drawCurve);
$("flowmodel").addEventListener("change", drawFlow);
$("simmodel").addEventListener("change", drawSimilarity);
$("viewmodel").addEventListener("change", fillAnswers);
$("answer").addEventListener("change", drawCells);
$("shade").addEventListener("change", drawCells);
$("download").addEventListener("click", () => download("layers.csv", data.csv, "text/csv"));
followTheme(drawAll);
fillAnswers();
