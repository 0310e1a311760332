// The page itself: where the slider is, which method is looked at, and which token. Tokens are
// coloured first, then come words and tables, then what moves them.

const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const found = rules(data);
const tokens = Array.from(document.querySelectorAll("#text span"));
const last = tokens.length - 1;
const TITLES = { served: data.title, full: "Full attention", streaming: "StreamingLLM" };
const PLAY_SECONDS = 20; // for a whole text
const AHEAD = "not there yet";
const LABELS = { window: "window", beyond: "beyond the bound", dropped: "dropped", future: AHEAD };
const WINDOW = "the token at this position and those just before it";
const QUIET = 700; // milliseconds without a change, then a screen reader is told

const now = { method: "served", position: last, looked: null };
const shown = new Array(tokens.length).fill(""); // class names as set
const labels = new Array(tokens.length).fill(""); // what each is counted as
const counts = new Map(); // tokens of each label

// How a token looks, as class names, and under which label of the legend it is counted.
function lookOf(rule, k, p) {
  const state = rule.state(k, p);
  const kind = data.kinds[rule.kept[k]];
  if (state === "kept") return [kind.css, kind.label];
  if (state !== "window" && state !== "query") return [state, LABELS[state]];
  const query = state === "query" ? " query" : "";
  return [`window${query}${kind ? " also" : ""}`, LABELS.window];
}

function add(label, change) {
  counts.set(label, (counts.get(label) ?? 0) + change);
}

function paint(start, stop) {
  const rule = found[now.method];
  for (let k = Math.max(0, start); k < Math.min(stop, tokens.length); k++) {
    const [look, label] = lookOf(rule, k, now.position);
    if (look === shown[k] && label === labels[k]) continue;
    if (labels[k]) add(labels[k], -1);
    add(label, 1);
    shown[k] = look;
    labels[k] = label;
    tokens[k].className = k === now.looked ? `${look} looked` : look;
  }
}

// Between two positions only tokens change that a border has passed: the query's, the window's
// first token and the first entry within the bound.
function repaint(from, to) {
  const rule = found[now.method];
  const borders = [(p) => p, (p) => rule.windowStart(p), (p) => rule.firstSeen(p)];
  for (const border of borders) {
    const ends = [border(from), border(to)];
    paint(Math.min(...ends), Math.max(...ends) + 1);
  }
}

function describe(k) {
  const rule = found[now.method];
  const text = element("b", { dir: "auto" }, tokens[k].textContent.replaceAll("\n", ""));
  const about = `” at position ${number(k)} (id ${data.ids[k]}): `;
  by("details").replaceChildren("“", text, about, `${history(rule, k, now.position).join("; ")}.`);
  return by("details").textContent;
}

function kvBytes(name, p) {
  const each = data.bytesPerPage;
  const all = found.full.numHeld(p) * (name === "full" ? each.kept + each.dense : each.dense);
  return all + (name === "full" ? 0 : found[name].numHeld(p) * each.kept);
}

// What is seen and held, of what full attention sees and holds: rows of a name, a number, a rest.
function summary() {
  const p = now.position;
  const [rule, full] = [found[now.method], found.full];
  const [seen, held, all] = [rule.numSeen(p), rule.numHeld(p), full.numHeld(p)];
  const rows = [
    ["sees", number(seen), `of ${counted(p + 1, "token")}, ${share(seen, p + 1)}`],
    ["holds", number(held), `of ${counted(all, "page")}, ${share(held, all)}`],
  ];
  if (data.bytesPerPage) {
    rows.push(["KV cache", bytes(kvBytes(now.method, p)), `of ${bytes(kvBytes("full", p))}`]);
  }
  if (data.cachePositions && now.method === "served") {
    rows.push(["position in the cache", number(seen - 1), ""]);
  }
  return rows;
}

let telling = 0;
function tell(words) {
  clearTimeout(telling);
  telling = setTimeout(() => { by("live").textContent = words(); }, QUIET);
}

const legend = [
  ...data.kinds,
  { css: "window", label: LABELS.window, meaning: WINDOW },
  { css: "beyond", label: LABELS.beyond, meaning: "kept, but newer ones have taken its place" },
  { css: "dropped", label: LABELS.dropped, meaning: "not seen any more, freed with its page" },
  { css: "future", label: AHEAD, meaning: "comes after this position" },
].filter((each) => each.css !== "beyond" || data.bound !== null);

function makeLegend() {
  for (const each of legend) {
    const sample = () => element("span", { class: each.css }, each.label);
    each.row = element("tr", {}, element("th", { scope: "row" }, sample()),
      element("td", {}, each.meaning));
    by("legend").tBodies[0].append(each.row);
    each.count = element("b");
    each.item = element("li", {}, sample(), " ", each.count);
    by("counts").append(each.item);
  }
  const sample = element("span", { class: "window also" }, "underlined");
  by("legend").tBodies[0].append(element("tr", {}, element("th", { scope: "row" }, sample),
    element("td", {}, "in the window, and kept when that has passed")));
}

function showLegend() {
  for (const each of legend) {
    const count = counts.get(each.label) ?? 0;
    each.count.textContent = number(count);
    const isPossible = now.method === "served" || count > 0 || each.label === AHEAD;
    each.item.hidden = each.row.hidden = !isPossible;
  }
  const isFull = now.method === "full";
  const { item, row } = legend.find((each) => each.css === "window");
  for (const shown of [item, row]) {
    shown.querySelector("span").textContent = isFull ? "seen" : "window";
  }
  by("legend").tBodies[0].lastChild.hidden = isFull;
  row.lastChild.textContent = isFull ? "the token at this position and all before it" : WINDOW;
}

const compared = Object.keys(found).map((name) => {
  const cells = ["sees", "pages", "bytes"].map((css) => element("td", { class: `number ${css}` }));
  const sample = drawn("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
  sample.append(drawn("path", { class: `line ${name}`, d: "M0 5L26 5" }));
  const row = element("tr", { "data-method": name },
    element("th", { scope: "row" }, sample, TITLES[name]), ...cells);
  by("compare").tBodies[0].append(row);
  return { name, row, cells };
});

function showComparison() {
  for (const { name, row, cells } of compared) {
    const rule = found[name];
    cells[0].textContent = number(rule.numSeen(now.position));
    cells[1].textContent = number(rule.numHeld(now.position));
    if (data.bytesPerPage) cells[2].textContent = bytes(kvBytes(name, now.position));
    row.className = name === now.method ? "chosen-method" : "";
  }
}

let strips = [];
function makeStrips() {
  const rule = found[now.method];
  const size = cellSize(rule.numWindowPages);
  const window = { name: rule.window === Infinity ? "All tokens" : "Window", css: "of-window",
    numPages: rule.numWindowPages, size, stateOf: (page, p) => rule.windowPageState(page, p) };
  const stream = { name: "Kept stream", css: "stream",
    numPages: rule.numStreamPages, size, stateOf: (page, p) => rule.streamPageState(page, p) };
  by("strips").replaceChildren();
  strips = [window, stream].filter((each) => each.numPages)
    .map((each) => new Strip(by("strips"), each));
}

function showAll() {
  const p = now.position;
  by("slider").value = p;
  by("slider").setAttribute("aria-valuetext", `${p}, ${tokens[p].textContent.trim()}`);
  if (document.activeElement !== by("position")) by("position").value = p;
  const rows = summary();
  by("summary").replaceChildren(...rows.map(([name, value, rest]) => element("div", {},
    element("dt", {}, name), element("dd", {}, element("b", {}, value), ` ${rest}`))));
  const said = rows.map((row) => row.join(" ")).join("; ");
  const words = `${TITLES[now.method]} at position ${number(p)}: ${said}`;
  showLegend();
  showComparison();
  strips.forEach((strip) => strip.show(p));
  chart.show(p);
  tell(() => words);
}

function goTo(position) {
  const from = now.position;
  now.position = Math.min(last, Math.max(0, position));
  repaint(from, now.position);
  look(now.position);
  showAll();
  reveal(now.position);
}

function look(k) {
  const before = now.looked;
  now.looked = k;
  if (before !== null) tokens[before].className = shown[before];
  tokens[k].className = `${shown[k]} looked`;
  if (document.activeElement !== by("look")) by("look").value = k;
  return describe(k);
}

// Scroll the text, and nothing else, until a token is in sight. Parts out of sight have an estimated
// height until they are drawn, hence more than one try.
function reveal(k, tries = 3) {
  const box = by("text").getBoundingClientRect();
  const at = tokens[k].getBoundingClientRect();
  if (at.top >= box.top && at.bottom <= box.bottom) return;
  by("text").scrollTop += at.top - box.top - box.height / 2;
  if (tries) requestAnimationFrame(() => reveal(k, tries - 1));
}

function choose(method) {
  now.method = method;
  paint(0, tokens.length);
  makeStrips();
  describe(now.looked ?? now.position);
  showAll();
}

// The newest wish of a frame wins, however many events there are.
let wanted = null;
function ask(position) {
  if (wanted === null) requestAnimationFrame(() => { goTo(wanted); wanted = null; });
  wanted = position;
}

// A number that somebody is typing may be empty or too large.
function typed(field, act) {
  field.addEventListener("input", () => {
    const value = field.valueAsNumber;
    if (Number.isInteger(value) && value >= 0 && value <= last) act(value);
  });
  field.addEventListener("change", () => {
    field.value = field === by("look") ? now.looked : now.position;
  });
}

let playing = null;
function play() {
  if (playing !== null) {
    cancelAnimationFrame(playing);
    playing = null;
  } else {
    const start = now.position === last ? 0 : now.position;
    const begun = performance.now();
    const speed = Math.max(5, tokens.length / PLAY_SECONDS) / 1000;
    const step = (time) => {
      goTo(start + Math.floor(Math.max(0, time - begun) * speed));
      if (now.position === last) play(); else playing = requestAnimationFrame(step);
    };
    playing = requestAnimationFrame(step);
  }
  by("play").textContent = playing === null ? "Play" : "Pause";
}

function readWithKeys(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  if (event.key === "Enter") goTo(now.looked);
  else if (!(event.key in steps)) return;
  else {
    const words = look(Math.min(last, Math.max(0, now.looked + steps[event.key])));
    reveal(now.looked);
    tell(() => words);
  }
  event.preventDefault();
}

function makeTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  let next = dark ? "light" : "dark";
  const say = () => {
    by("theme").textContent = next === "dark" ? "Dark" : "Light";
    by("theme").setAttribute("aria-label", `Switch to ${next} colours`);
  };
  by("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = next;
    next = next === "dark" ? "light" : "dark";
    say();
  });
  say();
}

function listen() {
  by("slider").addEventListener("input", () => ask(by("slider").valueAsNumber));
  typed(by("position"), ask);
  typed(by("look"), (k) => { const words = look(k); reveal(k); tell(() => words); });
  by("play").addEventListener("click", play);
  by("play").hidden = matchMedia("(prefers-reduced-motion: reduce)").matches;
  by("methods").addEventListener("change", (event) => choose(event.target.value));
  by("text").addEventListener("keydown", readWithKeys);
  const at = (event) => event.target.closest?.("#text span")?.place;
  by("text").addEventListener("click", (event) => {
    if (at(event) !== undefined && getSelection().isCollapsed) goTo(at(event));
  });
  by("text").addEventListener("mouseover", (event) => {
    if (at(event) !== undefined && document.activeElement !== by("look")) describe(at(event));
  });
  by("text").addEventListener("mouseleave", () => describe(now.looked));
}

tokens.forEach((token, k) => { token.place = k; });
for (const name of Object.keys(found)) {
  const button = element("input", { type: "radio", name: "method", value: name });
  button.checked = name === now.method;
  by("methods").append(element("label", {}, button, TITLES[name]));
}
for (const field of ["slider", "position", "look"]) by(field).max = last;
by("unit").textContent = `A page holds ${counted(data.blockSize, "token")}` + (data.bytesPerPage ?
  `; ${bytes(data.bytesPerPage.kept + data.bytesPerPage.dense)} in all layers, in the model’s dtype.`
  : ". The model’s folder has no config.json that says how many bytes that is.");
document.body.classList.toggle("no-bytes", !data.bytesPerPage);
const chart = new Chart(by("chart"), found, ask);
makeTheme();
makeLegend();
listen();
choose("served");
look(now.position);
