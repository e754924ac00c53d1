const ROW = 58;                       // height of a problem in the list, in pixels
const LONG = 2000, HEAD = 700, TAIL = 500;  // characters: of a text that is folded, and what is seen of it then
const number = n => n.toLocaleString("en");
const nameOf = problem => `${problem.benchmark} #${problem.problem}`;
const joined = text => typeof text === "string" ? text : text.head + "\n" + text.tail;  // nothing found spans the gap

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}
const problems = data.problems.map(problem => {
  const answers = problem.answers.map(([sample, verdict, value, tokens, truncated, text, strict, reason, group]) =>
    ({ sample, verdict, value, tokens, truncated, text, strict, reason, group }));
  const correct = answers.filter(answer => answer.verdict === "correct").length;
  const solved = correct === answers.length ? "always" : correct ? "sometimes" : "never";
  return { ...problem, answers, correct, solved };
});
const benchmarks = [...new Set(problems.map(problem => problem.benchmark))];
let shown = [];          // what passes the filters: problems, each with those of its answers that do
let at = -1;             // which of them is open
let needle = null;       // what is searched for
let unfiltered = false;  // whether the open problem shows its other answers too

// -- filters

function pattern(text) {
  return text && new RegExp("(" + text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&") + ")", "iu");
}
function filter() {
  const open = shown[at] && shown[at].problem;
  const [benchmark, verdict, cut, solved] = ["benchmark", "verdict", "cut", "solved"].map(id => $(id).value);
  needle = pattern($("search").value.trim());
  shown = [];
  for (const problem of problems) {
    if (benchmark && problem.benchmark !== benchmark || solved && problem.solved !== solved) continue;
    const asked = !needle || needle.test(joined(problem.question));
    const answers = problem.answers.filter(answer => (!verdict || answer.verdict === verdict)
      && (!cut || answer.truncated === (cut === "yes")) && (asked || needle.test(joined(answer.text))));
    if (answers.length) shown.push({ problem, answers });
  }
  const count = shown.reduce((sum, { answers }) => sum + answers.length, 0);
  $("count").textContent = shown.length
    ? `${number(shown.length)} of ${number(problems.length)} problems, ${number(count)} answers` : "No answer passes these filters.";
  $("rows").style.height = shown.length * ROW + "px";
  choose(Math.max(0, shown.findIndex(({ problem }) => problem === open)));
}
function fillFilters() {
  const counts = {};
  problems.forEach(p => p.answers.forEach(({ verdict }) => { counts[verdict] = (counts[verdict] || 0) + 1; }));
  const verdicts = Object.keys(data.names).filter(verdict => counts[verdict]);
  $("benchmark").replaceChildren(new Option("all", ""), ...benchmarks.map(label => new Option(label, label)));
  $("verdict").replaceChildren(new Option("all", ""),
    ...verdicts.map(verdict => new Option(`${data.names[verdict]} (${number(counts[verdict])})`, verdict)));
  $("key").replaceChildren(...verdicts.map(verdict => element("span", "", element("i", "mark " + verdict), data.names[verdict])));
}

// -- the list: only the rows in sight are in the document

function drawList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const rows = shown.slice(first, first + Math.ceil(list.clientHeight / ROW) + 10);
  $("rows").replaceChildren(...rows.map((row, i) => listRow(row, first + i)));
}
function listRow({ problem, answers }, index) {
  const share = `${problem.correct}/${problem.answers.length}`, passed = new Set(answers);
  const strip = element("div", "strip", ...problem.answers.map(answer =>
    element("div", `mark ${answer.verdict}${passed.has(answer) ? "" : " other"}`)));
  const row = element("div", "row", element("b", "", benchmarks.length > 1 ? nameOf(problem) : "#" + problem.problem),
    element("span", "", joined(problem.question).slice(0, 200)), element("i", "", share), strip);
  row.id = "row" + index; row.dataset.index = index;
  row.style.top = index * ROW + "px"; row.style.height = ROW + "px";
  for (const [name, value] of Object.entries({ role: "option", "aria-selected": index === at, "aria-setsize": shown.length,
    "aria-posinset": index + 1, "aria-label": `${nameOf(problem)}, ${share} correct` })) row.setAttribute(name, value);
  return row;
}
function choose(index) {
  at = Math.max(0, Math.min(index, shown.length - 1));
  unfiltered = false;
  const list = $("list"), top = at * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawList();
  drawProblem();
  list.setAttribute("aria-activedescendant", shown.length ? "row" + at : "");
}

// -- the open problem

function drawProblem() {
  const chosen = shown[at];
  if (!chosen) { $("problem").replaceChildren(); return; }
  const { problem, answers } = chosen, rest = problem.answers.length - answers.length;
  const title = element("h2", "", `${nameOf(problem)}: ${problem.correct} of ${problem.answers.length} correct`);
  title.id = "title";
  const seen = unfiltered ? problem.answers : answers;
  const list = element("div", "answers", ...seen.map(drawAnswer));
  if (rest) {
    const others = element("button", "others",
      unfiltered ? "show only what passes the filters" : `show the other ${number(rest)} answers`);
    others.addEventListener("click", () => {
      unfiltered = !unfiltered;
      drawProblem();
      $("problem").querySelector(".others").focus();
    });
    list.append(others);
  }
  $("problem").replaceChildren(
    element("div", "title", title, stepButton("← previous", -1), stepButton("next →", 1)),
    element("div", "name", "question"), element("div", "question", foldable(problem.question)),
    element("div", "name", "gold answer"), element("div", "gold", ...pieces(problem.gold)),
    element("div", "name", "what the answers come to"), drawValues(problem),
    element("div", "name", `answers${rest && !unfiltered ? `, ${answers.length} of ${problem.answers.length}` : ""}`), list);
}
function stepButton(name, step) {
  const button = element("button", "", name);
  button.disabled = !shown[at + step];
  button.addEventListener("click", () => {
    move(at + step);
    const [back, on] = $("problem").querySelectorAll(".title button");
    (step > 0 && !on.disabled || back.disabled ? on : back).focus();
  });
  return button;
}
function drawValues(problem) {
  const groups = new Map();
  for (const { value, verdict, group } of problem.answers) {  // equal answers are one group, however they are written
    const name = value === null ? data.names[verdict] : joined(value), key = value === null ? name : `${verdict} ${group}`;
    const counted = groups.get(key) || { name, verdict, count: 0 };
    counted.count++; groups.set(key, counted);
  }
  const sorted = [...groups.values()].toSorted((a, b) => b.count - a.count);
  const chips = sorted.slice(0, 8).map(({ name, verdict, count }) =>
    element("span", "chip " + verdict, element("em", "", count + " × "), name));
  if (sorted.length > 8) chips.push(element("span", "name", `and ${sorted.length - 8} more`));
  return element("div", "chips", ...chips);
}
function drawAnswer({ sample, verdict, value, tokens, truncated, text, strict, reason }) {
  const head = element("div", "head", element("span", "badge", data.names[verdict] || verdict),
    element("span", "", "sample " + sample));
  if (value !== null) head.append(element("span", "gold", "= ", ...pieces(value)));
  head.append(element("span", "", number(tokens) + (tokens === 1 ? " token" : " tokens")));
  if (reason !== null && !truncated) head.append(element("span", "limit", reason));
  if (strict !== verdict) head.append(element("span", "limit", "strict: " + (data.names[strict] || strict)));
  if (truncated) head.append(element("span", "limit", "cut at the limit"));
  return element("article", "answer " + verdict, head, foldable(text));
}

// What a model wrote goes into the page as text nodes only, never as HTML.
function foldable(text) {
  const whole = joined(text), box = element("div", ""), pre = element("pre", "text"), button = element("button", "");
  if (whole.length <= LONG) { pre.append(...pieces(text)); return element("div", "", pre); }
  const folded = {  // without half a character at either cut
    head: whole.slice(0, HEAD).replace(/[\ud800-\udbff]$/, ""), tail: whole.slice(-TAIL).replace(/^[\udc00-\udfff]/, ""),
  };
  folded.hidden = whole.length - folded.head.length - folded.tail.length + (text.left_out ? text.left_out - 1 : 0);
  const fold = open => {
    pre.replaceChildren(...pieces(open ? text : folded));
    button.textContent = open ? "show less" : text.left_out ? "show more" : "show all"; button.setAttribute("aria-expanded", open);
  };
  button.addEventListener("click", () => fold(button.getAttribute("aria-expanded") !== "true"));
  fold(Boolean(needle && needle.test(whole)));
  box.append(pre, button);
  return box;
}
function pieces(text) {
  if (typeof text === "string") return marked(text);
  const note = text.left_out ? `${number(text.left_out)} characters left out here; samples.jsonl has them`
    : `${number(text.hidden)} characters folded`;
  return [...marked(text.head), element("span", "gap", note), ...marked(text.tail)];
}
function marked(text) {
  return needle ? text.split(needle).map((part, i) => i % 2 ? element("mark", "", part) : part) : [text];
}

// -- pass@K, on an axis where K doubles

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
function drawCurve(cell) {
  const passed = Object.entries(data.passed[cell.dataset.label]);
  const points = passed.map(([k, share]) => [Math.log2(k), share]);
  const width = 96, height = 26, last = points[points.length - 1][0] || 1;
  const place = ([x, share]) => [4 + (width - 8) * x / last, height - 2 - (height - 4) * share];
  const label = passed.map(([k, share]) => `pass@${k} ${(100 * share).toFixed(1)}`).join(", ");
  const plot = svg("svg", { width, height, role: "img", "aria-label": label }), title = svg("title", {});
  title.textContent = label;
  plot.append(title, svg("line", { x1: 0, x2: width, y1: height - 2, y2: height - 2 }), svg("line", { x1: 0, x2: width, y1: 2, y2: 2 }),
    svg("polyline", { points: points.map(place).join(" ") }),
    ...points.map(place).map(([cx, cy]) => svg("circle", { cx, cy, r: 2 })));
  cell.replaceChildren(plot);
}

// -- controls

function move(index) {
  choose(index);
  const stacked = $("problem").getBoundingClientRect().top > $("list").getBoundingClientRect().top + 60;
  if (stacked || $("problem").getBoundingClientRect().top < 0) $("problem").scrollIntoView();
}
$("list").addEventListener("scroll", () => requestAnimationFrame(drawList));
$("list").addEventListener("click", event => {
  const row = event.target.closest(".row");
  if (row) move(+row.dataset.index);
});
$("list").addEventListener("keydown", event => {
  const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -shown.length, End: shown.length }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(at + step);
});
document.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("input, select, .grid")) return;
  event.preventDefault();
  choose(at + step);
});
let waiting;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
for (const id of ["benchmark", "verdict", "cut", "solved"]) $(id).addEventListener("change", filter);
$("reset").addEventListener("click", () => {
  for (const id of ["benchmark", "verdict", "cut", "solved", "search"]) $(id).value = "";
  filter();
});
addEventListener("resize", drawList);
followTheme(() => {});
document.querySelectorAll(".curve").forEach(drawCurve);
$("prompts").append(...Object.entries(data.prompts).flatMap(([label, prompt]) =>
  [element("h3", "", label), element("div", "prompt", ...pieces(prompt))]));
fillFilters();
filter();
