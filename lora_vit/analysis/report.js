var UNITS = { kB: 1e3, MB: 1e6, GB: 1e9, M: 1e6 }, root = document.documentElement;

function all(selector, within) { return Array.from((within || document).querySelectorAll(selector)); }

function parts(cell, within) { return all((within || "") + '[data-cell="' + CSS.escape(cell) + '"]'); }

function number(text) {  // "1.2 MB" is 1,200,000; NaN for what is no number
  var found = text.match(/^\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(kB|MB|GB|M|B|%)?[ *]*$/);
  return found ? parseFloat(found[1].replace(/,/g, "")) * (UNITS[found[2]] || 1) : NaN;
}

function sortBy(table, head, column) {
  var up = head.getAttribute("aria-sort") !== "ascending";
  all("th", table).forEach(function (h) { h.removeAttribute("aria-sort"); });
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  var rows = Array.from(table.tBodies[0].rows).map(function (row) {
    var text = row.cells[column].textContent;
    return { row: row, text: text, key: number(text), none: text === "–" || text === "" };
  });
  var numbers = rows.every(function (r) { return r.none || !isNaN(r.key); });
  rows.sort(function (a, b) {
    if (a.none || b.none) return a.none - b.none;
    var order = numbers ? a.key - b.key : a.text.localeCompare(b.text);
    return up ? order : -order;
  });
  rows.forEach(function (r) { table.tBodies[0].appendChild(r.row); });
}

function filter(table, text, output) {  // every word begins a word of the row; a number is one of its numbers
  var wanted = text.toLowerCase().split(/[\s,]+/).filter(Boolean), rows = Array.from(table.tBodies[0].rows), kept = 0;
  var settings = JSON.parse(table.closest(".table").parentElement.dataset.settings || "[]");
  var heads = all("th", table).map(function (head) { return head.textContent; });
  rows.forEach(function (row) {
    var cells = row.dataset.cell ? all(".name, .mark", row) : [];
    cells = cells.concat(Array.from(row.cells).filter(function (c, i) {
      return !row.dataset.cell || settings.indexOf(heads[i]) >= 0;
    }));
    var words = cells.map(function (c) { return c.textContent.toLowerCase(); }).join(" ").split(/[\s,]+/);
    var fits = wanted.every(function (w) {
      return words.some(function (o) { return isNaN(w) ? o.startsWith(w) : o !== "" && +o === +w; });
    });
    kept += fits;
    row.classList.toggle("hidden", !fits);
    if (row.dataset.cell) parts(row.dataset.cell, "svg ").forEach(function (part) {
      part.classList.toggle("dim", !fits);
    });
  });
  output.textContent = wanted.length ? kept + " of " + rows.length : "";
}

function show(table, column, shown) {
  all("tr", table).forEach(function (row) { row.cells[column].classList.toggle("hidden", !shown); });
  table.classList.toggle("many", all("th:not(.hidden)", table).length > 14);  // for print
}

function columns(table, chooser, spare, settings) {  // what fits is shown, the rest can be chosen
  var boxes = {}, box = table.parentElement, narrow = window.innerWidth < 700;
  all("th", table).forEach(function (head, column) {
    var label = document.createElement("label"), tick = document.createElement("input"), name = head.textContent;
    tick.type = "checkbox"; tick.checked = true;
    tick.addEventListener("change", function () { show(table, column, tick.checked); });
    label.append(tick, " " + name);
    chooser.appendChild(label);
    boxes[name] = function (shown) { tick.checked = shown; show(table, column, shown); };
  });
  function set(names, shown) { names.forEach(function (name) { if (boxes[name]) boxes[name](shown); }); }
  function wide() { return box.scrollWidth > box.clientWidth; }
  var wanted = spare.filter(function (name) { return settings.indexOf(name) < 0; });
  if (settings.length) set(["cell"], false);
  if (narrow) { set(settings, false); set(["cell"], true); set(wanted, false); set(wanted.slice(-2), true); return; }
  wanted.forEach(function (name) { if (wide()) boxes[name] && boxes[name](false); });
  if (wide() && settings.length) { set(settings, false); set(["cell"], true); }
}

all("table.sortable").forEach(function (table) {
  all("th", table).forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () { sortBy(table, head, column); });
  });
  var place = table.closest(".table"), words = place.querySelector("input[type=search]"), chooser = place.querySelector(".columns div");
  if (words) words.addEventListener("input", function () { filter(table, words.value, place.querySelector("output")); });
  if (chooser) columns(table, chooser, JSON.parse(place.parentElement.dataset.spare), JSON.parse(place.parentElement.dataset.settings));
});

var tip = document.createElement("div"), cells = document.querySelector("table.cells");
tip.id = "tip"; tip.hidden = true;
document.body.appendChild(tip);

function light(id) {
  if (tip.dataset.of === String(id)) return;
  tip.dataset.of = id;
  all(".lit").forEach(function (part) { part.classList.remove("lit"); });
  if (id) parts(id).forEach(function (part) { part.classList.add("lit"); });
}

document.addEventListener("mousemove", function (event) {
  var part = event.target.closest("[data-cell]"), row = part && parts(part.dataset.cell, "table.cells tr")[0];
  light(part && part.dataset.cell);
  tip.hidden = !row || part === row;
  if (tip.hidden) return;
  tip.replaceChildren();
  all("th", cells).forEach(function (head, column) {
    var name = head.textContent, value = row.cells[column].textContent, line = document.createElement(name === "cell" ? "b" : "div");
    if (name !== "cell" && (value === "–" || value === "" || row.cells[column].classList.contains("hidden"))) return;
    line.innerHTML = name === "cell" ? "" : "<i></i> ";
    if (name !== "cell") line.firstChild.textContent = name;
    line.append(value);
    tip[name === "cell" ? "prepend" : "append"](line);
  });
  tip.style.left = Math.min(event.clientX + 16, window.innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
});

function theme(name) { root.dataset.theme = name; }
var dark = window.matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", function () { theme(dark.matches ? "dark" : "light"); });
document.getElementById("theme").addEventListener("click", function () { theme(root.dataset.theme === "dark" ? "light" : "dark"); });
window.addEventListener("beforeprint", function () { all("details:not(.columns)").forEach(function (d) { d.open = true; }); });
