// Tables of the class "sortable" are sorted by a click on the head of a column: numbers with the highest first, words in their order.
function sortableTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => sortRows(table, heads, column));
      head.replaceChildren(button);
    });
  }
}

// Rows without a value come last in both orders, and equal rows keep their order.
function sortRows(table, heads, column) {
  const body = table.tBodies[0];
  const number = (row) => Number.parseFloat(row.cells[column].dataset.value ?? "NaN");
  const word = (row) => row.cells[column].textContent.trim();
  const rows = [...body.rows];
  const numeric = rows.some((row) => !Number.isNaN(number(row)));
  const before = heads[column].getAttribute("aria-sort");
  const ascending = numeric ? before === "descending" : before !== "ascending";
  const sign = ascending ? 1 : -1;
  rows.sort((a, b) => {
    if (!numeric) return sign * word(a).localeCompare(word(b), undefined, { numeric: true });
    const [x, y] = [number(a), number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
  });
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...rows);
}
