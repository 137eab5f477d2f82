// What a page can do beyond being read: choose a part of the training curves, read charts by keyboard, copy
// commands, change between light and dark. Without it everything is still there. No text becomes markup here.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

// Axes.

function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= step * (1 - 1e-9));
}

function linearTicks(low, high, count) {
  const step = roundStep((high - low) / count), ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high * (1 + 1e-9); index++) ticks.push(index * step);
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) ticks.push(factor * 10 ** power);
  const within = ticks.filter((tick) => tick >= low && tick <= high);
  return within.length >= 2 ? within : linearTicks(low, high, count);
}

function tickText(tick, ticks) {
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : Math.abs(tick) || 1;
  return tick.toFixed(Math.min(12, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))));
}

function figure(value) {
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

// Training curves.

class Curves {
  constructor(svg) {
    this.svg = svg;
    this.left = Number(svg.dataset.left);
    this.right = Number(svg.dataset.right);
    this.whole = [Number(svg.dataset.low), Number(svg.dataset.high)];
    this.shown = [...this.whole];
    this.panels = [...svg.querySelectorAll(".panel")].map((group) => ({
      group,
      isLog: group.dataset.axis === "log",
      top: Number(group.dataset.top),
      height: Number(group.dataset.height),
      lines: [...group.querySelectorAll(".line")].map((line) => ({
        line,
        from: Number(line.closest(".pane").getAttribute("x")),
        name: line.dataset.name,
        steps: JSON.parse(line.dataset.steps),
        values: JSON.parse(line.dataset.values),
      })),
    }));
    this.steps = [...new Set(this.panels.flatMap((panel) => panel.lines.flatMap((line) => line.steps)))];
    this.steps.sort((first, second) => first - second);
    this.bottom = Number(svg.querySelector(".steps").dataset.top);
    this.cursor = null;
    this.hair = svg.appendChild(make("line", { class: "hair", y1: 0, y2: this.bottom - 10, visibility: "hidden" }));
    this.band = svg.appendChild(make("rect", { class: "band", y: 0, height: this.bottom - 10, visibility: "hidden" }));
    this.addControls();
    this.listen();
  }

  addControls() {
    const bar = document.createElement("div");
    bar.className = "controls";
    bar.append(
      button("+", "Zoom in", () => this.zoom(0.5)),
      button("−", "Zoom out", () => this.zoom(2)),
      button("◀", "Earlier steps", () => this.pan(-0.25)),
      button("▶", "Later steps", () => this.pan(0.25)),
      button("Whole", "Show all steps", () => this.show(...this.whole)),
    );
    this.readout = document.createElement("output");
    this.readout.textContent = "Drag over the chart to enlarge a part; arrow keys read it step by step.";
    bar.append(this.readout);
    this.svg.closest(".scroll").before(bar);
    this.svg.setAttribute("tabindex", "0");
    this.svg.setAttribute("role", "application");
    this.svg.setAttribute(
      "aria-label",
      "Training curves. Left and right read step by step, plus and minus zoom, page up and down move, zero shows all.",
    );
  }

  listen() {
    const keys = {
      ArrowLeft: () => this.move(-1), ArrowRight: () => this.move(1),
      PageUp: () => this.pan(-0.25), PageDown: () => this.pan(0.25),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
      0: () => this.show(...this.whole), Escape: () => this.show(...this.whole),
      Home: () => this.read(this.within()[0]), End: () => this.read(this.within().at(-1)),
    };
    this.svg.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
      event.preventDefault();
      keys[event.key]();
    });
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => { from = this.stepAt(event); });
    this.svg.addEventListener("pointermove", (event) => {
      const step = this.stepAt(event);
      if (from === null) this.read(this.nearest(step));
      else this.mark(from, step);
    });
    window.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [low, high] = [from, this.stepAt(event)].sort((first, second) => first - second);
      from = null;
      this.band.setAttribute("visibility", "hidden");
      if (this.at(high) - this.at(low) > 8) this.show(low, high);
    });
    this.svg.addEventListener("dblclick", () => this.show(...this.whole));
  }

  at(step) {
    return this.left + (step - this.shown[0]) / (this.shown[1] - this.shown[0]) * (this.right - this.left);
  }

  stepAt(event) {
    const box = this.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * this.svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (x - this.left) / (this.right - this.left)));
    return this.shown[0] + share * (this.shown[1] - this.shown[0]);
  }

  within() {
    const inside = this.steps.filter((step) => step >= this.shown[0] && step <= this.shown[1]);
    return inside.length ? inside : this.steps;
  }

  nearest(step) {
    return this.within().reduce((best, each) => Math.abs(each - step) < Math.abs(best - step) ? each : best);
  }

  move(by) {
    const inside = this.within(), place = inside.indexOf(this.cursor);
    this.read(place < 0 ? inside[by > 0 ? 0 : inside.length - 1]
      : inside[Math.min(inside.length - 1, Math.max(0, place + by))]);
  }

  read(step) {
    this.cursor = step;
    const parts = this.panels.flatMap((panel) => panel.lines).filter((line) => line.steps.includes(step));
    const told = parts.map((line) => `${line.name} ${figure(line.values[line.steps.indexOf(step)])}`);
    this.readout.textContent = `step ${step.toLocaleString("en")}: ${told.join(", ")}`;
    const x = this.at(step);
    this.hair.setAttribute("x1", x);
    this.hair.setAttribute("x2", x);
    this.hair.setAttribute("visibility", x < this.left || x > this.right ? "hidden" : "visible");
  }

  mark(from, to) {
    const [low, high] = [this.at(from), this.at(to)].sort((first, second) => first - second);
    this.band.setAttribute("x", low);
    this.band.setAttribute("width", high - low);
    this.band.setAttribute("visibility", "visible");
  }

  zoom(factor) {
    const centre = this.cursor ?? (this.shown[0] + this.shown[1]) / 2;
    const half = (this.shown[1] - this.shown[0]) / 2 * factor;
    this.show(centre - half, centre + half);
  }

  pan(share) {
    const by = share * (this.shown[1] - this.shown[0]);
    this.show(this.shown[0] + by, this.shown[1] + by);
  }

  show(low, high) {
    const smallest = Math.min(2, this.whole[1] - this.whole[0]);
    const width = Math.min(this.whole[1] - this.whole[0], Math.max(smallest, high - low));
    const start = Math.min(this.whole[1] - width, Math.max(this.whole[0], (low + high - width) / 2));
    this.shown = [start, start + width];
    this.svg.dataset.shown = this.shown.map((each) => each.toFixed(1)).join(" to ");
    for (const panel of this.panels) this.draw(panel);
    this.drawSteps();
    if (this.cursor !== null) this.read(this.cursor);
  }

  extent(panel) {
    const values = panel.lines.flatMap((line) =>
      line.values.filter((_, index) => line.steps[index] >= this.shown[0] && line.steps[index] <= this.shown[1]));
    const all = values.length ? values : panel.lines.flatMap((line) => line.values);
    const low = all.reduce((best, each) => Math.min(best, each)), high = all.reduce((best, each) => Math.max(best, each));
    if (panel.isLog) return [low / 1.1, high * 1.1];
    const air = 0.06 * (high - low) || Math.max(Math.abs(high), 1) * 0.01;
    return [low - air, high + air];
  }

  draw(panel) {
    const [low, high] = this.extent(panel);
    const share = (value) => panel.isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    const y = (value) => panel.height * (1 - share(value));
    const count = panel.height > 150 ? 5 : 3;
    const ticks = panel.isLog ? logTicks(low, high, count) : linearTicks(low, high, count);
    panel.group.querySelector(".ticks").replaceChildren(...ticks.flatMap((tick) => {
      const place = panel.top + y(tick);
      return [
        make("polyline", { class: "grid", points: `${this.left},${place} ${this.right},${place}` }),
        make("text", { class: "tick", x: this.left - 8, y: place, "text-anchor": "end", "dominant-baseline": "central" },
          tickText(tick, ticks)),
      ];
    }));
    for (const { line, from, steps, values } of panel.lines) {
      const places = steps.map((step, index) => [this.at(step) - from, y(values[index])]);
      line.querySelector(".curve").setAttribute("points", places.map((place) => place.join(",")).join(" "));
      line.querySelectorAll("circle").forEach((dot, index) => {
        dot.setAttribute("cx", places[index][0]);
        dot.setAttribute("cy", places[index][1]);
      });
    }
  }

  drawSteps() {
    const ticks = linearTicks(...this.shown, 8).filter((tick) => Number.isInteger(Number(tick.toFixed(6))));
    this.svg.querySelector(".steps").replaceChildren(...ticks.map((tick) =>
      make("text", { class: "tick", x: this.at(tick), y: this.bottom + 4, "text-anchor": "middle",
        "dominant-baseline": "central" }, Math.round(tick).toLocaleString("en"))));
  }
}

// Heat maps and charts of single marks: arrow keys go from mark to mark.

function readMarks(svg) {
  const isMap = svg.dataset.cells === "place";
  const readout = document.createElement("output");
  readout.className = "readout";
  readout.textContent = `Point at a ${isMap ? "cell, or focus the map" : "mark, or focus the chart"} and use the arrow keys.`;
  svg.closest(".scroll").after(readout);
  svg.setAttribute("tabindex", "0");
  const centre = (mark) => {
    const box = mark.getBBox();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const marks = [...svg.querySelectorAll("[aria-label]")];
  if (!isMap) marks.sort((one, other) => centre(one)[0] - centre(other)[0] || centre(one)[1] - centre(other)[1]);
  let current = null;
  const choose = (mark) => {
    if (!mark) return;
    current?.classList.remove("chosen");
    current = mark;
    mark.classList.add("chosen");
    readout.textContent = mark.getAttribute("aria-label");
  };
  const nearest = ([right, down]) => {
    const [x, y] = centre(current);
    const distance = (mark) => {
      const [otherX, otherY] = centre(mark), along = (otherX - x) * right + (otherY - y) * down;
      const across = Math.abs((otherX - x) * down) + Math.abs((otherY - y) * right);
      return along > 0.5 ? along + 4 * across : Infinity;
    };
    const best = marks.reduce((near, mark) => distance(mark) < distance(near) ? mark : near);
    return distance(best) < Infinity ? best : null;
  };
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    if (current === null) choose(marks[0]);
    else choose(isMap ? nearest(way) : marks[marks.indexOf(current) + way[0] + way[1]]);
  });
  svg.addEventListener("pointerover", (event) => { if (marks.includes(event.target)) choose(event.target); });
}

// Commands to copy, and the theme.

async function copy(text, told) {
  try {
    await navigator.clipboard.writeText(text);
    told.textContent = "Copied";
  } catch {
    const range = document.createRange();
    range.selectNodeContents(told.parentElement.querySelector("code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    told.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { told.textContent = "Copy"; }, 2500);
}

function addCopying(pre) {
  const holder = document.createElement("div");
  holder.className = "copied";
  pre.replaceWith(holder);
  const made = button("Copy", "Copy this text", () => copy(pre.textContent, made));
  holder.append(pre, made);
}

function addThemes(place) {
  const themes = ["as the system", "light", "dark"];
  let current = 0;
  const made = button("", "Change between light and dark", () => {
    current = (current + 1) % themes.length;
    document.documentElement.style.colorScheme = current ? themes[current] : "";
    made.textContent = `Theme: ${themes[current]}`;
  });
  made.textContent = `Theme: ${themes[current]}`;
  made.className = "theme";
  place.append(made);
}

document.querySelectorAll("svg[data-curves]").forEach((svg) => new Curves(svg));
document.querySelectorAll("svg[data-cells]").forEach(readMarks);
document.querySelectorAll("pre.copy").forEach(addCopying);
addThemes(document.querySelector("h1"));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
