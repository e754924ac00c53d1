const colours = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#92400e", "#65a30d"];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
const plain = name => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // Plotly reads some HTML: links, too
const hovered = name => plain(name).replace(/%/g, "&#37;");

function layout(title, more) {
  return Object.assign({
    paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), font: { color: css("--ink"), size: 12 },
    margin: { l: 56, r: 14, t: 30, b: 44 }, hovermode: "x unified", hoverlabel: { bgcolor: css("--panel") },
    xaxis: { title: { text: "layer" }, gridcolor: css("--line"), zeroline: false },
    yaxis: { title: { text: title }, gridcolor: css("--line"), zerolinecolor: css("--soft") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  }, more || {});
}
function interval(x, low, high, colour) {
  return { x: x.concat(x.toReversed()), y: high.concat(low.toReversed()), fill: "toself", fillcolor: colour + "2e", line: { width: 0 },
    mode: "lines", hoverinfo: "skip", showlegend: false, type: "scatter" };
}
function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type })); link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
