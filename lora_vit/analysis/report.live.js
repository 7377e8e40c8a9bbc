// A page of a sweep that has not ended asks every few seconds for a newer one, and opens it as this one stands: at the
// same place, with the rows in the same order and the same words in the fields. One of a sweep that has ended stays.
// A page that took long to make is asked for more rarely: training has the machine.
(function () {
  var EVERY = 5000, line = document.getElementById("live");

  function all(selector) { return Array.from(document.querySelectorAll(selector)); }
  function heads(table) { return Array.from(table.querySelectorAll("th")); }

  function look() {
    var asked = Date.now();
    function again() { setTimeout(look, Math.max(EVERY, 8 * (Date.now() - asked))); }
    fetch(location.href, { cache: "no-store" }).then(function (answer) { return answer.text(); }).then(function (text) {
      var newer = new DOMParser().parseFromString(text, "text/html").getElementById("live");
      if (newer.textContent === line.textContent || !getSelection().isCollapsed) return again();
      sessionStorage.setItem("live", JSON.stringify({
        sorted: all("table").map(function (table) {
          return heads(table).map(function (head) { return head.getAttribute("aria-sort"); });
        }),
        fields: all("input, select").map(function (field) {
          return [field.value, field.checked, field === document.activeElement];
        }),
        open: all("details").map(function (details) { return details.open; }),
        scrolled: all(".scroll").map(function (box) { return [box.scrollLeft, box.scrollTop]; }),
        place: [scrollX, scrollY],
      }));
      location.reload();
    }).catch(function () {
      line.textContent = line.textContent.replace(/( \(no answer: .*)?$/, " (no answer: has --serve ended?)");
      again();
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    var kept = JSON.parse(sessionStorage.getItem("live") || "{}");
    sessionStorage.removeItem("live");
    all("table").forEach(function (table, t) {
      heads(table).forEach(function (head, i) {
        var wanted = kept.sorted && kept.sorted[t] && kept.sorted[t][i], button = head.querySelector("button");
        for (var tries = 0; wanted && button && tries < 2 && head.getAttribute("aria-sort") !== wanted; tries++) button.click();
      });
    });
    (kept.fields || []).forEach(function (was, i) {
      var field = all("input, select")[i];
      if (!field) return;
      if (field.value !== was[0] || field.checked !== was[1]) {
        field.value = was[0];
        field.checked = was[1];
        ["input", "change"].forEach(function (name) { field.dispatchEvent(new Event(name, { bubbles: true })); });
      }
      if (was[2]) field.focus({ preventScroll: true });
    });
    (kept.open || []).forEach(function (open, i) { if (all("details")[i]) all("details")[i].open = open; });
    (kept.scrolled || []).forEach(function (at, i) { if (all(".scroll")[i]) all(".scroll")[i].scrollTo(at[0], at[1]); });
    if (kept.place) scrollTo(kept.place[0], kept.place[1]);
    if (line.dataset.ended === "False") setTimeout(look, EVERY);
  });
})();
