// Tables in <div class="filterable"> get a box that filters their rows, and headings that sort them.
for (const table of document.querySelectorAll(".filterable table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const box = Object.assign(document.createElement("input"), { type: "search", placeholder: "Filter rows" });
  box.setAttribute("aria-label", "Filter rows");
  const count = Object.assign(document.createElement("output"), { className: "count" });
  const bar = Object.assign(document.createElement("div"), { className: "filter" });
  bar.append(box, count);
  table.closest(".filterable").prepend(bar);

  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  }

  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.trim();
      rows.sort((a, b) => sign * key(a).localeCompare(key(b), "en", { numeric: true }));
      body.append(...rows);
    });
  });
  box.addEventListener("input", filter);
  filter();
}
