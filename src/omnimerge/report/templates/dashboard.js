"use strict";
// All of the page is there without this: it sorts tables, and hides series.
(() => {
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], first = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    const number = (row) => { const key = row.cells[column].dataset.key; return key === undefined ? null : Number(key); };
    button.addEventListener("click", () => {
      const turns = column ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const turn = turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      for (const other of heads) other.setAttribute("aria-sort", other === head ? turn : "none");
      const sign = turn === "ascending" ? 1 : -1;
      const rows = [...first];
      if (turn !== "none") rows.sort((a, b) => {
        if (!column) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent);
        const x = number(a), y = number(b);
        if (x === null || y === null) return (x === null) - (y === null);  // what has no value stays last
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
}
for (const legend of document.querySelectorAll(".legend.series")) {
  const part = legend.closest(".part");
  for (const item of legend.children) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Show or hide";
    button.setAttribute("aria-pressed", "true");
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const drawn of part.querySelectorAll(`[data-series="${item.dataset.number}"]`)) drawn.classList.toggle("away", !shown);
    });
  }
}
})();
