"use strict";
// Draws the plots that #content describes, and lets tables be sorted and runs be hidden.

const content = JSON.parse(document.getElementById("content").textContent);
const hidden = new Set();
const chosen = { none: "", axis: "steps" };
const views = new Map();

function objects({ columns, rows, lists, mirrored }) {
  const all = rows.map((row) => {
    const found = {};
    columns.forEach((column, index) => {
      found[column] = lists[column] ? lists[column][row[index]] : row[index];
    });
    if ("run" in found) found.name = content.names[found.run];
    return found;
  });
  return mirrored ? all.concat(all.map((found) => ({ ...found, x: found.y, y: found.x }))) : all;
}

async function draw(plot) {
  const place = document.getElementById(`plot-${plot.name}`);
  const variant = plot.variants[chosen[plot.choice]];
  views.get(plot.name)?.finalize();
  views.delete(plot.name);
  place.textContent = variant ? "" : "There is nothing to show for this choice.";
  if (!variant) return;
  const spec = {
    width: "container",
    autosize: { type: variant.spec.width ? "pad" : "fit-x", contains: "padding" },
    ...variant.spec,
    data: { values: objects(variant) },
    config: content.config,
  };
  const { view } = await vegaEmbed(place, spec, {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    tooltip: { theme: "custom" },
  });
  views.set(plot.name, view);
  await hide(view);
}

// Tells a plot which runs are hidden. Plots of a single run have no such signal.
function hide(view) {
  if (!("hidden" in view.getState({ signals: (name) => name === "hidden" }).signals)) return;
  return view.signal("hidden", [...hidden]).runAsync();
}

async function choose(kind, value) {
  chosen[kind] = value;
  for (const fact of document.querySelectorAll("p[data-run]")) {
    fact.hidden = fact.dataset.run !== chosen.run;
  }
  for (const plot of content.plots) if (plot.choice === kind) await draw(plot);
}

function sort(button) {
  const heading = button.closest("th");
  const table = heading.closest("table");
  const index = [...heading.parentElement.children].indexOf(heading);
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const value = (row) => row.cells[index].dataset.value;
  const numbers = rows.some((row) => value(row) !== undefined);
  const before = heading.getAttribute("aria-sort");
  const descending = before ? before === "ascending" : numbers;
  const compare = (a, b) => {
    if (!numbers) return a.cells[index].textContent.localeCompare(b.cells[index].textContent);
    const [x, y] = [a, b].map(value);
    if (x === undefined || y === undefined) return 0;
    return Number(x) - Number(y);
  };
  rows.sort((a, b) => (descending ? compare(b, a) : compare(a, b)));
  // Rows without a number go to the end; the others keep their order.
  if (numbers) rows.sort((a, b) => (value(a) === undefined) - (value(b) === undefined));
  body.append(...rows);
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const button of document.querySelectorAll(".sortable th button")) {
  button.addEventListener("click", () => sort(button));
}
for (const button of document.querySelectorAll("#key button")) {
  button.addEventListener("click", async () => {
    const run = Number(button.dataset.run);
    const shown = hidden.delete(run); // true if the run was hidden until now
    if (!shown) hidden.add(run);
    button.setAttribute("aria-pressed", String(shown));
    await Promise.all([...views.values()].map(hide));
  });
}
for (const select of document.querySelectorAll("select[data-choice]")) {
  select.addEventListener("change", () => choose(select.dataset.choice, select.value));
}
document.getElementById("differences")?.addEventListener("change", (event) => {
  document.getElementById("all-settings").classList.toggle("only-different", event.target.checked);
});

(async () => {
  const masks = content.plots.find((plot) => plot.choice === "run");
  if (masks) await choose("run", document.querySelector("select[data-choice=run]")?.value ?? Object.keys(masks.variants)[0]);
  for (const plot of content.plots) if (plot.choice !== "run") await draw(plot);
  document.documentElement.dataset.drawn = views.size;
})();
