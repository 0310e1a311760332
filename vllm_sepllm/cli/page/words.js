// Numbers and sentences.

const number = (value) => value.toLocaleString("en-US");
const share = (part, whole) => `${((100 * part) / whole).toFixed(1)}%`;
const counted = (value, one) => `${number(value)} ${one}${value === 1 ? "" : "s"}`;

function bytes(value) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at++) value /= 1024;
  return `${value >= 100 || at === 0 ? Math.round(value) : value.toFixed(1)} ${units[at]}`;
}

// What happened, or will, at a position of the text; nothing if that comes after its end.
function when(at, { rule, p }, done, later) {
  if (at >= rule.length) return "";
  return `${at <= p ? done : later} at position ${number(at)}`;
}

// What happens to token k, seen from position p: one part of a sentence after the other.
function history(rule, k, p) {
  const seen = { rule, p };
  const state = rule.state(k, p);
  if (state === "future") return ["not there yet"];
  const isFull = rule.window === Infinity;
  const now = { query: "the token that looks back", window: isFull ? "seen" : "in the window" };
  const page = Math.floor(k / rule.blockSize);
  const freed = when(rule.windowPageFreed(page), seen, "was freed", "is freed");
  const stays = state in now ? "" : `window page ${number(page)} still held`;
  return [
    now[state],
    when(rule.leaves(k), seen, "left the window", "leaves the window"),
    ...(rule.kept[k] >= 0 ? historyInStream(rule, k, seen) : []),
    freed ? `window page ${number(page)} ${freed}` : stays,
  ].filter(Boolean);
}

function historyInStream(rule, k, seen) {
  const entry = rule.prefix[k];
  const page = Math.floor(entry / rule.blockSize);
  return [
    `kept as ${rule.kinds[rule.kept[k]].label}: entry ${number(entry)} of the stream, on its ` +
      `page ${number(page)}`,
    when(rule.entryUnseen(entry), seen, "fell behind the bound", "falls behind the bound"),
    when(rule.streamPageFreed(page), seen, "that page was freed", "that page is freed"),
  ];
}
