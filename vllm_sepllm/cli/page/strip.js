// Pages as small cells, and how many are held at each position as lines.

const MAX_CELLS = 2000; // of a strip; with more pages a cell stands for several
const CHART_POINTS = 600;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(document.querySelector("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Pixels of a cell, so that so many fill a few rows.
function cellSize(numPages) {
  const fitting = [16, 12, 9, 6].find((size) => numPages * size * size <= 60000);
  return fitting ?? 4;
}

// One kind of pages: stateOf(page, position) is "future", "held" or "freed".
class Strip {
  constructor(parent, { name, css, numPages, size, stateOf }) {
    Object.assign(this, { name, numPages, stateOf });
    this.perCell = Math.max(1, Math.ceil(numPages / MAX_CELLS));
    const numCells = Math.ceil(numPages / this.perCell);
    this.cells = Array.from({ length: numCells }, () => element("i", { class: "cell" }));
    this.states = new Array(numCells).fill("");
    this.words = element("p");
    const box = element("div", { class: `cells ${css}`, "aria-hidden": "true" }, ...this.cells);
    box.style.setProperty("--cell", `${size}px`);
    parent.append(element("div", { class: "strip" }, this.words, box));
  }

  show(position) {
    const count = { future: 0, held: 0, freed: 0 };
    for (let page = 0; page < this.numPages; page += this.perCell) {
      const found = new Set();
      const stop = Math.min(this.numPages, page + this.perCell);
      for (let each = page; each < stop; each++) {
        const state = this.stateOf(each, position);
        count[state]++;
        found.add(state);
      }
      this.#set(page / this.perCell, ["held", "freed", "future"].find((s) => found.has(s)));
    }
    const cell = this.perCell > 1 ? ` (a cell is ${this.perCell} pages)` : "";
    const freed = count.freed ? `, ${number(count.freed)} freed` : "";
    this.words.textContent = `${this.name}: ${number(count.held)} held${freed}${cell}`;
  }

  #set(cell, state) {
    if (this.states[cell] === state) return;
    this.states[cell] = state;
    this.cells[cell].className = `cell ${state}`;
  }
}

// Lines of all rules over the positions; onPick gets the position that was clicked.
class Chart {
  constructor(svg, found, onPick) {
    const all = Object.values(found);
    this.length = all[0].length;
    const step = Math.max(1, Math.ceil(this.length / CHART_POINTS));
    let most = 1;
    const lines = Object.entries(found).map(([name, rule]) => {
      const points = [];
      for (let p = 0; p < this.length; p += step) points.push([p, rule.numHeld(p)]);
      points.push([this.length - 1, rule.numHeld(this.length - 1)]);
      most = Math.max(most, ...points.map(([, held]) => held));
      return [name, points];
    });
    for (const [name, points] of lines.reverse()) {
      const path = points.map(([p, held]) => `${this.#x(p)} ${102 - (100 * held) / most}`);
      svg.append(drawn("path", { class: `line ${name}`, d: `M${path.join("L")}` }));
    }
    this.mark = drawn("line", { y1: 0, y2: 104 });
    svg.append(this.mark);
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      onPick(Math.round(((event.clientX - box.left) / box.width) * (this.length - 1)));
    });
  }

  #x(p) {
    return (1000 * p) / Math.max(1, this.length - 1);
  }

  show(position) {
    this.mark.setAttribute("x1", this.#x(position));
    this.mark.setAttribute("x2", this.#x(position));
  }
}
