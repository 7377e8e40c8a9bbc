document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(function (h) { h.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var body = table.tBodies[0], rows = Array.from(body.rows).map(function (row) {
        return { row: row, key: row.cells[column].dataset.key, text: row.cells[column].textContent };
      });
      rows.sort(function (a, b) {
        var x = parseFloat(a.key), y = parseFloat(b.key), none = isNaN(x) - isNaN(y);
        if (a.key !== undefined || b.key !== undefined) { if (none) return none; if (x !== y && !isNaN(x)) return up ? x - y : y - x; }
        return up ? a.text.localeCompare(b.text) : b.text.localeCompare(a.text);
      });
      rows.forEach(function (r) { body.appendChild(r.row); });
    });
  });
});
