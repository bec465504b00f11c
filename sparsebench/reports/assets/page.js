// Sorting, filtering and hovering. Without this script everything on the page still reads.
(function () {
  "use strict";
  const shortTable = 12; // rows up to which a table needs no search box

  function enhance(table) {
    const rows = table.tBodies[0] ? table.tBodies[0].rows.length : 0;
    if (rows < 2) return null;
    const few = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.filter === "yes");
    const long = rows > shortTable;
    const made = new DataTable(table, {
      paging: rows > 25,
      pageLength: 25,
      info: rows > 25,
      searching: long,
      order: [],
      autoWidth: false,
      layout: {
        topStart: null, topEnd: long ? "search" : null,
        bottomStart: rows > 25 ? "info" : null, bottomEnd: rows > 25 ? "paging" : null,
      },
      language: { search: "", searchPlaceholder: "search this table" },
    });
    if (long) addControls(table, made, few);
    return made;
  }

  // Above the table: the search box, and a choice of values for each column that holds few different words.
  function addControls(table, made, few) {
    const box = document.createElement("div");
    box.className = "controls";
    const search = made.table().container().querySelector(".dt-search");
    if (search) box.append(search);
    few.forEach((wanted, index) => {
      if (!wanted) return;
      const name = table.tHead.rows[0].cells[index].textContent.trim();
      const select = document.createElement("select");
      select.className = "filter";
      select.setAttribute("aria-label", "only this " + name);
      select.dataset.column = name;
      select.append(new Option(name + ": all", ""));
      const texts = made.column(index).nodes().toArray().map((cell) => cell.textContent);
      [...new Set(texts)].sort().forEach((text) => select.append(new Option(text || "(empty)", text)));
      select.addEventListener("change", () => {
        const exact = select.value.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
        made.column(index).search(select.selectedIndex ? "^" + exact + "$" : "", { regex: true, smart: false }).draw();
      });
      box.append(select);
    });
    table.closest(".table").prepend(box);
  }

  const tables = new Map();
  document.querySelectorAll("table.data").forEach((table) => tables.set(table.id, enhance(table)));

  // A point leads to its run, on whatever page of the table of runs that is.
  function find(hash) {
    const id = decodeURIComponent(hash.slice(1));
    const runs = tables.get("table-runs");
    if (!id.startsWith("run-")) return;
    if (runs) {
      runs.search("");
      runs.columns().search("");
      runs.draw();
      document.querySelectorAll("#cell-provenance_table select.filter").forEach((one) => (one.selectedIndex = 0));
      const place = runs.rows({ order: "applied", search: "applied" }).nodes().toArray()
        .findIndex((row) => row.querySelector("#" + CSS.escape(id)));
      if (place < 0) return;
      if (runs.page.info().pages > 1) runs.page(Math.floor(place / runs.page.len())).draw("page");
    }
    const cell = document.getElementById(id);
    if (!cell) return;
    document.querySelectorAll("tr.found").forEach((row) => row.classList.remove("found"));
    cell.closest("tr").classList.add("found");
    cell.scrollIntoView({ block: "center" });
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#run-'], svg a.point");
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.getAttribute("href"));
    find(link.getAttribute("href"));
  });
  if (location.hash) find(location.hash);

  document.querySelectorAll("svg title").forEach((title) => title.remove()); // the tooltip below says the same
  tippy("svg .point", { content: (point) => point.dataset.tip, delay: [60, 0], appendTo: document.body, maxWidth: 320 });

  // The series under the pointer stands out.
  document.querySelectorAll("figure svg").forEach((svg) => {
    const series = [...svg.querySelectorAll("[data-series]")];
    series.forEach((one) => {
      one.addEventListener("mouseenter", () =>
        series.forEach((other) => other.classList.toggle("faded", other.dataset.series !== one.dataset.series)));
      one.addEventListener("mouseleave", () => series.forEach((other) => other.classList.remove("faded")));
    });
  });

  document.querySelectorAll("#table-verdicts td").forEach((cell) => {
    const text = cell.textContent;
    if (["reproduced", "not reproduced", "inconclusive", "untested"].includes(text))
      cell.classList.add("verdict-" + text.replace(" ", "-"));
  });
})();
