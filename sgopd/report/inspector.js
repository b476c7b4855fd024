// The token inspector: a list of rollouts, and every token of the one that is chosen. Its data are packed as
// sgopd/report/inspector.py says. Texts of the run reach the page by textContent alone; the page's policy refuses
// anything else (no other script, no markup from text).
"use strict";
(async () => {
  const ROW = 68; // height of a rollout in the list, as in the style sheet
  const MARGIN = 6; // rows drawn above and below what can be seen
  const CELLS = ["correct-agree", "correct-conflict", "incorrect-agree", "incorrect-conflict", "neutral"];
  const SHADES = { logratio: 2, kl: 1 }; // nats that have the full shade
  const VERDICTS = { "1": "correct", "-1": "incorrect", "0": "unknown" };
  const $ = (id) => document.getElementById(id);
  if (!$("inspector") || !window.DecompressionStream) return;

  // --- data ---

  const packed = decoded($("rollouts").textContent.trim());
  const size = new DataView(packed.buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(await inflate(packed.subarray(4, 4 + size))));
  unpack(await inflate(packed.subarray(4 + size)));
  const { columns, strings, pieces, lengths } = data;
  const starts = new Uint32Array(lengths.length + 1);
  lengths.forEach((length, i) => (starts[i + 1] = starts[i] + length));
  const number = halves(); // of the bits of a float16

  function decoded(base64) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  async function inflate(bytes) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function unpack(bytes) {
    const count = data.lengths.reduce((sum, length) => sum + length, 0);
    let at = 0;
    for (const [name, width] of data.arrays) {
      const values = (data[name] = new { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[width](count));
      for (let shift = 0; shift < 8 * width; shift += 8) {
        for (let i = 0; i < count; i++) values[i] |= bytes[at++] << shift;
      }
    }
  }

  function halves() {
    const table = new Float32Array(65536);
    for (let bits = 0; bits < 65536; bits++) {
      const exponent = (bits >> 10) & 31, mantissa = bits & 1023;
      const size = exponent === 31 ? (mantissa ? NaN : Infinity)
        : exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24;
      table[bits] = bits & 32768 ? -size : size;
    }
    return table;
  }

  const value = (name, token) => number[data[name][token]];
  const text = (name, row) => strings[columns[name][row]] ?? "";
  const verdict = (row) => VERDICTS[columns.verdict[row]] ?? "unknown";

  // What the gate was told, which is not the verdict where the gate is `shuffled`.
  function cell(row, token) {
    const agreement = data.agreement[token] - 1, told = columns.gate_verdict[row];
    return agreement && told ? (told > 0 ? 0 : 2) + (agreement > 0 ? 0 : 1) : 4;
  }

  function shade(token, by) {
    const size = Math.abs(value(by, token)) / SHADES[by];
    return size > 0 ? Math.min(1, Math.sqrt(size)) : 0; // NaN has none
  }

  // The completion: of its tokens, or as it is where the run kept no statistics of them.
  function completion(row) {
    if (!lengths[row]) return text("completion", row);
    let whole = "";
    for (let token = starts[row]; token < starts[row + 1]; token++) whole += pieces[data.piece[token]];
    return whole;
  }

  function total(row, amount) {
    let sum = 0;
    for (let token = starts[row]; token < starts[row + 1]; token++) sum += amount(token) || 0;
    return sum;
  }

  // --- words ---

  function show(x, digits = 2) {
    if (Number.isNaN(x)) return "–";
    if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
    return String(Number(x.toPrecision(digits))).replace("-", "−");
  }

  // Characters that cannot be seen, or that turn others round, as their numbers.
  function visible(piece) {
    return piece.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
      (c) => c === "\t" ? "⇥" : `⟨${c.charCodeAt(0).toString(16).padStart(4, "0")}⟩`).replaceAll("\n", "⏎\n");
  }

  // A token of nothing, or of blanks alone, has to be seen as well.
  function label(piece) {
    return piece === "" ? "⋯" : /^ +$/.test(piece) ? "␣".repeat(Math.min(piece.length, 8)) : visible(piece);
  }

  function element(tag, className, content) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (content !== undefined) made.textContent = content;
    return made;
  }

  // --- which rollouts, in which order ---

  let shown = []; // rows of the list
  let selected = 0; // place in `shown`
  let texts = null; // in small letters, made when something is searched for the first time

  const FILTERS = {
    all: () => true,
    correct: (row) => columns.verdict[row] === 1,
    incorrect: (row) => columns.verdict[row] === -1,
    unknown: (row) => verdict(row) === "unknown",
    teacher: (row) => text("source", row) === "teacher",
  };
  const conflict = (row) => total(row, (token) => cell(row, token) % 2 && Math.abs(value("logratio", token)));
  const ORDERS = {
    logged: null,
    conflict,
    kl: (row) => total(row, (token) => value("kl", token)) / (lengths[row] || 1),
    longest: (row) => columns.tokens[row] ?? lengths[row],
  };

  function choose() {
    const kept = FILTERS[$("kind").value], step = $("step").value, order = ORDERS[$("order").value];
    const sought = $("search").value.toLowerCase();
    if (sought && !texts) {
      texts = lengths.map((_, row) =>
        [text("prompt", row), completion(row), text("answer", row)].join("\n").toLowerCase());
    }
    shown = [];
    for (let row = 0; row < lengths.length; row++) {
      if (kept(row) && (!step || columns.step[row] === Number(step)) && (!sought || texts[row].includes(sought))) {
        shown.push(row);
      }
    }
    if (order) {
      const amounts = new Map(shown.map((row) => [row, order(row)]));
      shown.sort((a, b) => amounts.get(b) - amounts.get(a) || a - b);
    }
    $("count").textContent =
      `${shown.length.toLocaleString("en")} of ${lengths.length.toLocaleString("en")} rollouts`;
    $("none").hidden = shown.length > 0;
    $("spacer").style.height = `${shown.length * ROW}px`;
    drawn.forEach((row) => (row.place = -1));
    select(0);
  }

  // --- the list: a few rows, that move to where the list is looked at ---

  const list = $("list"), drawn = [];
  let palette = {};

  function drawList() {
    const count = Math.ceil(list.clientHeight / ROW) + 2 * MARGIN;
    while (drawn.length < count) {
      const row = element("div", "row");
      row.setAttribute("role", "option");
      row.id = `row-${drawn.length}`;
      row.head = row.appendChild(element("span", "row-head"));
      row.preview = row.appendChild(element("span", "row-preview"));
      row.strip = row.appendChild(element("canvas"));
      [row.strip.width, row.strip.height] = [240, 6];
      row.place = -1;
      drawn.push(row);
      $("spacer").append(row);
    }
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - MARGIN);
    for (let place = first; place < first + drawn.length; place++) {
      const row = drawn[place % drawn.length];
      if (row.place !== place) fill(row, place);
    }
  }

  function fill(row, place) {
    const index = shown[place];
    row.place = place;
    row.hidden = index === undefined;
    if (row.hidden) return;
    row.style.transform = `translateY(${place * ROW}px)`;
    row.setAttribute("aria-setsize", shown.length);
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-selected", place === selected);
    row.head.replaceChildren(
      element("b", `mark ${verdict(index)}`, verdict(index)),
      ` step ${columns.step[index] ?? "–"} · ${text("source", index) || "student"} · ${columns.tokens[index] ?? "–"} tokens`,
    );
    let preview = lengths[index] ? "" : text("completion", index).slice(0, 120);
    for (let token = starts[index]; token < starts[index + 1] && preview.length < 120; token++) {
      preview += pieces[data.piece[token]];
    }
    row.preview.textContent = visible(preview).replaceAll("\n", "");
    strip(row.strip.getContext("2d"), index);
  }

  // A rollout in 240 pixels: of the tokens behind a pixel, the strongest.
  function strip(context, row) {
    const { width, height } = context.canvas, by = $("shade").value, count = lengths[row];
    context.clearRect(0, 0, width, height);
    const bars = Math.min(width, count);
    for (let bar = 0; bar < bars; bar++) {
      const from = starts[row] + Math.floor((bar * count) / bars), to = starts[row] + Math.floor(((bar + 1) * count) / bars);
      let strongest = from;
      for (let token = from; token < to; token++) {
        if (Math.abs(value(by, token)) > Math.abs(value(by, strongest))) strongest = token;
      }
      context.globalAlpha = 0.12 + 0.88 * shade(strongest, by);
      context.fillStyle = palette[CELLS[cell(row, strongest)]];
      context.fillRect((bar * width) / bars, 0, width / bars, height);
    }
  }

  function readPalette() {
    const style = getComputedStyle($("inspector"));
    palette = Object.fromEntries(CELLS.map((name) => [name, `rgb(${style.getPropertyValue(`--${name}`)})`]));
  }

  function select(place) {
    selected = Math.max(0, Math.min(place, shown.length - 1));
    const top = selected * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    drawList();
    for (const row of drawn) row.setAttribute("aria-selected", row.place === selected);
    list.setAttribute("aria-activedescendant", drawn[selected % drawn.length].id);
    drawRollout(shown[selected]);
  }

  // --- the rollout ---

  let current = -1; // token that the details are of
  let row = -1; // rollout that is drawn

  function drawRollout(index) {
    $("rollout").hidden = index === undefined;
    if (index === undefined || index === row) return;
    row = index;
    const extracted = text("extracted", row), answer = text("answer", row), reason = text("reason", row);
    $("verdict").textContent = verdict(row);
    $("verdict").className = `badge ${verdict(row)}`;
    $("reason").textContent = reason === verdict(row) ? "" : reason.replaceAll("_", " ");
    $("told").textContent = lengths[row] && columns.gate_verdict[row] !== columns.verdict[row]
      ? `the gate was told: ${VERDICTS[columns.gate_verdict[row]]}` : "";
    $("extracted").textContent = extracted || "–";
    $("answer").textContent = answer || "–";
    $("prompt").textContent = text("prompt", row);
    const tokens = $("tokens");
    tokens.classList.toggle("plain", !lengths[row]);
    tokens.replaceChildren(...(lengths[row] ? spans() : [completion(row)]));
    tokens.scrollTop = 0;
    const more = (columns.tokens[row] ?? 0) - lengths[row];
    $("more").textContent = !lengths[row] ? "The run kept no statistics of this rollout's tokens."
      : more > 0 ? `${more.toLocaleString("en")} more tokens were not kept (num_tokens_to_log).` : "";
    point(lengths[row] ? strongest() : -1);
  }

  function strongest() {
    let best = 0;
    for (let i = 1; i < lengths[row]; i++) {
      if (Math.abs(value("logratio", starts[row] + i)) > Math.abs(value("logratio", starts[row] + best))) best = i;
    }
    return best;
  }

  function spans() {
    const by = $("shade").value;
    return Array.from({ length: lengths[row] }, (_, i) => {
      const token = starts[row] + i;
      const span = element("span", `token ${CELLS[cell(row, token)]}`, label(pieces[data.piece[token]]));
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.id = `token-${i}`;
      span.style.setProperty("--shade", shade(token, by).toFixed(2));
      return span;
    });
  }

  function point(i) {
    const tokens = $("tokens");
    tokens.children[current]?.setAttribute("aria-selected", "false");
    current = i;
    $("details").hidden = i < 0;
    if (i < 0) return tokens.removeAttribute("aria-activedescendant");
    const span = tokens.children[i], token = starts[row] + i, d = value("logratio", token);
    span.setAttribute("aria-selected", "true");
    tokens.setAttribute("aria-activedescendant", span.id);
    const kind = CELLS[cell(row, token)], told = columns.gate_verdict[row];
    const arrows = told ? `verdict ${told > 0 ? "↑" : "↓"} teacher ${d > 0 ? "↑" : "↓"}` : "no verdict";
    $("piece").textContent = visible(JSON.stringify(pieces[data.piece[token]]));
    $("place").textContent = `token ${i + 1} of ${columns.tokens[row] ?? lengths[row]}`;
    $("cell").textContent = kind.replace("-", ", ");
    $("cell").className = `cell ${kind}`;
    $("arrows").textContent = arrows;
    const numbers = {
      d: show(d), weight: show(value("gate", token), 3), kl: show(value("kl", token)),
      student: show(value("student_logprob", token)), teacher: show(value("student_logprob", token) + d),
      "student-entropy": show(value("student_entropy", token)), "teacher-entropy": show(value("teacher_entropy", token)),
    };
    for (const [name, words] of Object.entries(numbers)) $(`token-${name}`).textContent = words;
  }

  function move(i) {
    point(Math.max(0, Math.min(i, lengths[row] - 1)));
    $("tokens").children[current]?.scrollIntoView({ block: "nearest" });
  }

  function nextConflict(step) {
    for (let i = current + step; i >= 0 && i < lengths[row]; i += step) {
      if (cell(row, starts[row] + i) % 2) return i;
    }
    return current;
  }

  // --- what a person does ---

  function keys(target, actions) {
    target.addEventListener("keydown", (event) => {
      const action = !event.ctrlKey && !event.metaKey && !event.altKey && actions[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
  }

  function listen() {
    let waiting = 0;
    list.addEventListener("scroll", () => {
      waiting ||= requestAnimationFrame(() => {
        waiting = 0;
        drawList();
      });
    }, { passive: true });
    list.addEventListener("click", (event) => {
      const clicked = event.target.closest(".row");
      if (clicked) select(clicked.place);
    });
    const page = () => Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    keys(list, {
      ArrowDown: () => select(selected + 1), ArrowUp: () => select(selected - 1),
      PageDown: () => select(selected + page()), PageUp: () => select(selected - page()),
      Home: () => select(0), End: () => select(shown.length - 1), Enter: () => $("tokens").focus(),
    });
    const token = (event) => [...event.target.classList ?? []].includes("token") && Number(event.target.id.slice(6));
    for (const kind of ["pointerover", "click"]) {
      $("tokens").addEventListener(kind, (event) => {
        const i = token(event);
        if (i !== false) point(i);
      });
    }
    keys($("tokens"), {
      ArrowRight: () => move(current + 1), ArrowLeft: () => move(current - 1),
      ArrowDown: () => move(nextConflict(1)), ArrowUp: () => move(nextConflict(-1)),
      Home: () => move(0), End: () => move(lengths[row] - 1), Escape: () => list.focus(),
    });
    for (const id of ["kind", "step", "order"]) $(id).addEventListener("change", choose);
    let typing;
    $("search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(choose, 150);
    });
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    const redraw = () => {
      readPalette();
      drawn.forEach((one) => (one.place = -1));
      row = -1;
      const was = current;
      select(selected);
      if (was >= 0) point(was);
    };
    $("shade").addEventListener("change", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("resize", () => drawList());
  }

  for (const step of [...new Set(columns.step)].filter((step) => step !== null).sort((a, b) => a - b)) {
    $("step").append(new Option(String(step)));
  }
  $("inspector").hidden = false;
  if ($("completions")) $("completions").hidden = true;
  readPalette();
  listen();
  choose();
})();
