"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Elements. Texts go in as text nodes only, never as HTML.
function make(tag, attributes = {}, ...children) {
  const namespace = ["svg", "path", "line", "circle", "text", "tspan", "polyline"].includes(tag) ? SVG : null;
  const element = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Numbers and colours.
const signed = (x, digits = 3) => (Math.abs(x) < 0.5 * 10 ** -digits ? (0).toFixed(digits)
  : (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits));
const short = (x) => signed(x).replace("0.", ".").replace(/^\.000$/, "0");
const plain = (x, digits = 4) => (x < 0 ? "\u2212" : "") + Math.abs(x).toFixed(digits);
const percent = (x) => (x >= 0.995 ? "100\u00a0%" : x > 0 && x < 0.005 ? "<1\u00a0%" : `${Math.round(100 * x)}\u00a0%`);
function small(x) {
  if (x === 0) return "0";
  const [mantissa, exponent] = Math.abs(x).toExponential(1).split("e");
  return `${mantissa} × 10${[...exponent.replace("+", "")].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
}
const mix = (name, share) => `color-mix(in oklab, var(--${name}) ${(100 * Math.min(1, share)).toFixed(1)}%, var(--faint))`;
const fill = (x, most) => mix(x < 0 ? "less" : "more", most ? Math.abs(x) / most : 0);
const look = (weight) => mix("look", weight);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const named = (tokens) => tokens.map((token, index) => (tokens.indexOf(token) === tokens.lastIndexOf(token)
  ? token : `${token} (${index + 1})`));

function piece(token) {
  if (/^\[[A-Z]+\]$/.test(token)) return make("span", { class: "special" }, token);
  if (!token.startsWith("##")) return make("span", {}, token);
  return make("span", {}, make("span", { class: "piece" }, "##"), token.slice(2));
}

// One tab stop for many things; arrow keys, Home and End move among them. `width`: how many stand in a row.
function arrows(container, items, width, focused = () => {}) {
  items.forEach((item, index) => item.setAttribute("tabindex", index ? -1 : 0));
  const stop = (index) => items.forEach((item, other) => item.setAttribute("tabindex", other === index ? 0 : -1));
  container.addEventListener("focusin", (event) => {
    const index = items.indexOf(event.target);
    if (index >= 0) { stop(index); focused(index); }
  });
  container.addEventListener("keydown", (event) => {
    const index = items.indexOf(event.target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width, Home: -index, End: items.length - 1 - index };
    if (index < 0 || !(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    items[index + steps[event.key]]?.focus();
  });
  return stop;
}

// A table of coloured numbers: `cell(row, column)` gives its text, fill and spoken label.
function heatTable(host, caption, rows, columns, cell, visited = () => {}) {
  const dense = columns.length > 24 || rows.length > 40;
  const heads = columns.map((name) => make("th", { scope: "col" }, make("span", {}, name)));
  const sides = rows.map((name) => make("th", { scope: "row" }, name));
  const cells = [];
  const body = sides.map((side, row) => make("tr", {}, side, ...columns.map((_, column) => {
    const { text, background } = cell(row, column);
    const made = make("td", { "--fill": background }, text);
    made.addEventListener("pointerenter", () => visit(row, column));
    cells.push(made);
    return made;
  })));
  function visit(row, column) {
    heads.forEach((head, index) => head.classList.toggle("here", index === column));
    sides.forEach((side, index) => side.classList.toggle("here", index === row));
    visited(row, column);
  }
  const table = make("table", { class: `slanted${dense ? " dense" : ""}`, "--columns": columns.length },
    make("caption", { class: "hidden" }, caption),
    make("thead", {}, make("tr", {}, make("td", { class: "none" }), ...heads)), make("tbody", {}, ...body));
  arrows(table, cells, columns.length, (index) => visit(Math.floor(index / columns.length), index % columns.length));
  host.replaceChildren(table);
}

// The strongest of some labelled values, as bars.
function bars(host, values) {
  const strongest = [...values].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 10);
  host.append(...strongest.map(({ label, value }) => make("li", {}, make("span", {}, label), make("span", {}, signed(value)),
    make("i", { "aria-hidden": "true", "--fill": `var(--${value < 0 ? "less" : "more"})`, "--share": Math.abs(value / strongest[0].value) || 0 }))));
}

function legend(host, most) {
  host.replaceChildren(signed(-most, 2), make("i", { "aria-hidden": "true" }), signed(most, 2));
}

// The score and the sentences; a token chosen shows what it shares with each of the other sentence's.
const names = data.sentences.map(({ tokens }) => named(tokens));
$("model").textContent = data.model;
$("reference").textContent = data.pair.reference;
$("point").textContent = data.pair.point;
$("score").textContent = plain(data.score);
$("measure").textContent = data.measure;
$("made").textContent = `Made by minilm ${data.version}; nothing is loaded from anywhere.`;

const between = (row, column) => data.pair.values[row][column];
const turned = data.sentences[1].tokens.map((_, column) => data.pair.values.map((row) => row[column]));
const shared = [data.pair.values, turned]; // of each sentence: a row for each of its tokens
const whole = shared.map((rows) => rows.map(sum));
const chips = data.sentences.map(({ text, tokens }, sentence) => {
  const made = tokens.map((token, index) => make("button", {
    class: "token", type: "button", "aria-pressed": "false",
    onclick: () => choose(chosen && chosen[0] === sentence && chosen[1] === index ? null : [sentence, index]),
    onpointerenter: () => preview([sentence, index]), onpointerleave: () => preview(chosen),
    onfocus: () => preview([sentence, index]), onblur: () => preview(chosen),
  }, piece(token), make("small")));
  const group = make("div", { class: "sentence", role: "group", "aria-label": `Sentence ${sentence + 1}: ${text}` }, ...made);
  arrows(group, made, made.length);
  $("sentences").append(group);
  return made;
});
let chosen = null;
function choose(token) {
  chosen = token;
  chips.forEach((row, sentence) => row.forEach((chip, index) => chip.setAttribute("aria-pressed",
    String(token !== null && token[0] === sentence && token[1] === index))));
  preview(token);
}
function preview(token) {
  const values = whole.map((own, sentence) => (token && sentence !== token[0] ? shared[token[0]][token[1]] : own));
  const most = values.map((_, sentence) => largest(token && sentence !== token[0] ? data.pair.values.flat() : whole.flat()));
  chips.forEach((row, sentence) => row.forEach((chip, index) => {
    const value = values[sentence][index];
    chip.style.setProperty("--fill", fill(value, most[sentence]));
    chip.lastChild.textContent = short(value);
  }));
  if (!token) {
    $("pair-readout").textContent = "Under each token: what it adds to the score, over all tokens of the other sentence. "
      + "Choose one to see with which.";
    return;
  }
  const [sentence, index] = token, partners = shared[sentence][index];
  const order = partners.map((value, other) => [value, names[1 - sentence][other]]).sort((a, b) => b[0] - a[0]);
  $("pair-readout").replaceChildren(make("b", {}, names[sentence][index]), " adds ", make("b", {}, signed(whole[sentence][index])),
    " to ", plain(data.score, 3), ", most with ", make("b", {}, order[0][1]), ` (${signed(order[0][0])})`,
    ...(order.at(-1)[0] < 0 ? [", least with ", make("b", {}, order.at(-1)[1]), ` (${signed(order.at(-1)[0])})`] : []), ".");
}
preview(null);

const mostBetween = largest(data.pair.values.flat());
heatTable($("pair-table"), "What each token of the first sentence (rows) and of the second (columns) add to the score together",
  names[0], names[1], (row, column) => ({ text: short(between(row, column)), background: fill(between(row, column), mostBetween) }),
  (row, column) => {
    $("pair-here").replaceChildren(make("b", {}, names[0][row]), " × ", make("b", {}, names[1][column]), ` ${signed(between(row, column), 4)}`);
  });
bars($("pair-bars"), names[0].flatMap((own, row) => names[1].map((other, column) => (
  { label: `${own} × ${other}`, value: between(row, column) }))));
legend($("pair-legend"), mostBetween);
$("pair-facts").textContent = `The cells add up to the score, ${plain(data.pair.sum)}, to within ${small(data.pair.residual)}.`;

// Components: heads and feed-forwards by layer; a head's number leads to its attention.
const [layerCount, headCount] = data.attention.shape;
const layers = [...Array(layerCount).keys()], heads = [...Array(headCount).keys()];
const columns = [...heads.map((head) => `attention.heads.${head}`), "feed_forward"];
const kinds = { "feed_forward": "feed-forward", "attention.output.bias": "attention bias", "attention_norm.bias": "attention norm shift",
  "feed_forward.output.bias": "feed-forward bias", "feed_forward_norm.bias": "feed-forward norm shift",
  "embeddings.word": "word", "embeddings.position": "position", "embeddings.token_type": "token type", "embeddings.norm.bias": "norm shift" };
const parts = Object.entries(data.components.values).map(([name, value]) => {
  const [, layer, rest] = /^layers\.(\d+)\.(.+)$/.exec(name) ?? [null, null, name];
  const head = /^attention\.heads\.(\d+)$/.exec(rest), kind = head ? `head ${head[1]}` : kinds[rest] ?? rest;
  return { name, value, layer: layer && Number(layer), rest, kind, label: layer ? `layer ${layer}, ${kind}` : `embeddings, ${kind}` };
});
const valueOf = (layer, rest) => parts.find((part) => part.layer === layer && part.rest === rest)?.value ?? 0;
const mostOfParts = largest(parts.map((part) => part.value));
const number = (value, label, child) => make("td", { "--fill": fill(value, mostOfParts), title: `${label}: ${signed(value, 4)}` }, child ?? short(value));
const inputs = parts.filter((part) => part.layer === null);
const links = [];
function componentRow(layer) {
  const cells = columns.map((rest, head) => {
    const value = valueOf(layer, rest), label = `layer ${layer}, ${head < headCount ? `head ${head}` : "feed-forward"}`;
    if (head >= headCount) return number(value, label);
    links.push(make("button", { type: "button", "aria-label": `${label}: ${signed(value)}; show where it looks`,
      onclick: () => { showHead(layer, head); $("head-heading").scrollIntoView({ block: "center" }); } }, short(value)));
    return number(value, label, links.at(-1));
  });
  const all = sum(parts.filter((part) => part.layer === layer).map((part) => part.value));
  const rest = all - sum(columns.map((column) => valueOf(layer, column)));
  return make("tr", {}, make("th", { scope: "row" }, `layer ${layer}`), ...cells,
    number(rest, `layer ${layer}, biases and shifts`),
    make("td", { class: "none" }, make("b", {}, short(all))));
}
$("component-table").append(make("table", {},
  make("caption", { class: "hidden" }, "What each part of the model adds to the score; from embeddings at the top to the last layer"),
  make("thead", {}, make("tr", {}, make("td", { class: "none" }), ...heads.map((head) => make("th", { scope: "col" }, make("span", { class: "hidden" }, "head "), `${head}`)),
    ...["feed-forward", "biases", "sum"].map((name) => make("th", { scope: "col", class: "wrap" }, name)))),
  make("tbody", {}, make("tr", {}, make("th", { scope: "row" }, "embeddings"),
    ...inputs.map((part, index) => {
      const width = Math.floor((headCount + 2) / inputs.length) + (index < (headCount + 2) % inputs.length ? 1 : 0);
      const cell = number(part.value, part.label, `${part.kind} ${short(part.value)}`);
      cell.colSpan = width;
      return cell;
    }), make("td", { class: "none" }, make("b", {}, short(sum(inputs.map((part) => part.value)))))), ...layers.map(componentRow))));
arrows($("component-table"), links, headCount);
legend($("component-legend"), mostOfParts);
$("component-facts").textContent = `${parts.length} components add up to the score, ${plain(data.score)}, to within ${small(data.components.residual)}.`;
bars($("component-bars"), parts);

// Attention: weights in 255ths, `[layers, heads, L, L]` of each sentence.
const patterns = data.attention.patterns.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
const [strongest] = parts.filter((part) => part.kind.startsWith("head ")).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
const state = { sentence: 0, layer: strongest.layer, head: Number(strongest.kind.slice(5)), token: null };
const length = () => data.sentences[state.sentence].tokens.length;
const weight = (layer, head, from, to) =>
  patterns[state.sentence][((layer * headCount + head) * length() + from) * length() + to] / 255;

function habits(layer, head) { // what share of its attention goes where, each token counted once
  const { tokens } = data.sentences[state.sentence], found = new Map();
  tokens.forEach((_, from) => tokens.forEach((token, to) => {
    const kind = from === to ? "itself" : /^\[[A-Z]+\]$/.test(token) ? token : to === from - 1 ? "the token before"
      : to === from + 1 ? "the token after" : "other tokens";
    found.set(kind, (found.get(kind) ?? 0) + weight(layer, head, from, to) / tokens.length);
  }));
  return [...found].sort((a, b) => b[1] - a[1]);
}

const thumbs = layers.map((layer) => heads.map((head) => make("button", {
  class: "thumb", type: "button", role: "gridcell", onclick: () => showHead(layer, head),
}, make("canvas", { "aria-hidden": "true" }))));
$("heads").style.setProperty("--columns", headCount);
$("heads").append(make("div", { class: "layer names", "aria-hidden": "true" }, make("span"), ...heads.map((head) => make("span", {}, `${head}`))),
  ...thumbs.map((row, layer) => make("div", { class: "layer", role: "row" },
    make("span", { role: "rowheader" }, make("b", {}, "layer "), `${layer}`), ...row)));
const stopAtHead = arrows($("heads"), thumbs.flat(), headCount);

function paint() { // every head's weights as pixels, in the colours of light or dark
  const probe = make("span", { hidden: true });
  document.body.append(probe);
  const colour = (value) => {
    const context = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    probe.style.color = value;
    context.fillStyle = getComputedStyle(probe).color;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data;
  };
  const shades = [...Array(256).keys()].map((level) => colour(`color-mix(in oklab, var(--accent) ${(level / 2.55).toFixed(1)}%, var(--faint))`));
  probe.remove();
  const size = length();
  thumbs.forEach((row, layer) => row.forEach((thumb, head) => {
    const canvas = thumb.firstChild, start = (layer * headCount + head) * size * size;
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    for (let cell = 0; cell < size * size; cell++) image.data.set(shades[patterns[state.sentence][start + cell]], 4 * cell);
    context.putImageData(image, 0, 0);
    const [[where, share]] = habits(layer, head);
    thumb.setAttribute("aria-label", `Layer ${layer}, head ${head}: ${percent(share)} to ${where}`);
    thumb.title = thumb.getAttribute("aria-label");
  }));
}

let froms = [], tos = [];
function showHead(layer, head) {
  Object.assign(state, { layer, head, token: null });
  thumbs.flat().forEach((thumb, index) => thumb.setAttribute("aria-selected", String(index === layer * headCount + head)));
  stopAtHead(layer * headCount + head);
  $("head-heading").textContent = `Layer ${layer}, head ${head}`;
  $("head-habits").textContent = habits(layer, head).filter(([, share]) => share >= 0.05)
    .map(([where, share]) => `${percent(share)} to ${where}`).join(", ");
  const { tokens } = data.sentences[state.sentence], size = tokens.length, step = 28;
  const curve = (from, to) => `M0 ${(from + 0.5) * step} C50 ${(from + 0.5) * step} 50 ${(to + 0.5) * step} 100 ${(to + 0.5) * step}`;
  const paths = [];
  tokens.forEach((_, from) => tokens.forEach((_, to) => {
    const share = weight(layer, head, from, to);
    if (share >= 0.02) paths.push(make("path", { d: curve(from, to), "data-from": from, "stroke-width": 0.6 + 3.4 * share, "stroke-opacity": Math.min(1, 0.08 + 0.92 * share), "vector-effect": "non-scaling-stroke" }));
  }));
  froms = tokens.map((token, from) => make("button", { type: "button", "aria-pressed": "false",
    onclick: () => { state.token = state.token === from ? null : from; showRow(state.token); },
    onfocus: () => showRow(from), onblur: () => showRow(state.token),
    onpointerenter: () => showRow(from), onpointerleave: () => showRow(state.token) }, piece(token)));
  tos = tokens.map((token) => make("span", { class: "to" }, piece(token), make("small")));
  const left = make("ol", { "aria-label": "Tokens that look" }, ...froms.map((button) => make("li", {}, button)));
  const picture = make("svg", { viewBox: `0 0 100 ${size * step}`, preserveAspectRatio: "none", height: size * step, "aria-hidden": "true" }, ...paths);
  const right = make("ol", { "aria-label": "Tokens looked at" }, ...tos.map((to) => make("li", {}, to)));
  $("lines").replaceChildren(left, picture, right);
  arrows(left, froms, 1);
  showRow(null);
  if ($("head-details").open) showTable();
}

function showRow(from) { // the attention of one token; null: what each token gets on average
  const { tokens } = data.sentences[state.sentence], { layer, head } = state;
  const shares = tokens.map((_, to) => (from === null ? sum(tokens.map((_, other) => weight(layer, head, other, to))) / tokens.length
    : weight(layer, head, from, to)));
  tos.forEach((to, index) => {
    to.style.setProperty("--fill", shares[index] >= 0.005 ? `color-mix(in oklab, var(--look) ${(100 * shares[index]).toFixed(1)}%, var(--surface))` : "none");
    to.lastChild.textContent = percent(shares[index]);
  });
  froms.forEach((button, index) => button.setAttribute("aria-pressed", String(state.token === index)));
  document.querySelectorAll("#lines path").forEach((path) => { path.style.display = from === null || Number(path.dataset.from) === from ? "" : "none"; });
  const own = names[state.sentence];
  if (from === null) $("head-readout").textContent = "Percentages: what each token gets on average. Choose a token on the left to see where it looks.";
  else {
    const order = shares.map((share, index) => [share, own[index]]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share >= 0.005);
    $("head-readout").replaceChildren(make("b", {}, own[from]), ` looks at ${order.map(([share, name]) => `${name} ${percent(share)}`).join(", ")}.`);
  }
}

function showTable() {
  const own = names[state.sentence], { layer, head } = state;
  heatTable($("head-table"), `Layer ${layer}, head ${head}: how much each token (rows) looks at each (columns), in percent`, own, own,
    (from, to) => ({ text: `${Math.round(100 * weight(layer, head, from, to))}`, background: look(weight(layer, head, from, to)) }));
}
$("head-details").addEventListener("toggle", () => { if ($("head-details").open) showTable(); });

$("sentence-switch").append(...data.sentences.map(({ text }, sentence) => make("label", { title: text }, make("input", {
  type: "radio", name: "sentence", value: sentence, checked: sentence === 0,
  onchange: () => { state.sentence = sentence; paint(); showHead(state.layer, state.head); },
}), make("span", {}, text))));

// Light and dark.
$("theme").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.target.value; paint(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

// Layer by layer.
function chart(rows) {
  const width = 720, height = 270, left = 62, top = 34, bottom = 44, lowest = Math.min(0, ...rows.map((row) => row.value));
  const x = (index) => left + 36 + index * (width - left - 72) / Math.max(1, rows.length - 1);
  const y = (value) => top + (1 - value) / (1 - lowest) * (height - top - bottom);
  const levels = [-1, -0.5, 0, 0.5, 1].filter((level) => level >= Math.min(0, lowest));
  const spoken = rows.map(({ name, value }) => `${name} ${plain(value, 3)}`).join(", ");
  const label = (name) => { // "layer 3", of which narrow screens show the number
    const [, unit, rest] = /^(layer )(.+)$/.exec(name) ?? [null, "", name];
    return [make("tspan", { class: "unit" }, unit), rest];
  };
  return make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Similarity by layer: ${spoken}` },
    ...levels.flatMap((level) => [make("line", { x1: left, x2: width, y1: y(level), y2: y(level) }),
      make("text", { x: left - 10, y: y(level) + 5, "text-anchor": "end" }, plain(level, 1))]),
    make("polyline", { points: rows.map((row, index) => `${x(index)},${y(row.value)}`).join(" ") }),
    ...rows.flatMap(({ name, value }, index) => [make("circle", { cx: x(index), cy: y(value), r: 5 }),
      make("text", { class: "value", x: x(index), y: y(value) + (index && value < rows[index - 1].value ? 26 : -14),
        "text-anchor": "middle" }, plain(value, 2)),
      make("text", { x: x(index), y: height - 10, "text-anchor": "middle" }, ...label(name))]));
}
const similarities = Object.entries(data.layers).map(([name, value]) => ({ name, value }));
$("layers-chart").append(chart(similarities));
$("layers-table").append(make("table", {}, make("caption", { class: "hidden" }, "Cosine of the two sentences after each layer"),
  make("thead", {}, make("tr", {}, make("td", { class: "none" }), make("th", { scope: "col" }, "cosine"))),
  make("tbody", {}, ...similarities.map(({ name, value }) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, plain(value)))))));

paint();
showHead(state.layer, state.head);
