"use strict";
// Text of a model reaches the page as text only (textContent); colours are set on the element's style object, which the policy allows.
const ROW = 26;
const form = document.getElementById("filters"), list = document.getElementById("list"), detail = document.getElementById("detail");
const rows = document.getElementById("rows"), space = document.getElementById("space"), count = document.getElementById("count");
const hover = document.getElementById("hover");
const FIELDS = [
  ["trajectory", "address"], ["prompt", "prompt"], ["group", "group"], ["reward", "reward", 1], ["status", "status"], ["turns", "turns", 1],
  ["tokens", "length", 1], ["sampled", "sampled", 1], ["trained", "trained", 1], ["version", "newest", 1],
];
const GROUP_FIELDS = [
  ["first", "address"], ["prompt", "prompt"], ["group", "group"], ["reward", "reward", 1], ["status", "status"], ["size", "size", 1],
  ["tokens", "length", 1], ["least", "least", 1], ["most", "most", 1], ["std", "std", 1],
];
let index, columns, tables, shown = [], chosen = -1, order = { field: "address", down: false }, opened = 0;
const blocks = new Map();

async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

const short = (x) => (x === null || x === undefined || Number.isNaN(x) ? "" : Number.isInteger(x) ? String(x) : String(+x.toPrecision(4)));
const word = (name, row) => tables[name][columns[name][row]];

function address(row) {
  const source = word("source", row);
  return (source === index.train ? "" : source + "@") + columns.step[row] + ":" + columns.number[row];
}

// ---- what is chosen -------------------------------------------------------------------------------------------------

function range(text) {
  if (!text.trim()) return () => true;
  const parts = text.split("..");
  const low = parts[0].trim() === "" ? -Infinity : Number(parts[0]);
  const high = parts.length === 1 ? low : parts[1].trim() === "" ? Infinity : Number(parts[1]);
  if (parts.length > 2 || Number.isNaN(low) || Number.isNaN(high) || low > high) return null;
  return (x) => x !== null && x >= low && x <= high;
}

function filtered() {
  const f = form.elements, steps = range(f.step.value), rewards = range(f.reward.value);
  f.step.classList.toggle("bad", !steps);
  f.reward.classList.toggle("bad", !rewards);
  if (!steps || !rewards) return shown.filter((x) => typeof x === "number");
  const prompt = f.prompt.value.toLowerCase(), source = f.source.value, status = f.status.value, group = f.group.value.trim();
  const fits = prompt && tables.prompt.map((text) => text.toLowerCase().includes(prompt));
  const found = [];
  for (let row = 0; row < columns.step.length; row++) {
    if (!steps(columns.step[row]) || !rewards(columns.reward[row])) continue;
    if (source && word("source", row) !== source) continue;
    if (status && word("status", row) !== status) continue;
    if (group && word("group", row) !== group) continue;
    if (prompt && !fits[columns.prompt[row]] && word("prompt_id", row) !== f.prompt.value) continue;
    if (f.tokens.checked && columns.block[row] < 0) continue;
    found.push(row);
  }
  return found;
}

const group = (row) => [columns.step[row], columns.source[row], columns.policy[row], columns.group[row]].join(" ");

function grouped(found) { // the groups of what is found, whole
  const groups = new Map(found.map((row) => [group(row), []]));
  for (let row = 0; row < columns.step.length; row++) groups.get(group(row))?.push(row);
  return [...groups.values()].map((members) => {
    const rewards = new Map(members.filter((r) => columns.reward[r] !== null).map((r) => [columns.trajectory[r], columns.reward[r]]));
    const values = [...rewards.values()], mean = values.reduce((a, b) => a + b, 0) / values.length;
    const spread = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
    const statuses = new Map();
    for (const r of members) statuses.set(word("status", r), (statuses.get(word("status", r)) || 0) + 1);
    const has = values.length > 0, low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    return {
      first: members[0], size: new Set(members.map((r) => columns.trajectory[r])).size, reward: has ? mean : null, least: has ? low : null,
      most: has ? high : null, std: has ? spread : null, length: members.reduce((a, r) => a + columns.length[r], 0) / members.length,
      status: [...statuses].map(([name, n]) => n + " " + name).join(", "),
    };
  });
}

function value(item, field) {
  const row = typeof item === "number" ? item : item.first;
  if (typeof item !== "number" && field in item) return item[field];
  if (field === "address") return row;
  return field in tables ? word(field, row) : columns[field][row];
}

function refresh() {
  const found = filtered(), total = columns.step.length;
  shown = form.elements.groups.checked ? grouped(found) : found;
  if (order.field !== "address" || order.down) {
    const sign = order.down ? -1 : 1, keys = new Map(shown.map((item) => [item, value(item, order.field)]));
    shown.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === null || y === null || x === undefined || y === undefined) return (x ?? null) === (y ?? null) ? 0 : (x ?? null) === null ? 1 : -1;
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  const here = columns.block.reduce((n, b) => n + (b >= 0), 0);
  const what = form.elements.groups.checked ? shown.length.toLocaleString() + " groups with " : "";
  count.textContent = what + found.length.toLocaleString() + " of " + total.toLocaleString() + " trajectories; the tokens of " +
    (here === total ? "all" : here.toLocaleString()) + " are in this page";
  space.style.height = shown.length * ROW + "px";
  head();
  draw();
}

// ---- the list: only the rows in sight exist -------------------------------------------------------------------------

const fields = () => (form.elements.groups.checked ? GROUP_FIELDS : FIELDS);

function head() {
  document.getElementById("columns").replaceChildren(...fields().map(([name, field, number]) => {
    const button = make("button", name + (order.field === field && (field !== "address" || order.down) ? (order.down ? " ▾" : " ▴") : ""), number && "number");
    button.type = "button";
    button.onclick = () => { order = { field, down: order.field === field ? !order.down : Boolean(number) }; refresh(); };
    return button;
  }));
}

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 10), last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 20);
  rows.style.top = first * ROW + "px";
  rows.replaceChildren(...shown.slice(first, last).map((item) => {
    const row = typeof item === "number" ? item : item.first, line = make("div", undefined, "row");
    line.classList.toggle("chosen", row === chosen && typeof item === "number");
    line.classList.toggle("bare", columns.block[row] < 0);
    for (const [, field, number] of fields()) {
      const x = field === "address" ? address(row) : value(item, field);
      line.append(make("span", typeof x === "string" ? x : short(x), number && "number"));
    }
    line.onclick = () => (typeof item === "number" ? open(item) : enter(item.first));
    return line;
  }));
}

function enter(row) {
  form.elements.groups.checked = false;
  form.elements.group.value = word("group", row);
  form.elements.step.value = columns.step[row];
  list.scrollTop = 0;
  refresh();
}

// ---- one trajectory -------------------------------------------------------------------------------------------------

async function block(number) {
  if (!blocks.has(number)) {
    const bytes = await unpack("b" + number), size = new DataView(bytes.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
    let at = 4 + size;
    const types = { int32: Int32Array, float32: Float32Array, uint8: Uint8Array };
    const arrays = header.arrays.map(([name, type, length, has]) => {
      const values = new types[type](bytes.buffer, at, length);
      at += Math.ceil(values.byteLength / 4) * 4;
      return { name, values, has };
    });
    if (blocks.size > 50) blocks.delete(blocks.keys().next().value);
    blocks.set(number, { samples: header.samples, arrays });
  }
  return blocks.get(number);
}

async function open(row) {
  const turn = ++opened;
  chosen = row;
  history.replaceState(null, "", "#" + encodeURIComponent(address(row)));
  draw();
  const facts = make("dl");
  const say = (name, text) => { if (text !== "") facts.append(make("dt", name), make("dd", text)); };
  const c = (name) => columns[name][row];
  say("trajectory", address(row));
  say("reward", short(c("reward")) + " " + word("rewards", row));
  say("status", word("status", row) + ", " + c("length") + " tokens: " + c("sampled") + " sampled by version " +
    (c("oldest") === c("newest") ? c("newest") : c("oldest") + " to " + c("newest")) + ", " + c("trained") + " trained");
  say("prompt", word("prompt_id", row));
  if (c("block") < 0) {
    say("text", word("prompt", row));
    detail.replaceChildren(facts, make("p", "Its tokens are not in this page. In the terminal: miles inspect " + index.command + " " + address(row) +
      ", or a page of fewer: --step " + c("step") + " --html FILE", "hint"));
    return;
  }
  const whole = await block(c("block"));
  if (turn !== opened) return; // another was chosen meanwhile
  const position = c("within");
  const sample = whole.samples[position], values = {};
  for (const { name, values: all, has } of whole.arrays) {
    const at = has.indexOf(position);
    if (at < 0) continue;
    const start = has.slice(0, at).reduce((n, s) => n + whole.samples[s].length, 0);
    values[name] = all.subarray(start, start + sample.length);
  }
  say("id", sample.id);
  if (sample.label !== null) say("label", typeof sample.label === "string" ? sample.label : JSON.stringify(sample.label));
  const choice = make("select");
  for (const name of Object.keys(values)) if (name !== "tokens") choice.append(make("option", name));
  choice.value = open.by in values ? open.by : "advantages" in values ? "advantages" : "logprobs";
  const legend = make("p", undefined, "legend"), turns = make("div"), label = make("label", "colour ");
  label.append(choice);
  const paint = () => { open.by = choice.value; legend.textContent = explain(choice.value); show(turns, sample, values, choice.value, word("policy", row)); };
  choice.onchange = paint;
  detail.replaceChildren(facts, label, legend, turns);
  paint();
  detail.scrollTop = 0;
}

function explain(name) {
  const { doc, scale } = index.quantities[name], s = index.scales;
  const colours = {
    flag: "blue: yes", version: "bluer: older, within this trajectory", logprob: "bluer: less likely, full at " + s.least_logprob,
    ratio: "blue above 1, orange below, full at 1 ± " + s.clip, signed: "blue above 0, orange below, full at the largest here",
  };
  return name + ": " + doc + ". " + colours[scale] + ". Italic: not sampled.";
}

function strengths(name, all, trained) {
  if (["ratio", "signed"].includes(index.quantities[name].scale)) all = all.map((x, t) => (trained[t] ? x : NaN)); // only training looks at it
  const scale = index.quantities[name].scale, s = index.scales, cut = (x) => (Number.isFinite(x) ? Math.max(-1, Math.min(1, x)) : 0);
  const finite = Array.from(all).filter(Number.isFinite);
  if (scale === "flag") return Array.from(all);
  if (scale === "logprob") return Array.from(all, (x) => cut(x / s.least_logprob));
  if (scale === "ratio") return Array.from(all, (x) => cut(Math.expm1(x) / s.clip));
  if (scale === "version") {
    const real = finite.filter((x) => x >= 0), high = real.reduce((a, b) => Math.max(a, b), 0), low = real.reduce((a, b) => Math.min(a, b), high);
    return Array.from(all, (x) => (x < 0 ? 0 : 0.25 + (0.75 * (high - x)) / Math.max(1, high - low)));
  }
  const most = finite.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  return Array.from(all, (x) => cut(x / most));
}

function piece(policy, id) {
  const known = index.vocabulary[policy];
  if (!known || !known.texts) return id + " ";
  if (!known.byId) known.byId = new Map(known.ids.map((x, i) => [x, known.texts[i]]));
  return known.byId.get(id);
}

function show(turns, sample, values, by, policy) {
  const strong = strengths(by, values[by], values.loss_mask);
  turns.replaceChildren();
  const lacking = index.vocabulary[policy] && index.vocabulary[policy].lacking;
  if (lacking) turns.append(make("p", lacking, "hint"));
  for (const [role, start, end, kind] of sample.stretches) {
    const turn = make("div", undefined, "turn " + kind), text = make("div", undefined, "tokens");
    turn.append(make("h2", (role || "between turns") + " · tokens " + start + " to " + (end - 1) + (kind === "sampled" ? "" : " · " + kind)), text);
    for (let t = start; t < end; t++) {
      const raw = piece(policy, values.tokens[t]), plain = raw.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cn}]/gu, (x) => (x === "\n" ? "⏎\n" : "⟨" + x.codePointAt(0).toString(16) + "⟩"));
      const token = make("span", plain, plain !== raw && !raw.includes("\n") ? "control" : "");
      if (values.versions[t] < 0) token.classList.add("unsampled");
      if (Math.abs(strong[t]) > 0.04) token.style.background = "rgba(var(--" + (strong[t] > 0 ? "high" : "low") + ")," + (0.6 * Math.abs(strong[t])).toFixed(3) + ")";
      token.dataset.t = t;
      text.append(token);
    }
    turns.append(turn);
  }
  turns.onmouseover = (event) => tell(event, values);
  turns.onmouseout = () => { hover.hidden = true; };
}

function tell(event, values) {
  const t = event.target.dataset && event.target.dataset.t;
  if (t === undefined) return;
  const lines = ["index".padEnd(18) + t, "token id".padEnd(18) + values.tokens[t]];
  for (const name of Object.keys(values)) {
    if (name === "tokens") continue;
    const x = values[name][t], scale = index.quantities[name].scale;
    const said = scale === "flag" ? (x ? "yes" : "no") : Number.isNaN(x) ? "–" : scale === "ratio" ? ratio(x) : short(x);
    lines.push(name.padEnd(18) + said);
  }
  hover.textContent = lines.join("\n");
  hover.hidden = false;
  const box = event.target.getBoundingClientRect();
  hover.style.left = Math.max(4, Math.min(box.left, innerWidth - hover.offsetWidth - 8)) + "px";
  hover.style.top = (box.bottom + hover.offsetHeight + 8 > innerHeight ? box.top - hover.offsetHeight - 6 : box.bottom + 6) + "px";
}

const ratio = (log) => (Math.abs(log) < 1e-3 ? "1 " + (log < 0 ? "− " : "+ ") + Math.abs(Math.expm1(log)).toPrecision(3) : short(Math.exp(log)));

// ---- begin ----------------------------------------------------------------------------------------------------------

async function begin() {
  if (typeof DecompressionStream === "undefined") {
    count.textContent = "This browser cannot unpack the page (no DecompressionStream): use Chrome 80, Firefox 113, Safari 16.4 or newer.";
    return;
  }
  index = JSON.parse(new TextDecoder().decode(await unpack("index")));
  ({ columns, tables } = index);
  for (const name of ["source", "status"]) for (const text of tables[name]) form.elements[name].append(make("option", text));
  form.elements.reward.value = index.rewards; // a reset shows all
  form.oninput = () => { list.scrollTop = 0; refresh(); };
  form.onreset = () => setTimeout(() => { order = { field: "address", down: false }; refresh(); });
  form.onsubmit = (event) => event.preventDefault();
  list.onscroll = draw;
  addEventListener("resize", draw);
  list.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], at = shown.indexOf(chosen) + step;
    if (!step || typeof shown[at] !== "number") return;
    event.preventDefault();
    if (at * ROW < list.scrollTop || (at + 3) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = Math.max(0, at * ROW - list.clientHeight / 2);
    open(shown[at]);
  };
  refresh();
  const asked = decodeURIComponent(location.hash.slice(1));
  for (let row = 0; asked && row < columns.step.length; row++) if (address(row) === asked) {
    list.scrollTop = Math.max(0, row * ROW - list.clientHeight / 2);
    return open(row);
  }
}

begin();
