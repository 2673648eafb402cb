"use strict";
// The tables are whole without this: it lets a reader sort and filter them.
for (const table of document.querySelectorAll("table.results")) {
  const body = table.tBodies[0];
  const [top, bottom] = table.tHead.rows;
  // Column of the body -> its header, where those of the upper row that span two columns have theirs below.
  const below = [...bottom.cells];
  const headers = [...top.cells].flatMap((cell) => (cell.colSpan === 1 ? [cell] : below.splice(0, cell.colSpan)));
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

  const sort = (column) => {
    const header = headers[column];
    const before = header.getAttribute("aria-sort");
    const down = before ? before === "ascending" : "down" in header.dataset; // at first, the best on top
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, either way
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    body.append(...rows);
  };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(column));
    header.append(button);
  });

  const filter = table.closest("section").querySelector(".filter");
  const [search, clean] = filter.querySelectorAll("input");
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word)) || (clean.checked && !("clean" in row.dataset));
      shown += !row.hidden;
    }
    filter.querySelector("output").textContent = `${shown} of ${body.rows.length} rows`;
  };
  search.addEventListener("input", apply);
  clean.addEventListener("change", apply);
  filter.hidden = false;
  apply();
}
