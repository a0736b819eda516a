"use strict";

// ------------------------------------------------------------------------------------- Helpers

const byId = id => document.getElementById(id);

function createElement(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The table of images: a row per prompt; the first column has the prompts, each other one a system
const table = byId("grid");
const rows = [...table.tBodies[0].rows];
const headings = [...table.tHead.rows[0].cells].slice(1);
const names = headings.map(heading => heading.firstChild.textContent);
const getCell = (row, system) => row.cells[system + 1];

const COLOURS = [
  "#2f7fc1", "#d9622b", "#2a9d6f", "#b663a6", "#c4901c", "#3fa7b5", "#8a6fd1", "#9a7b4f",
];
const getColour = system => COLOURS[system % COLOURS.length];

// The button of an image, or a false value if the image is missing or its system hidden
function getShownButton(row, system) {
  const cell = getCell(row, system);
  return cell.dataset.off === undefined && cell.querySelector(".shot");
}

// ------------------------------------------------------------- Filter: prompts with all words

const getVisibleRows = () => rows.filter(row => !row.hidden);

function filterRows() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const prompt = row.cells[0].textContent.toLowerCase();
    row.hidden = !words.every(word => prompt.includes(word));
  }
  const numVisible = getVisibleRows().length;
  byId("count").textContent = words.length ? `${numVisible} of ${rows.length} prompts` : "";
  byId("none").hidden = numVisible > 0;
}

byId("filter").addEventListener("input", filterRows);
document.querySelector(".bar[data-plain]").removeAttribute("data-plain");
filterRows();

// ---------------------------------------------------- Check boxes: which systems are shown

const boxes = names.map((name, system) => {
  const box = createElement("input", {type: "checkbox", checked: true});
  const swatch = createElement("span", {className: "swatch"});
  swatch.style.setProperty("--colour", getColour(system));
  const text = createElement("span", {}, swatch, createElement("bdi", {textContent: name}));
  if (names.length > 1) byId("systems").append(createElement("label", {}, box, text));
  return box;
});

byId("systems").addEventListener("change", event => {
  // At least one system stays
  if (!boxes.some(box => box.checked)) event.target.checked = true;

  for (const row of [table.tHead.rows[0], ...rows]) {
    boxes.forEach((box, system) => {
      const cell = getCell(row, system);
      if (box.checked) delete cell.dataset.off;
      else cell.dataset.off = "";
    });
  }
  const numShown = boxes.filter(box => box.checked).length;
  document.documentElement.style.setProperty("--n", numShown);
  updateScrolling();
});

// A table that fits scrolls with the page, a wider one in its box
const tableBox = table.parentElement;

function updateScrolling() {
  tableBox.classList.toggle("fits", table.offsetWidth <= tableBox.clientWidth);
}

new ResizeObserver(updateScrolling).observe(tableBox);
updateScrolling();

// --------------- Mouse: zoom into the same position of every image of the row, twice as large

table.addEventListener("pointermove", event => {
  const button = event.pointerType === "mouse" && event.target.closest(".shot");
  if (!button) return;
  const bounds = button.getBoundingClientRect();
  const row = button.closest("tr");
  row.style.setProperty("--x", `${100 * (event.clientX - bounds.left) / bounds.width}%`);
  row.style.setProperty("--y", `${100 * (event.clientY - bounds.top) / bounds.height}%`);
});

function setZoom(event, isZoomed) {
  if (event.pointerType !== "mouse" || !event.target.closest(".shot")) return;
  event.target.closest("tr").classList.toggle("zoomed", isZoomed);
}

table.addEventListener("pointerover", event => setZoom(event, true));
table.addEventListener("pointerout", event => setZoom(event, false));

// ------------------------------------------------------------------ Dialog: one image, large

const dialog = byId("large");
const against = byId("against");
const frame = byId("frame");
const split = byId("split");
let current = null; // the row and system that are shown

against.append(createElement("option", {value: "", textContent: "nothing"}));
names.forEach((name, system) => {
  against.append(createElement("option", {value: system, textContent: name}));
});

function showLarge(row, system) {
  current = {row, system};

  // Image
  const image = getShownButton(row, system).firstElementChild;
  byId("large-image").src = image.src;
  byId("large-image").alt = image.alt;
  frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight || 1);

  // Texts
  const note = headings[system].querySelector(".faint");
  const size = `${image.naturalWidth} × ${image.naturalHeight} px`;
  byId("large-name").textContent = names[system];
  byId("large-size").textContent = note ? `${note.textContent} · ${size}` : size;
  byId("large-prompt").textContent = row.cells[0].textContent;

  updateSlider();
  if (!dialog.open) dialog.showModal();
}

// Slider: another system's image of the same prompt covers the left part of this one
function updateSlider() {
  const other = against.value === "" ? null : Number(against.value);
  const isDifferent = other !== null && other !== current.system;
  const image = isDifferent && getCell(current.row, other).querySelector("img");
  frame.toggleAttribute("data-split", Boolean(image));
  if (!image) {
    byId("other-image").removeAttribute("src");
    return;
  }
  byId("other-image").src = image.src;
  byId("other-image").alt = image.alt;
  byId("left-name").textContent = names[other];
  byId("right-name").textContent = names[current.system];
  moveDivider();
}

function moveDivider() {
  frame.style.setProperty("--split", `${split.value}%`);
}

split.addEventListener("input", moveDivider);
against.addEventListener("change", updateSlider);

// The slider view opens with the teacher on the left, if a system is called that, and the student
byId("slide").addEventListener("click", () => {
  const findSystem = word => names.findIndex(
    (name, system) => name.toLowerCase().includes(word) && boxes[system].checked
  );
  const teacher = Math.max(0, findSystem("teacher"));
  const student = findSystem("student");

  // The first prompt of which both have an image
  for (const row of getVisibleRows()) {
    const others = names.map((_, system) => system)
      .filter(system => system !== teacher && getShownButton(row, system));
    if (!others.length || !getCell(row, teacher).querySelector("img")) continue;
    against.value = teacher;
    showLarge(row, others.includes(student) ? student : others[0]);
    split.focus();
    return;
  }
});

// Moves to a neighbouring prompt or system; wraps around, and skips missing images
function step(down, right) {
  const visible = getVisibleRows();
  let row = visible.indexOf(current.row);
  let system = current.system;
  do {
    row = (row + down + visible.length) % visible.length;
    system = (system + right + headings.length) % headings.length;
  } while (!getShownButton(visible[row], system));
  showLarge(visible[row], system);
}

const ARROWS = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
};

table.addEventListener("click", event => {
  const button = event.target.closest(".shot");
  if (button) showLarge(button.closest("tr"), button.closest("td").cellIndex - 1);
});

dialog.addEventListener("keydown", event => {
  if (!(event.key in ARROWS) || event.altKey || event.ctrlKey || event.metaKey) return;

  // The list of systems uses all arrow keys, the slider those to the left and right
  const isVertical = event.key === "ArrowUp" || event.key === "ArrowDown";
  if (event.target === against || (event.target === split && !isVertical)) return;
  event.preventDefault();
  step(...ARROWS[event.key]);
});

dialog.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button?.dataset.step) step(...button.dataset.step.split(",").map(Number));
  else if (button || event.target === byId("large-image")) dialog.close();
});

dialog.addEventListener("close", () => {
  against.value = "";
  getShownButton(current.row, current.system).focus();
});

// ------------------------------------------------------------------- Download: the data as JSON

const json = new Blob([byId("raw").textContent], {type: "application/json"});
byId("download").href = URL.createObjectURL(json);

// --------------------------- Charts: bars of one metric, and the metric versus time per image

const chart = JSON.parse(byId("chart-data").textContent);
const svgNamespace = byId("scatter")?.firstElementChild.namespaceURI;
const formatNumber = number => Number(number.toPrecision(3)).toString();

function createSvg(tag, attributes, text) {
  const node = document.createElementNS(svgNamespace, tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "--colour") node.style.setProperty(key, value);
    else node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
}

function createBar(metric, point, toPercent) {
  const {system, name, value, interval: [low, high]} = point;
  const bar = createElement("i");
  bar.style.width = `${toPercent(value)}%`;
  const track = createElement("div", {className: "track"}, bar);
  track.style.setProperty("--colour", getColour(system));

  if (high > low) {
    const whisker = createElement("b");
    whisker.style.left = `${toPercent(low)}%`;
    whisker.style.width = `${toPercent(high) - toPercent(low)}%`;
    track.append(whisker);
  }

  const nameText = createElement("bdi", {textContent: name});
  const valueText = createElement("span", {textContent: formatNumber(value) + metric.unit});
  const label = createElement("div", {className: "name"}, nameText, valueText);
  return createElement("div", {}, label, track);
}

function drawBars(metric, points) {
  // From the lowest to the highest end of all intervals, and always including zero
  const low = Math.min(...points.map(point => point.interval[0]), 0);
  const high = Math.max(...points.map(point => point.interval[1]), 0);
  const toPercent = value => 100 * (value - low) / (high - low || 1);
  byId("bars").replaceChildren(...points.map(point => createBar(metric, point, toPercent)));
}

// Ticks of a logarithmic axis: 1, 2, 5 × powers of ten, or only the powers if these are many
function computeLogTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
  }
  const inside = ticks.filter(tick => tick >= low && tick <= high);
  if (inside.length <= 6) return inside;
  return inside.filter(tick => Number.isInteger(Math.round(1e6 * Math.log10(tick)) / 1e6));
}

// Ticks of a linear axis: about three, at multiples of 1, 2, 5 × a power of ten
function computeLinearTicks(low, high) {
  const target = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(target));
  const spacing = power * [1, 2, 5, 10].findLast(n => n * power <= target);
  const ticks = [];
  for (let tick = Math.ceil(low / spacing) * spacing; tick <= high; tick += spacing) {
    ticks.push(tick);
  }
  return ticks;
}

function drawScatter(metric, points) {
  const width = 480, height = 290;
  const left = 52, right = width - 14, top = 14, bottom = height - 40;

  // Scales: logarithmic time, and a linear metric with 12 % more room than its intervals need
  const times = points.map(point => point.seconds);
  const minTime = Math.min(...times) / 1.6, maxTime = Math.max(...times) * 1.6;
  const ends = points.flatMap(point => point.interval);
  const range = Math.max(...ends) - Math.min(...ends);
  const room = range * 0.12 || Math.abs(ends[0]) * 0.1 || 1;
  const low = Math.min(...ends) - room, high = Math.max(...ends) + room;
  const logRange = Math.log(maxTime / minTime);
  const toX = time => left + (right - left) * Math.log(time / minTime) / logRange;
  const toY = value => bottom - (bottom - top) * (value - low) / (high - low);

  const root = createSvg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": byId("scatter-caption").textContent,
  });
  const addLine = (x1, x2, y1, y2, more = {}) => {
    root.append(createSvg("line", {x1, x2, y1, y2, ...more}));
  };
  const addText = (x, y, anchor, text, more = {}) => {
    root.append(createSvg("text", {x, y, "text-anchor": anchor, ...more}, text));
  };

  // Axes
  for (const time of computeLogTicks(minTime, maxTime)) {
    addLine(toX(time), toX(time), top, bottom);
    addText(toX(time), bottom + 16, "middle", `${formatNumber(time)} s`, {class: "faint"});
  }
  for (const value of computeLinearTicks(low, high)) {
    addLine(left, right, toY(value), toY(value));
    addText(left - 6, toY(value) + 4, "end", formatNumber(value), {class: "faint"});
  }
  addText((left + right) / 2, height - 6, "middle", "seconds per image", {class: "faint"});

  // Dots and intervals first: the labels avoid them
  byId("scatter").replaceChildren(root);
  const taken = [];
  const dots = points.map(({system, interval, value, seconds}) => {
    const x = toX(seconds), y = toY(value), style = {"--colour": getColour(system)};
    if (interval[1] > interval[0]) {
      addLine(x, x, toY(interval[0]), toY(interval[1]), {class: "whisker", ...style});
    }
    root.append(createSvg("circle", {cx: x, cy: y, r: 7, ...style}));
    taken.push({left: x - 8, right: x + 8, top: y - 8, bottom: y + 8});
    return {x, y};
  });

  // Each label at the nearest free position beside its dot, with a line to it if it is not next to it
  points.forEach(({name}, index) => {
    const {x, y} = dots[index];
    const text = name.length > 26 ? `${name.slice(0, 25)}…` : name;
    const label = createSvg("text", {x: 0, y: 0}, text);
    root.append(label);
    const length = label.getComputedTextLength();
    const place = findFreePlace(x, y, length, taken, {left, width, bottom});
    taken.push(place);
    label.setAttribute("x", place.left);
    label.setAttribute("y", place.bottom - 4);
    if (Math.abs(place.bottom - 8 - y) > 4) {
      const end = place.left > x ? place.left - 2 : place.right + 2;
      root.insertBefore(
        createSvg("line", {x1: x, y1: y, x2: end, y2: place.bottom - 8, class: "leader"}),
        root.querySelector("circle"),
      );
    }
  });
}

// The box of a label near a dot that covers no other label or dot and is inside the chart
function findFreePlace(x, y, length, taken, {left: start, width, bottom}) {
  const isFree = box =>
    box.left >= start && box.right <= width && box.top >= 0 && box.bottom <= bottom &&
    !taken.some(other =>
      box.left < other.right && other.left < box.right &&
      box.top < other.bottom && other.top < box.bottom);
  let first = null;
  for (let step = 0; step < 40; step++) {
    // 0, 8 down, 8 up, 16 down, …
    const shift = 8 * Math.ceil(step / 2) * (step % 2 ? 1 : -1);
    for (const left of [x + 12, x - 12 - length]) {
      const box = {left, right: left + length, top: y + shift - 8, bottom: y + shift + 8};
      first ??= box;
      if (isFree(box)) return box;
    }
  }
  return first;
}

function drawCharts() {
  // The systems that have this metric
  const metric = chart.metrics.find(candidate => candidate.key === byId("metric").value);
  const points = [];
  chart.systems.forEach(({name, values}, system) => {
    const point = values[metric.key];
    if (!point) return;
    const [value, low, high] = point;
    points.push({system, name, value, interval: [low, high], seconds: values[chart.time]?.[0]});
  });

  const better = `${metric.better} is better`;
  byId("bars-caption").textContent = `${metric.title} (${better})`;
  drawBars(metric, points);

  // Time itself, and systems without a time, have no scatter plot
  byId("scatter-caption").textContent =
    `${metric.title} (${better}) versus time per image (further left is faster)`;
  const timed = points.filter(point => point.seconds > 0);
  const hasScatter = timed.length > 0 && metric.key !== chart.time;
  byId("scatter-figure").hidden = !hasScatter;
  if (hasScatter) drawScatter(metric, timed);
}

const chartMetrics = chart.metrics.filter(
  metric => chart.systems.some(system => system.values[metric.key])
);
if (chartMetrics.length) {
  byId("metric").append(...chartMetrics.map(
    ({key, title}) => createElement("option", {value: key, textContent: title})
  ));
  byId("metric").addEventListener("change", drawCharts);
  byId("charts").hidden = false;
  drawCharts();
}
