(() => {
"use strict";
// Compares the answers of any two points. Texts are only ever set as text, never as HTML.
const STEP = 50, MOST_STEPS = 4e6;
const data = JSON.parse(document.getElementById("answers-data").textContent);
const find = (id) => document.getElementById(id);
const selects = { a: find("a"), b: find("b") };

function make(tag, kind, text, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

// Words as in report/words.py: each with the white space behind it.
const UNSPACED = "[\\u0e00-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u3000-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\u{20000}-\\u{3ffff}]";
const JOINS = "[\\p{M}\\u200c\\u200d\\u{1f3fb}-\\u{1f3ff}]";
const WORDS = new RegExp(
  `\\s+|(?:(?:(?!${UNSPACED})[\\p{L}\\p{N}_](?:${JOINS}|(?!${UNSPACED})[\\p{L}\\p{N}_])*)|\\S)` +
  `(?:${JOINS}|(?<=\\u200d)\\S)*\\s*`, "gu");
const words = (text) => text.match(WORDS) || [];

// For both texts, whether each word differs: all but a longest common subsequence.
function differing(a, b) {
  const keys = [a, b].map((parts) => parts.map((part) => part.trim().toLowerCase()));
  const marks = [a.map(() => true), b.map(() => true)];
  let start = 0, ends = [a.length, b.length];
  const same = (i, j) => {
    if (keys[0][i] !== keys[1][j]) return false;
    marks[0][i] = marks[1][j] = false;
    return true;
  };
  while (start < Math.min(...ends) && same(start, start)) start++;
  while (Math.min(...ends) > start && same(ends[0] - 1, ends[1] - 1)) ends = [ends[0] - 1, ends[1] - 1];
  const [n, m] = [ends[0] - start, ends[1] - start], wide = m + 1;
  if (!n || !m || n * m > MOST_STEPS) return marks;
  const longest = new Uint16Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--)
    longest[i * wide + j] = keys[0][start + i] === keys[1][start + j]
      ? longest[(i + 1) * wide + j + 1] + 1
      : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (same(start + i, start + j)) { i++; j++; }
    else if (longest[(i + 1) * wide + j] >= longest[i * wide + j + 1]) i++;
    else j++;
  }
  return marks;
}

// One answer, the words that differ inside of `tag`.
function answer(number, parts, marks, tag) {
  const element = make("div", "answer");
  element.dir = "auto";
  if (number < 0) return make("div", "nothing", "no answer in the folder");
  if (!data.texts[number]) return make("div", "nothing", "empty");
  for (let i = 0; i < parts.length;) {
    let end = i + 1;
    while (end < parts.length && marks[end] === marks[i]) end++;
    const piece = parts.slice(i, end).join(""), bare = piece.trimEnd();
    if (marks[i] && bare) element.append(make(tag, "", readable(bare)), piece.slice(bare.length));
    else element.append(readable(piece));
    i = end;
  }
  if (data.more[number]) element.append(make("span", "nothing", ` … and ${data.more[number].toLocaleString("en")} more characters`));
  return element;
}

const readable = (text) => text.replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));

function pair(id, numbers, names) {
  const parts = numbers.map((number) => words(number < 0 ? "" : data.texts[number]));
  const marks = differing(parts[0], parts[1]);
  const sides = numbers.map((number, side) => make("div", "", "",
    make("div", "who", names[side]), answer(number, parts[side], marks[side], side ? "ins" : "del")));
  const long = numbers.some((number) => number >= 0 && data.texts[number].length > 90);
  const row = make("div", "pair" + (long ? " long" : ""), "", make("div", "id", id), ...sides);
  row.setAttribute("role", "listitem");
  const shown = marks.some((side) => side.includes(true));
  if (!shown && numbers.every((number) => number >= 0 && data.texts[number]))
    sides[1].append(make("div", "nothing", numbers.some((number) => data.more[number])
      ? "differs further on" : "differs in white space only"));
  return row;
}

const kind = (number) => (number < 0 ? -1 : data.kinds[number]);

function show() {
  const [a, b] = [+selects.a.value, +selects.b.value];
  const names = [data.columns[a].label, data.columns[b].label];
  const unlike = [], alike = [];
  data.rows.forEach((row, i) => (kind(row[a]) === kind(row[b]) ? alike : unlike).push(i));
  const total = data.missing ? `the ${data.ids.length} prompts in this page` : `${data.prompts} prompts`;
  const same = data.missing ? alike.length : data.prompts - unlike.length;
  find("told").textContent = a === b ? "Twice the same point: choose two."
    : `${unlike.length} of ${total} are answered differently by ${names[0]} and ${names[1]}.`;
  const list = find("differences");
  list.replaceChildren();
  if (unlike.length) list.append(make("div", "pair head", "", make("div", "", "prompt"), ...names.map((name) => make("div", "", name))));
  let next = 0;
  const more = make("button", "more");
  more.type = "button";
  const add = () => {
    for (const i of unlike.slice(next, next + STEP)) more.before(pair(data.ids[i], [data.rows[i][a], data.rows[i][b]], names));
    next += STEP;
    more.hidden = next >= unlike.length;
    more.textContent = `Show more (${unlike.length - next} left)`;
  };
  more.addEventListener("click", add);
  list.append(more);
  add();
  const fold = find("alike"), inside = find("alike-list");
  fold.hidden = !same;
  find("alike-count").textContent = `${same} prompt${same === 1 ? " is" : "s are"} answered the same by both`;
  inside.replaceChildren();
  const fill = () => {
    if (!fold.open || inside.childElementCount) return;
    for (const i of alike) {
      const text = make("dd", "", "", answer(data.rows[i][b], words(data.texts[data.rows[i][b]] || ""), [], "mark"));
      inside.append(make("dt", "", data.ids[i]), text);
    }
    if (same > alike.length) inside.append(make("dt", "", "…"), make("dd", "nothing", `${same - alike.length} more that are the same everywhere are not in this page`));
  };
  fold.ontoggle = fill;
  fill();
}

// The place of a model that an address names: 0.2, 0.20, target.
function place(name) {
  const exact = data.columns.findIndex((column) => column.key === name);
  if (exact >= 0 || name === null || name.trim() === "") return exact;
  return data.columns.findIndex((column) => Number(column.key) === Number(name));
}

function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  let found = false;
  for (const name of ["a", "b"]) {
    const index = place(asked.get(name));
    if (index >= 0) { selects[name].value = index; found = true; }
  }
  return found;
}

function chosen() {
  const keys = ["a", "b"].map((name) => `${name}=${encodeURIComponent(data.columns[selects[name].value].key)}`);
  history.replaceState(null, "", `#${keys.join("&")}`);
  show();
}

if (data.ids.length && data.columns.length > 1) {
  for (const name of ["a", "b"]) {
    selects[name].append(...data.columns.map((column, i) => {
      const option = make("option", "", column.label);
      option.value = i;
      return option;
    }));
    selects[name].value = data[name];
    selects[name].addEventListener("change", chosen);
  }
  find("swap").addEventListener("click", () => {
    [selects.a.value, selects.b.value] = [selects.b.value, selects.a.value];
    chosen();
  });
  for (const cell of document.querySelectorAll("td[data-pair]")) {
    const link = make("a", "", cell.textContent);
    link.href = "#" + cell.dataset.pair;
    cell.replaceChildren(link);
  }
  find("plain").hidden = true;
  find("compare").hidden = false;
  const linked = read();
  show();
  if (linked) find("answers").scrollIntoView();
  addEventListener("hashchange", () => { if (read()) { show(); find("answers").scrollIntoView(); } });
}
})();
