// The page of an evaluation: the heads of the table of scans sort it.
"use strict";

const table = document.getElementById("scans");
const heads = [...table.tHead.rows[0].cells];

// A figure, a text, or null for a figure that is not defined: those stay last.
function key(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.classList.contains("number") ? null : cell.textContent;
}

function sort(column, way) {
  const compared = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : way * compared(a, b));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  heads.forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}

heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () =>
    sort(column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1));
});
