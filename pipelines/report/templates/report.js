"use strict";
// Okabe and Ito 2008: colours that the colour-blind tell apart; the last stands for black, which is white in the dark.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const charts = [];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Levels have colours; where a chart has none, its splits have.
function lineOf(line, number) {
  return {
    label: line.name,
    stroke: COLOURS[(line.level === null ? number : line.level) % COLOURS.length],
    width: line.val ? 2.5 : 1,
    spanGaps: true,
    points: { show: line.points, size: 5 },
    value: (_, value) => (value === null || value === undefined ? "–" : short(value)),
  };
}

function short(value) {
  return Number(value.toPrecision(5)).toString();
}

// A chart for those who do not see it: where each line begins and where it ends.
function inWords(data) {
  return data.lines.map((line, number) => {
    const places = data.steps.flatMap((step, place) => (data.values[number][place] === null ? [] : [place]));
    if (!places.length) return `${line.name}: nothing`;
    const ends = [...new Set([places[0], places.at(-1)])];
    return `${line.name}: ` + ends.map((at) => `${short(data.values[number][at])} at ${data.x} ${data.steps[at]}`).join(", ");
  }).join("; ");
}

function draw(holder, data) {
  const ink = colour("--soft"), rule = colour("--rule");
  const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 }, font: "12px system-ui, sans-serif" };
  const options = {
    width: holder.clientWidth,
    height: 220,
    scales: { x: { time: false } },
    axes: [{ ...axis }, { ...axis, size: 56 }],
    series: [{ label: data.x }, ...data.lines.map(lineOf)],
    cursor: { drag: { x: false, y: false } },
  };
  holder.replaceChildren();
  const plot = new uPlot(options, [data.steps, ...data.values], holder);
  const wrap = holder.querySelector(".u-wrap");
  wrap.setAttribute("role", "img");
  wrap.setAttribute("aria-label", inWords(data));
  holder.querySelector(".u-legend").setAttribute("role", "presentation");
  return plot;
}

function redraw() {
  for (const chart of charts) chart.plot = draw(chart.holder, chart.data);
}

for (const holder of document.querySelectorAll(".plot")) {
  const data = JSON.parse(holder.nextElementSibling.textContent);
  const chart = { holder, data, plot: draw(holder, data) };
  charts.push(chart);
  new ResizeObserver(() => {
    if (holder.clientWidth !== chart.plot.width) chart.plot.setSize({ width: holder.clientWidth, height: 220 });
  }).observe(holder);
}
dark.addEventListener("change", redraw);
// Paper is white, and print styles are in force once this is called.
window.matchMedia("print").addEventListener("change", redraw);
