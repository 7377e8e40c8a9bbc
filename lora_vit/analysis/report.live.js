// A page of a sweep that has not ended asks every few seconds for a newer one, and opens it as this one stands: at the
// same place, with the rows in the same order and the same words in the fields. One of a sweep that has ended stays.
// A page that took long to make is asked for more rarely: training has the machine.
(function () {
  var EVERY = 5000, KEPT = ".sortable th, input, details, .scroll", line = document.getElementById("live");

  function all(selector) { return Array.from(document.querySelectorAll(selector)); }

  // what it is called and below which heading: a newer page may have more tables, columns and notes
  function key(node) {
    var above = all("h2").filter(function (head) { return head.compareDocumentPosition(node) & 4; }).pop();
    var name = node.matches("input") ? node.getAttribute("aria-label") || node.parentElement.textContent
      : node.matches("details") ? node.querySelector("summary").className + node.querySelector("summary").textContent.replace(/\d+/, "")
      : node.matches("th") ? node.textContent : "";
    return [above ? above.textContent : "", node.tagName, name].join("/");
  }

  function state(node) {
    return node.matches("th") ? node.getAttribute("aria-sort") : node.matches("details") ? node.open
      : node.matches("input") ? [node.value, node.checked, node === document.activeElement]
      : [node.scrollLeft, node.scrollTop];
  }

  function restore(node, was) {
    if (node.matches("th")) {
      for (var tries = 0; was && tries < 2 && node.getAttribute("aria-sort") !== was; tries++) node.querySelector("button").click();
    } else if (node.matches("details")) node.open = was;
    else if (node.matches("input")) {
      if (node.value !== was[0] || node.checked !== was[1]) {
        node.value = was[0];
        node.checked = was[1];
        ["input", "change"].forEach(function (name) { node.dispatchEvent(new Event(name, { bubbles: true })); });
      }
      if (was[2]) node.focus({ preventScroll: true });
    } else node.scrollTo(was[0], was[1]);
  }

  function again(took) { setTimeout(look, Math.max(EVERY, 10 * took)); }

  function look() {
    var asked = Date.now();
    fetch(location.href, { cache: "no-store" }).then(function (answer) { return answer.text(); }).then(function (text) {
      var newer = new DOMParser().parseFromString(text, "text/html").getElementById("live");
      if (newer.textContent === line.textContent || !getSelection().isCollapsed) return again(Date.now() - asked);
      var kept = { took: Date.now() - asked, place: [scrollX, scrollY], nodes: {} };
      all(KEPT).forEach(function (node) { kept.nodes[key(node)] = state(node); });
      sessionStorage.setItem("live", JSON.stringify(kept));
      location.reload();
    }).catch(function () {
      line.textContent = line.textContent.replace(/( \(no answer: .*)?$/, " (no answer: has --serve ended?)");
      again(Date.now() - asked);
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    var kept = JSON.parse(sessionStorage.getItem("live") || "{}");
    sessionStorage.removeItem("live");
    all(KEPT).forEach(function (node) { if (kept.nodes && key(node) in kept.nodes) restore(node, kept.nodes[key(node)]); });
    if (kept.place) scrollTo(kept.place[0], kept.place[1]);
    if (line.dataset.ended === "False") again(kept.took || 0);
  });
})();
