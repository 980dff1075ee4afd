// A field above every table with the class "filter": rows that do not have all of its words are hidden.
document$.subscribe(() => {
  for (const table of document.querySelectorAll(".filter table")) {
    if (table.dataset.filtered) continue;
    table.dataset.filtered = "yes";
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "Filter: delta, TC0, H·K·V …";
    field.setAttribute("aria-label", "Filter the table");
    field.style.cssText = "width: 100%; padding: .5em; border: 1px solid; border-radius: .2em; color: inherit";
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    table.closest(".filter").prepend(field);
  }
});
