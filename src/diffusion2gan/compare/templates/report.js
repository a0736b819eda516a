"use strict";
const at = id => document.getElementById(id);
const table = at("grid"), rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells].slice(1);
const names = heads.map(head => head.firstChild.textContent);
const COLOURS = ["#2f7fc1", "#d9622b", "#2a9d6f", "#b663a6", "#c4901c", "#3fa7b5", "#8a6fd1", "#9a7b4f"];
const colour = index => COLOURS[index % COLOURS.length];
const cell = (row, column) => row.cells[column + 1];
const shown = (row, column) => cell(row, column).dataset.off === undefined && cell(row, column).querySelector(".shot");
const visible = () => rows.filter(row => !row.hidden);
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

// filter: a row stays when its prompt holds every word
function filter() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.cells[0].textContent.toLowerCase().includes(word));
  const left = visible().length;
  at("count").textContent = words.length ? `${left} of ${rows.length} prompts` : "";
  at("none").hidden = left > 0;
}
at("filter").addEventListener("input", filter);
document.querySelector(".bar[data-plain]").removeAttribute("data-plain");
filter();

// which systems the grid shows; one at least
const boxes = names.map((name, column) => {
  const box = make("input", {type: "checkbox", checked: true});
  const swatch = make("span", {className: "swatch"});
  swatch.style.setProperty("--colour", colour(column));
  if (names.length > 1) at("systems").append(make("label", {}, box, make("span", {}, swatch, make("bdi", {textContent: name}))));
  return box;
});
at("systems").addEventListener("change", event => {
  if (!boxes.some(box => box.checked)) event.target.checked = true;
  for (const row of [table.tHead.rows[0], ...rows])
    boxes.forEach((box, column) => box.checked ? delete cell(row, column).dataset.off : cell(row, column).dataset.off = "");
  document.documentElement.style.setProperty("--n", boxes.filter(box => box.checked).length);
  fit();
});

// where the grid fits the page, the page scrolls it; where not, it scrolls in its own box
const box = table.parentElement;
const fit = () => box.classList.toggle("fits", table.offsetWidth <= box.clientWidth);
new ResizeObserver(fit).observe(box);
fit();

// hover: the same spot of every system of the row, twice as large
table.addEventListener("pointermove", event => {
  const button = event.pointerType === "mouse" && event.target.closest(".shot");
  if (!button) return;
  const edge = button.getBoundingClientRect(), row = button.closest("tr");
  row.style.setProperty("--x", `${100 * (event.clientX - edge.left) / edge.width}%`);
  row.style.setProperty("--y", `${100 * (event.clientY - edge.top) / edge.height}%`);
});
const zoom = on => event => {
  const row = event.pointerType === "mouse" && event.target.closest(".shot") && event.target.closest("tr");
  if (row) row.classList.toggle("zoomed", on);
};
table.addEventListener("pointerover", zoom(true));
table.addEventListener("pointerout", zoom(false));

// one picture, large: arrows go from system to system and from prompt to prompt, round the ends and past the gaps
const large = at("large"), against = at("against"), frame = at("frame"), split = at("split");
let place = null;
against.append(make("option", {value: "", textContent: "nothing"}));
names.forEach((name, column) => against.append(make("option", {value: column, textContent: name})));
function show(row, column) {
  const picture = shown(row, column).firstElementChild;
  place = {row, column};
  at("large-image").src = picture.src;
  at("large-image").alt = picture.alt;
  at("large-name").textContent = names[column];
  frame.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight || 1);
  const note = heads[column].querySelector(".faint"), size = `${picture.naturalWidth} × ${picture.naturalHeight} px`;
  at("large-size").textContent = note ? `${note.textContent} · ${size}` : size;
  at("large-prompt").textContent = row.cells[0].textContent;
  beside();
  if (!large.open) large.showModal();
}
// before / after: another system's picture of the same prompt over the left part of this one
function beside() {
  const other = against.value === "" ? null : Number(against.value);
  const picture = other !== null && other !== place.column && cell(place.row, other).querySelector("img");
  frame.toggleAttribute("data-split", Boolean(picture));
  if (!picture) return at("other-image").removeAttribute("src");
  at("other-image").src = picture.src;
  at("other-image").alt = picture.alt;
  at("left-name").textContent = names[other];
  at("right-name").textContent = names[place.column];
  slide();
}
const slide = () => frame.style.setProperty("--split", `${split.value}%`);
split.addEventListener("input", slide);
against.addEventListener("change", beside);
at("slide").addEventListener("click", () => {
  const named = word => names.findIndex((name, column) => name.toLowerCase().includes(word) && boxes[column].checked);
  const teacher = Math.max(0, named("teacher"));
  for (const row of visible()) {
    const others = names.map((_, column) => column).filter(column => column !== teacher && shown(row, column));
    if (!others.length || !cell(row, teacher).querySelector("img")) continue;
    against.value = teacher;
    show(row, others.includes(named("student")) ? named("student") : others[0]);
    return split.focus();
  }
});
function step(down, right) {
  const left = visible();
  let row = left.indexOf(place.row), column = place.column;
  do {
    row = (row + down + left.length) % left.length;
    column = (column + right + heads.length) % heads.length;
  } while (!shown(left[row], column));
  show(left[row], column);
}
const arrows = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
table.addEventListener("click", event => {
  const button = event.target.closest(".shot");
  if (button) show(button.closest("tr"), button.closest("td").cellIndex - 1);
});
large.addEventListener("keydown", event => {
  if (!(event.key in arrows) || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target === against || (event.target === split && !event.key.endsWith("Up") && !event.key.endsWith("Down"))) return;
  event.preventDefault();
  step(...arrows[event.key]);
});
large.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button?.dataset.step) step(...button.dataset.step.split(",").map(Number));
  else if (button || event.target === at("large-image")) large.close();
});
large.addEventListener("close", () => {
  against.value = "";
  shown(place.row, place.column).focus();
});

// the numbers behind the page
at("download").href = URL.createObjectURL(new Blob([at("raw").textContent], {type: "application/json"}));

// bars of one metric, and the same against the seconds a picture takes
const chart = JSON.parse(at("chart-data").textContent);
const namespace = at("scatter")?.firstElementChild.namespaceURI;
const brief = number => Number(number.toPrecision(3)).toString();
function svg(tag, attributes, text) {
  const node = document.createElementNS(namespace, tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "--colour") node.style.setProperty(key, value);
    else node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
}
function bars(metric, points) {
  const top = Math.max(...points.map(point => point.span[1]), 0), low = Math.min(...points.map(point => point.span[0]), 0);
  const part = value => 100 * (value - low) / (top - low || 1);
  at("bars").replaceChildren(...points.map(({index, name, value, span}) => {
    const bar = make("i"), track = make("div", {className: "track"}, bar);
    track.style.setProperty("--colour", colour(index));
    bar.style.width = `${part(value)}%`;
    if (span[1] > span[0]) {
      const whisker = make("b");
      whisker.style.left = `${part(span[0])}%`;
      whisker.style.width = `${part(span[1]) - part(span[0])}%`;
      track.append(whisker);
    }
    const text = make("span", {textContent: brief(value) + metric.unit});
    return make("div", {}, make("div", {className: "name"}, make("bdi", {textContent: name}), text), track);
  }));
}
function ticks(low, high) { // 1, 2, 5 × powers of ten, of which the scale shows a few
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const digit of [1, 2, 5]) all.push(digit * 10 ** power);
  const inside = all.filter(tick => tick >= low && tick <= high);
  return inside.length > 6 ? inside.filter(tick => Number.isInteger(Math.round(1e6 * Math.log10(tick)) / 1e6)) : inside;
}
function scatter(metric, points) {
  const [W, H, L, R, T, B] = [480, 290, 52, 14, 14, 40];
  const times = points.map(point => point.seconds), spans = points.flatMap(point => point.span);
  const [t0, t1] = [Math.min(...times) / 1.6, Math.max(...times) * 1.6];
  const room = (Math.max(...spans) - Math.min(...spans)) * 0.12 || Math.abs(spans[0]) * 0.1 || 1;
  const [v0, v1] = [Math.min(...spans) - room, Math.max(...spans) + room];
  const x = seconds => L + (W - L - R) * Math.log(seconds / t0) / Math.log(t1 / t0);
  const y = value => H - B - (H - T - B) * (value - v0) / (v1 - v0);
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": at("scatter-caption").textContent});
  for (const tick of ticks(t0, t1)) {
    root.append(svg("line", {x1: x(tick), x2: x(tick), y1: T, y2: H - B}));
    root.append(svg("text", {class: "faint", x: x(tick), y: H - B + 16, "text-anchor": "middle"}, `${brief(tick)} s`));
  }
  const power = 10 ** Math.floor(Math.log10((v1 - v0) / 3)), pace = power * [1, 2, 5, 10].findLast(n => n * power <= (v1 - v0) / 3);
  for (let value = Math.ceil(v0 / pace) * pace; value <= v1; value += pace) {
    root.append(svg("line", {x1: L, x2: W - R, y1: y(value), y2: y(value)}));
    root.append(svg("text", {class: "faint", x: L - 6, y: y(value) + 4, "text-anchor": "end"}, brief(value)));
  }
  root.append(svg("text", {class: "faint", x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle"}, "seconds a picture"));
  const taken = [];
  for (const {index, name, value, span, seconds} of points) {
    const cx = x(seconds), cy = y(value), paint = {"--colour": colour(index)};
    if (span[1] > span[0]) root.append(svg("line", {class: "whisker", x1: cx, x2: cx, y1: y(span[0]), y2: y(span[1]), ...paint}));
    root.append(svg("circle", {cx, cy, r: 7, ...paint}));
    const right = cx < W * 0.6, text = name.length > 26 ? `${name.slice(0, 25)}…` : name;
    let line = cy + 4; // below the labels already there
    while (taken.some(other => other.right === right && Math.abs(other.line - line) < 15 && Math.abs(other.cx - cx) < 150)) line += 15;
    taken.push({right, line, cx});
    root.append(svg("text", {x: cx + (right ? 12 : -12), y: line, "text-anchor": right ? "start" : "end"}, text));
  }
  at("scatter").replaceChildren(root);
}
function draw() {
  const metric = chart.metrics.find(one => one.key === at("metric").value);
  const points = chart.systems.map(({name, values}, index) => ({index, name, triple: values[metric.key], time: values[chart.time]}))
    .filter(point => point.triple).map(point => ({...point, value: point.triple[0], span: point.triple.slice(1), seconds: point.time?.[0]}));
  const better = `${metric.better} is better`;
  at("bars-caption").textContent = `${metric.title}, ${better}`;
  at("scatter-caption").textContent = `${metric.title} against seconds a picture, ${better} and further left faster`;
  bars(metric, points);
  const timed = points.filter(point => point.seconds > 0);
  at("scatter-figure").hidden = !timed.length || metric.key === chart.time;
  if (!at("scatter-figure").hidden) scatter(metric, timed);
}
const drawn = chart.metrics.filter(metric => chart.systems.some(system => system.values[metric.key]));
if (drawn.length) {
  at("metric").append(...drawn.map(({key, title}) => make("option", {value: key, textContent: title})));
  at("metric").addEventListener("change", draw);
  at("charts").hidden = false;
  draw();
}
