"use strict";

// Draw the figures in the colours of the page, again when these or the width change.

const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = Array.from(document.querySelectorAll(".plot"));
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 640px)");
const printing = matchMedia("print");
const touch = matchMedia("(hover: none)");

/** Return a value with the CSS variables in its colours replaced. */
function colored(value, style, key = "") {
  if (Array.isArray(value)) {
    return value.map((item) => colored(item, style, key));
  }
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, colored(item, style, name)]));
  }
  const isVariable = key.endsWith("color") && typeof value === "string" && value.startsWith("--");
  return isVariable ? style.getPropertyValue(value).trim() : value;
}

/** Return a layout with what is common to all figures. */
function completed(layout, style) {
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: color("--grid"),
    linecolor: color("--grid"),
    zerolinecolor: color("--grid"),
    tickcolor: color("--grid"),
    automargin: true,
    fixedrange: touch.matches,
  };
  const axes = Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
  const title = (name) => ({ ...layout[name].title, font: { size: 12, color: color("--muted") }, standoff: 8 });
  const complete = Object.fromEntries(axes.map((name) => [name, { ...axis, ...layout[name], title: title(name) }]));
  return {
    height: 260,
    showlegend: true,
    ...layout,
    ...complete,
    margin: { t: 8, r: 12, b: 44, l: 56, ...layout.margin },
    font: { family: style.fontFamily, size: 12, color: color("--text") },
    paper_bgcolor: "rgba(0, 0, 0, 0)",
    plot_bgcolor: "rgba(0, 0, 0, 0)",
    hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--border"), font: { color: color("--text") }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
    hovermode: "closest",
    modebar: { bgcolor: "rgba(0, 0, 0, 0)", color: color("--muted"), activecolor: color("--text") },
    dragmode: touch.matches ? false : "zoom",
  };
}

function draw() {
  const style = getComputedStyle(document.body);
  for (const plot of plots) {
    const { data, layout } = figures[Number(plot.dataset.figure)];
    Plotly.react(plot, colored(data, style), completed(colored(layout, style), style), {
      responsive: true,
      displaylogo: false,
      displayModeBar: narrow.matches || touch.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  }
}

for (const query of [dark, narrow, printing]) {
  query.addEventListener("change", draw);
}
draw();
