var UNITS = { kB: 1e3, MB: 1e6, GB: 1e9, M: 1e6 };

function number(text) {  // "1.2 MB" is 1,200,000; NaN for what is no number
  var found = text.match(/^\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(kB|MB|GB|M|B|%)?[ *]*$/);
  return found ? parseFloat(found[1].replace(/,/g, "")) * (UNITS[found[2]] || 1) : NaN;
}

document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(function (h) { h.removeAttribute("aria-sort"); });
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
    });
  });
});
