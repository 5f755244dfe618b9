"use strict";
// Sorting, filtering and the theme. Without it the page reads the same.
document.documentElement.classList.add("scripted"); // long tables wait, see the style
document.addEventListener("DOMContentLoaded", () => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const at = (path) => path.split(".").reduce((value, key) => value[key], report);
  const shownAtOnce = 1000; // rows of a table: laying out many more takes seconds
  const collator = new Intl.Collator("en", { numeric: true });

  // null stands for what JSON has no number for: infinitely far, or none at all.
  function value(row, key, table) {
    const found = row[key];
    if (typeof found === "boolean") return row.judged === false ? 1 : found ? 2 : 0;
    if (key === "shape") return found.reduce((product, n) => product * n, 1);
    if (Array.isArray(found)) return found.join(",");
    if (found === null) return table.dataset.rows === "differences" ? "" : Infinity;
    return found;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b || 0;
    if (typeof a === typeof b) return collator.compare(a, b);
    return typeof a === "string" ? -1 : 1; // nothing comes before any number
  }

  function enliven(table) {
    const data = at(table.dataset.rows);
    const body = table.tBodies[0];
    const rows = [...body.rows].map((element, i) => ({ element, i, data: data[i] }));
    const heads = [...table.tHead.rows[0].cells];
    const tools = table.previousElementSibling;
    const filter = tools.querySelector(".filter");
    const only = tools.querySelector(".only");
    const output = tools.querySelector("output");
    const more = document.createElement("button");
    let every = rows.length <= shownAtOnce;

    function sort(head) {
      const key = head.dataset.key;
      const falling = head.classList.contains("n") && key !== "";
      const was = head.getAttribute("aria-sort");
      const next = was === null ? (falling ? "descending" : "ascending")
        : was === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      for (const row of rows) row.value = key === "" ? row.i : value(row.data, key, table);
      rows.sort((a, b) => sign * compare(a.value, b.value) || a.i - b.i);
      body.append(...rows.map((row) => row.element));
      select();
    }

    function select() {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      for (const { element, data: row } of rows) {
        const text = [row.name, row.layer, row.why, row.diagnosis].join(" ").toLowerCase();
        const differs = row.judged === undefined || (row.judged && !row.same);
        const fits = words.every((word) => text.includes(word)) && (differs || !only?.checked);
        found += fits;
        element.hidden = !fits || (!every && found > shownAtOnce);
      }
      output.textContent = `${found.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
      more.hidden = every || found <= shownAtOnce;
    }

    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(head));
      head.append(button);
    }
    heads[0].setAttribute("aria-sort", "ascending");
    more.type = "button";
    more.className = "more";
    more.textContent = `The first ${shownAtOnce.toLocaleString("en")} are shown: show all`;
    more.addEventListener("click", () => { every = true; select(); });
    output.before(more);
    filter.addEventListener("input", select);
    only?.addEventListener("change", select);
    tools.hidden = false;
    table.classList.add("live");
    select(); // a reload may have kept what was typed
  }

  for (const table of document.querySelectorAll("table[data-rows]")) enliven(table);

  const theme = document.getElementById("theme");
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
  const say = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    say();
  });
  dark.addEventListener("change", say);
  say();
  theme.hidden = false;
});
