"use strict";
// What is seen and held while the token at a position is computed: vllm_sepllm/policy.py and
// summarize() of inspection.py once more. tests/e2e/test_inspection_page.py compares the two.
//
// At position p a request has computed the tokens before p, and its step computes p. vLLM gives
// back what p no longer needs before the step takes pages for p, so it holds
//   window pages  [floor(start(p) / B), floor(p / B)]
//   stream pages  [0, ceil(kept(0..p) / B)) without those that no query from p on sees,
// of B tokens each. A page is counted from the step that first needs it to the step that frees it.

class Rule {
  // sinks, window, bound: tokens; Infinity is no limit. kept: of each token, an index into kinds,
  // or -1.
  constructor({ sinks, window, bound, blockSize, kept, kinds }) {
    Object.assign(this, { sinks, window, bound, blockSize, kept, kinds });
    this.length = kept.length;
    this.prefix = new Int32Array(kept.length + 1); // kept tokens below each position
    for (let k = 0; k < kept.length; k++) {
      this.prefix[k + 1] = this.prefix[k] + (kept[k] >= 0);
    }
    this.places = []; // the position of each stream entry
    for (let k = 0; k < kept.length; k++) {
      if (kept[k] >= 0) this.places.push(k);
    }
    this.sinkPages = Math.ceil(sinks / blockSize);
    this.numWindowPages = Math.ceil(kept.length / blockSize);
    this.numStreamPages = Math.ceil(this.places.length / blockSize);
  }

  windowStart(p) {
    return Math.max(0, p - this.window + 1);
  }

  // The first entry beside the sinks that the query at p sees.
  firstEntry(p) {
    const limit = this.prefix[this.windowStart(p)];
    return Math.max(Math.min(limit, this.sinks), limit - this.bound);
  }

  // Tokens below this position have the same state at p as at every later position.
  firstSeen(p) {
    return this.places[this.firstEntry(p)] ?? this.length;
  }

  // "future", "query", "window", "kept", "beyond" (kept, but beyond the bound) or "dropped".
  state(k, p) {
    if (k >= p) return k > p ? "future" : "query";
    if (k >= this.windowStart(p)) return "window";
    if (this.kept[k] < 0) return "dropped";
    const entry = this.prefix[k];
    return entry >= this.sinks && entry < this.firstEntry(p) ? "beyond" : "kept";
  }

  numSeen(p) {
    const start = this.windowStart(p);
    const limit = this.prefix[start];
    const unseen = Math.max(0, this.firstEntry(p) - Math.min(limit, this.sinks));
    return p - start + 1 + limit - unseen;
  }

  // [first, stop) of the window's pages.
  windowPages(p) {
    const size = this.blockSize;
    return [Math.floor(this.windowStart(p) / size), Math.floor(p / size) + 1];
  }

  // [first, stop) of the stream's pages that are given back, and how many there ever were.
  streamPages(p) {
    const size = this.blockSize;
    const left = Math.max(this.sinkPages, Math.floor(this.firstEntry(p) / size));
    return [this.sinkPages, left, Math.ceil(this.prefix[p + 1] / size)];
  }

  numHeld(p) {
    const [first, stop] = this.windowPages(p);
    const [left, leftStop, made] = this.streamPages(p);
    return stop - first + made - (leftStop - left);
  }

  windowPageState(page, p) {
    const [first, stop] = this.windowPages(p);
    return page >= stop ? "future" : page >= first ? "held" : "freed";
  }

  streamPageState(page, p) {
    const [left, leftStop, made] = this.streamPages(p);
    return page >= made ? "future" : page >= left && page < leftStop ? "freed" : "held";
  }

  // Positions at which something happens; they may lie behind the text, or never come.
  leaves(k) {
    return k + this.window;
  }

  windowPageFreed(page) {
    return (page + 1) * this.blockSize + this.window - 1;
  }

  // The first query whose stream has more than so many entries.
  #outgrown(entries) {
    const place = this.places[entries];
    return place === undefined ? Infinity : place + this.window;
  }

  entryUnseen(entry) {
    return entry < this.sinks ? Infinity : this.#outgrown(entry + this.bound);
  }

  streamPageFreed(page) {
    if (page < this.sinkPages) return Infinity;
    return this.#outgrown((page + 1) * this.blockSize + this.bound - 1);
  }
}

// The three methods that the page compares, by the names that its buttons have.
function rules(data) {
  const { sinks, kept } = data;
  const unbounded = { ...data, bound: Infinity };
  const none = new Array(kept.length).fill(-1);
  const found = {
    served: new Rule({ ...data, bound: data.bound ?? Infinity }),
    full: new Rule({ ...unbounded, sinks: 0, window: Infinity, kept: none }),
  };
  if (!data.isStreaming) {
    const first = kept.map((kind, k) => (k < sinks ? kind : -1));
    found.streaming = new Rule({ ...unbounded, kept: first });
  }
  return found;
}
