"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  const specs = {};
  let mesh = null;
  window.brainalign = {
    figure(id, spec) { specs[id] = spec; },
    mesh(record) { mesh = record; },
  };

  const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const narrow = (width) => width < 520;

  // --- Files of the report, one at a time and each once -----------------------------------------

  const loading = {};
  function load(source) {
    loading[source] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = source;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${source} is missing beside this page`));
      document.head.append(script);
    });
    return loading[source];
  }
  const need = async (id) => {
    await Promise.all([load("assets/plotly.min.js"), load(`assets/figures/${id}.js`)]);
    return specs[id];
  };

  function unpack(text, Type) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Type(bytes.buffer);
  }

  // --- Theme ------------------------------------------------------------------------------------

  // "$c0/0.4" is the theme's first series colour, 40 % opaque; only colours are looked up.
  function colour(text) {
    const [name, opacity] = text.slice(1).split("/");
    const hex = css(`--${name}`);
    if (!opacity) return hex;
    const part = (i) => parseInt(hex.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }
  function themed(value, key = "") {
    if (typeof value === "string") {
      return /color$/.test(key) && value.startsWith("$") ? colour(value) : value;
    }
    if (Array.isArray(value)) {
      return value.length && typeof value[0] === "object" && !Array.isArray(value[0])
        ? value.map((v) => themed(v, key)) : value;
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, k)]));
    }
    return value;
  }

  // Plotly reads a few entities, so text comes escaped; it is cut between characters.
  function short(text, most) {
    const plain = text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    const letters = [...plain];
    if (letters.length <= most) return text;
    const head = Math.ceil((most - 1) * 0.6);
    const cut = letters.slice(0, head).join("") + "…" + letters.slice(head + 1 - most).join("");
    return cut.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function layoutOf(spec, width) {
    const small = narrow(width);
    const layout = themed(spec.layout);
    for (const name of ["xaxis", "yaxis"]) {
      const axis = layout[name] ?? {};
      if (axis.ticktext) {
        const upright = name === "yaxis";
        const most = upright ? Math.max(12, Math.min(40, Math.floor(width * 0.045))) : 18;
        axis.ticktext = axis.ticktext.map((t) => short(t, most));
        // Slanted labels end at their tick, so that none leaves the page at the right.
        const room = (width - 90) / axis.ticktext.length;
        if (!upright) axis.tickangle = axis.ticktext.some((t) => t.length * 7 > room - 4) ? -40 : 0;
      }
      layout[name] = {
        automargin: true, gridcolor: css("--line"), zerolinecolor: css("--line"),
        linecolor: css("--line"), tickcolor: css("--line"), ticks: axis.ticktext ? "" : "outside",
        ...axis, title: { standoff: 10, ...axis.title },
      };
    }
    const { legend, ...rest } = layout;
    return {
      width, height: spec.square ? Math.min(spec.height, width + 90) : spec.height, margin: { l: 52, r: 14, t: 14, b: 46 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: small ? 11 : 12.5, color: css("--text") },
      legend: { ...legend, orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: small ? 11 : 12 } },
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--muted"), font: { color: css("--text"), size: 12.5 }, align: "left" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...rest,
    };
  }
  const config = { displayModeBar: false, showTips: false, doubleClick: "reset" };

  // --- Plots ------------------------------------------------------------------------------------

  const drawPlot = async (box) => putPlot(box, await need(box.dataset.figure), box.clientWidth);

  async function putPlot(box, spec, width) {
    const data = themed(spec.data).map((trace) => ({ ...trace }));
    const layout = layoutOf(spec, width);
    for (const trace of data) {
      if (trace.type !== "heatmap") continue;
      if (narrow(width)) {
        trace.colorbar = { ...trace.colorbar, orientation: "h", x: 0.5, xanchor: "center", y: 1.02, yanchor: "bottom", len: 0.9, thickness: 10, title: { ...trace.colorbar.title, side: "top" } };
      }
    }
    if (spec.columns && (width - 130) / spec.columns < 30) data.splice(1, 1);
    $$(".wait", box).forEach((e) => e.remove());
    // Anew, not `react`: that leaves the words of a colour bar in the last theme's colour.
    await Plotly.newPlot(box, data, layout, config);
    box.style.minHeight = "";
  }

  // --- Dissimilarity matrices -------------------------------------------------------------------

  async function drawMatrices(box) {
    const spec = await need(box.dataset.figure);
    const bar = box.querySelector(".bar");
    if (!bar.children.length) {
      const ramp = document.createElement("span");
      ramp.className = "ramp";
      ramp.style.background = `linear-gradient(to right,${spec.colorscale.map((c) => c[1]).join(",")})`;
      const word = (text, name) => Object.assign(document.createElement("span"), { textContent: text, className: name });
      const ends = spec.panels[0].limits.map((v) => String(Number(v.toPrecision(3))));
      const same = spec.panels.every((p) => String(p.limits) === String(spec.panels[0].limits));
      bar.append(word(same ? ends[0] : "low", "num"), ramp, word(same ? ends[1] : "high", "num"), word(spec.title, "what"));
    }
    await Promise.all($$(".matrix", box).map((place, i) => drawMatrix(box, spec, spec.panels[i], place)));
  }

  async function drawMatrix(box, spec, panel, place) {
    const width = place.clientWidth;
    const n = spec.n;
    // Staggered in `rows` rows, a thumbnail is as wide as `rows` cells.
    const rows = spec.strip ? spec.strip.rows : 0;
    let edge = 4;
    let cell = (width - edge - 6) / n;
    const strip = rows && cell * rows >= 9;
    if (strip) {
      cell = (width - 8) / (n + rows * rows + (rows - 1) / 2);
      edge = cell * rows * rows + 3;
    }
    const groups = spec.groups ?? [];
    const side = width - edge - 6 - (strip ? cell * (rows - 1) / 2 : 0);
    const names = groups.map((g) => short(g.label, 14));
    const slanted = groups.some((g, i) => names[i].length * 7 > (g.to - g.from) * side / n);
    const foot = !groups.length ? 8 : slanted ? 16 + Math.max(...names.map((t) => t.length)) * 5 : 24;
    const middle = groups.map((g) => (g.from + g.to - 1) / 2);
    const lines = groups.slice(1).flatMap((g) => [
      { type: "line", x0: g.from - 0.5, x1: g.from - 0.5, y0: -0.5, y1: n - 0.5, line: { color: "#fff", width: 1.4 } },
      { type: "line", y0: g.from - 0.5, y1: g.from - 0.5, x0: -0.5, x1: n - 0.5, line: { color: "#fff", width: 1.4 } },
    ]);
    const over = (rows - 1) / 2 / n;
    const images = strip ? [
      { source: spec.strip.x, xref: "paper", yref: "paper", x: -over, y: 1 + 3 / side, xanchor: "left", yanchor: "bottom", sizex: 1 + 2 * over, sizey: rows * rows / n, sizing: "stretch" },
      { source: spec.strip.y, xref: "paper", yref: "paper", x: -3 / side, y: 1 + over, xanchor: "right", yanchor: "top", sizex: rows * rows / n, sizey: 1 + 2 * over, sizing: "stretch" },
    ] : [];
    const axis = { showgrid: false, zeroline: false, fixedrange: true, ticks: "" };
    const layout = {
      width, height: side + edge + foot + (strip ? 4 : 0), shapes: lines, images,
      margin: { l: edge, t: edge, r: width - side - edge, b: foot, pad: 0 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: css("--soft"), dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: css("--text") },
      xaxis: { ...axis, range: [-0.5, n - 0.5], tickvals: middle, ticktext: names, showticklabels: groups.length > 0, tickangle: slanted ? -40 : 0 },
      yaxis: { ...axis, range: [n - 0.5, -0.5], showticklabels: false },
    };
    const trace = { type: "heatmap", z: panel.z, zmin: panel.limits[0], zmax: panel.limits[1], colorscale: spec.colorscale, showscale: false, hoverinfo: "none" };
    await Plotly.react(place, [trace], layout, config);
    place.style.minHeight = "";
    if (place.dataset.ready || !panel.values) return;
    place.dataset.ready = "yes";
    const values = unpack(panel.values.bdata, Float32Array);
    place.on("plotly_hover", (event) => {
      const { x, y } = event.points[0];
      tell(box, spec, place, [y, x], values[y * n + x], event.event);
    });
    place.on("plotly_unhover", () => { box.querySelector(".tip").hidden = true; });
  }

  function tell(box, spec, place, pair, value, pointer) {
    const tip = box.querySelector(".tip");
    const plain = (text) => text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    tip.replaceChildren();
    const both = document.createElement("div");
    both.className = "pair";
    for (const i of pair) {
      const one = document.createElement("div");
      if (spec.files[i]) {
        const image = document.createElement("img");
        image.src = `assets/images/${spec.files[i]}`;
        image.alt = "";
        one.append(image);
      }
      one.append(plain(spec.labels[i] ?? String(i)));
      both.append(one);
    }
    const line = document.createElement("p");
    line.textContent = `dissimilarity ${Number.isFinite(value) ? Number(value.toPrecision(3)) : "–"}`;
    tip.append(both, line);
    tip.hidden = false;
    const frame = box.getBoundingClientRect();
    const x = pointer.clientX - frame.left, y = pointer.clientY - frame.top;
    tip.style.left = `${Math.max(0, Math.min(x + 14, frame.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y + 16 + tip.offsetHeight > frame.height ? Math.max(0, y - tip.offsetHeight - 12) : y + 16}px`;
  }

  // --- Cortex -----------------------------------------------------------------------------------

  let hemispheres = null;
  function geometry() {
    if (hemispheres) return hemispheres;
    hemispheres = {};
    for (const side of ["L", "R"]) {
      const xyz = unpack(mesh.xyz[side], Int16Array);
      const faces = unpack(mesh.faces[side], Uint16Array);
      const n = mesh.n;
      const part = { x: new Float32Array(n), y: new Float32Array(n), z: new Float32Array(n) };
      const shift = side === "L" ? -44 : 44;
      for (let v = 0; v < n; v++) {
        part.x[v] = xyz[3 * v] / 10 + shift;
        part.y[v] = xyz[3 * v + 1] / 10;
        part.z[v] = xyz[3 * v + 2] / 10;
      }
      const corner = (c) => Uint16Array.from({ length: faces.length / 3 }, (_, f) => faces[3 * f + c]);
      hemispheres[side] = { ...part, i: corner(0), j: corner(1), k: corner(2), sulcus: unpack(mesh.sulcus[side], Uint8Array) };
    }
    return hemispheres;
  }

  const views = {
    "back": { eye: [0, -2, -0.4], up: [0, 0, 1], show: "LR" },
    "ventral": { eye: [0, -0.01, -2], up: [0, 1, 0], show: "LR" },
    "dorsal": { eye: [0, -0.01, 2], up: [0, 1, 0], show: "LR" },
    "left": { eye: [-2, 0, 0], up: [0, 0, 1], show: "L" },
    "left-medial": { eye: [2, 0, 0], up: [0, 0, 1], show: "L" },
    "right-medial": { eye: [-2, 0, 0], up: [0, 0, 1], show: "R" },
    "right": { eye: [2, 0, 0], up: [0, 0, 1], show: "R" },
  };
  // With parallel projection only the box's size scales the picture: half the height is one unit.
  const span = { x: 180, y: 218, z: 150 };
  function box3d(view, place, zoom) {
    const across = /left|right/.test(view) ? span.y : span.x;
    const along = /ventral|dorsal/.test(view) ? span.y : span.z;
    const { clientWidth: width, clientHeight: height } = place;
    const scale = zoom * Math.min(1.8 / along, 1.8 * width / height / across);
    return { x: span.x * scale, y: span.y * scale, z: span.z * scale };
  }
  const camera = (view) => {
    const [x, y, z] = views[view].eye, [a, b, c] = views[view].up;
    return { eye: { x, y, z }, up: { x: a, y: b, z: c }, center: { x: 0, y: 0, z: 0 }, projection: { type: "orthographic" } };
  };

  function paint(spec, index, side) {
    const map = spec.maps[index], part = geometry()[side];
    const steps = unpack(map.values[side].steps, Uint16Array);
    const low = Number(map.values[side].low), step = Number(map.values[side].step);
    const table = unpack(map.table, Uint8Array), last = table.length / 3 - 1;
    const roi = spec.roi ? unpack(spec.roi[side], Uint16Array) : null;
    const vertexcolor = new Array(steps.length), text = new Array(steps.length);
    for (let v = 0; v < steps.length; v++) {
      const where = roi && roi[v] ? `${spec.rois[roi[v] - 1]}<br>` : "";
      if (steps[v] === 65535) {
        const grey = Math.round(205 - 50 * part.sulcus[v] / 255);
        vertexcolor[v] = `rgb(${grey},${grey},${grey})`;
        text[v] = `${where}no value`;
      } else {
        const value = low + step * steps[v];
        const at = 3 * Math.round(Math.min(1, Math.max(0, (value - map.low) / (map.high - map.low))) * last);
        vertexcolor[v] = `rgb(${table[at]},${table[at + 1]},${table[at + 2]})`;
        text[v] = where + (map.labels ? map.labels[Math.round(value)] : `${map.name}: ${Number(value.toPrecision(3))}`);
      }
    }
    return { vertexcolor, text };
  }

  const hasWebGL = (() => {
    let answer = null;
    return () => (answer ??= Boolean(document.createElement("canvas").getContext("webgl")));
  })();
  // Browsers keep about sixteen WebGL contexts; the plots longest out of sight give theirs back.
  const live = [];

  async function drawCortex(box) {
    const place = box.querySelector(".plot3d");
    if (!hasWebGL()) {
      place.querySelector(".wait").textContent = "This browser has no WebGL; the picture above shows the same map.";
      place.style.height = "auto";
      return;
    }
    const [spec] = await Promise.all([need(box.dataset.figure), load("assets/mesh.js")]);
    const index = Number(box.dataset.map ?? 0);
    const view = box.dataset.view ?? "back";
    const traces = ["L", "R"].map((side) => {
      const { x, y, z, i, j, k } = geometry()[side];
      return {
        type: "mesh3d", x, y, z, i, j, k, ...paint(spec, index, side), hoverinfo: "text",
        name: side === "L" ? "left" : "right", visible: views[view].show.includes(side),
        lighting: { ambient: 0.82, diffuse: 0.65, specular: 0.06, roughness: 0.85, fresnel: 0.05 },
        lightposition: { x: -600, y: -2500, z: 2600 },
      };
    });
    const hidden = (axis) => ({ visible: false, showspikes: false, range: [-span[axis] / 2, span[axis] / 2] });
    const layout = {
      width: place.clientWidth, height: place.clientHeight, margin: { l: 0, r: 0, t: 0, b: 0 },
      paper_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--muted"), font: { color: css("--text"), size: 12.5 } },
      scene: { xaxis: hidden("x"), yaxis: hidden("y"), zaxis: hidden("z"), aspectmode: "manual", aspectratio: box3d(view, place, box.zoom ?? 1), dragmode: "orbit", camera: box.camera ?? camera(view), bgcolor: "rgba(0,0,0,0)" },
    };
    $$(".wait", place).forEach((e) => e.remove());
    await Plotly.react(place, traces, layout, { ...config, scrollZoom: false });
    if (!live.includes(box)) live.push(box);
    while (live.length > 6) {
      const old = live.shift();
      const its = old.querySelector(".plot3d");
      old.camera = its.layout?.scene.camera;
      Plotly.purge(its);
      drawn.delete(old);
      seen.observe(old);
    }
  }

  function turn(box, key) {
    const place = box.querySelector(".plot3d");
    if (!place.layout) return false;
    const now = place.layout.scene.camera;
    const { x, y, z } = now.eye;
    const step = Math.PI / 18, size = Math.hypot(x, y, z);
    let around = Math.atan2(y, x), above = Math.asin(z / size), zoom = box.zoom ?? 1;
    if (key === "ArrowLeft") around -= step;
    else if (key === "ArrowRight") around += step;
    else if (key === "ArrowUp") above = Math.min(above + step, 1.55);
    else if (key === "ArrowDown") above = Math.max(above - step, -1.55);
    else if (key === "+" || key === "=") zoom *= 1.15;
    else if (key === "-") zoom /= 1.15;
    else return false;
    const eye = { x: size * Math.cos(above) * Math.cos(around), y: size * Math.cos(above) * Math.sin(around), z: size * Math.sin(above) };
    const changes = { "scene.aspectratio": box3d(box.dataset.view ?? "back", place, zoom) };
    if (zoom === (box.zoom ?? 1)) changes["scene.camera"] = { ...now, eye, up: { x: 0, y: 0, z: 1 } };
    box.zoom = zoom;
    Plotly.relayout(place, changes);
    return true;
  }

  function choose(box, name, value) {
    box.dataset[name] = value;
    if (name === "map") {
      $$("[data-map]", box).forEach((e) => e.classList.toggle("on", e.dataset.map === value));
    } else {
      box.camera = null;
      box.zoom = 1;
      $$("[data-action=view]", box).forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.view === value)));
    }
    const place = box.querySelector(".plot3d");
    if (name === "map" && place.layout) box.camera = place.layout.scene.camera;
    if (drawn.has(box)) draw(box);
  }
  // A browser that goes back to a page remembers the choice; the page begins with the first map.
  $$(".surface [data-map='0']").forEach((e) => e.classList.add("on"));
  $$(".surface select").forEach((select) => { select.selectedIndex = 0; });

  // --- Long tables ------------------------------------------------------------------------------

  const types = { f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
  const rowsOfPage = 50;

  // As the page's other numbers: three figures, a true minus sign, no long tails.
  function figures(value) {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e7)) {
      const [mantissa, power] = value.toExponential(1).split("e");
      const raised = [...String(Number(power))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
      return `${mantissa}×10${raised}`.replace("-", "−");
    }
    const decimals = Number.isInteger(value) ? 0 : size < 1 ? 3 : size < 10 ? 2 : size < 1000 ? 1 : 0;
    return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }).replace("-", "−");
  }

  async function openTable(box) {
    if (box.state) return;
    const id = box.dataset.figure;
    await load(`assets/figures/${id}.js`);
    const { rows, columns } = specs[id];
    delete specs[id];
    for (const column of columns) {
      column.values = unpack(column.bdata, types[column.dtype]);
      delete column.bdata;
      column.words = column.words?.split("\n");
      column.lower = column.words?.map((w) => w.toLowerCase());
    }
    box.state = { rows, columns, page: 0, sorted: null, order: null, found: Uint32Array.from({ length: rows }, (_, i) => i) };
    box.classList.add("ready");
    $$("thead th", box).forEach((th, i) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: th.textContent });
      button.dataset.action = "sort";
      button.dataset.column = i;
      th.replaceChildren(button);
    });
    showPage(box);
    if (box.querySelector("input").value) findRows(box);
  }

  // Every word must stand in some column of text. Each distinct text is looked at once.
  function findRows(box) {
    const { rows, columns, order } = box.state;
    const terms = box.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const hit = new Uint8Array(rows).fill(1);
    for (const term of terms) {
      const has = new Uint8Array(rows);
      for (const { lower, values } of columns) {
        if (!lower) continue;
        const match = Uint8Array.from(lower, (w) => w.includes(term));
        if (match.includes(1)) for (let i = 0; i < rows; i++) has[i] |= match[values[i]];
      }
      for (let i = 0; i < rows; i++) hit[i] &= has[i];
    }
    const found = new Uint32Array(rows);
    let n = 0;
    for (let i = 0; i < rows; i++) {
      const row = order ? order[i] : i;
      if (hit[row]) found[n++] = row;
    }
    Object.assign(box.state, { found: found.subarray(0, n), page: 0 });
    showPage(box);
  }

  // By number or by text, up and then down; what has no value is last either way.
  function sortRows(box, at) {
    const { state } = box;
    const down = state.sorted?.at === at && !state.sorted.down;
    const column = state.columns[at];
    let key = column.values;
    if (column.words) {
      const ranks = new Uint32Array(column.words.length);
      const ranked = Uint32Array.from(ranks.keys()).sort((a, b) => (column.lower[a] < column.lower[b] ? -1 : column.lower[a] > column.lower[b] ? 1 : 0));
      ranked.forEach((word, rank) => { ranks[word] = rank; });
      key = Uint32Array.from(column.values, (code) => ranks[code]);
    }
    const sign = down ? -1 : 1;
    state.order = Uint32Array.from({ length: state.rows }, (_, i) => i).sort((a, b) => {
      const x = key[a], y = key[b];
      if (x === y) return a - b;
      if (x !== x || y !== y) return x !== x ? (y !== y ? a - b : 1) : -1;
      return sign * (x < y ? -1 : 1);
    });
    state.sorted = { at, down };
    $$("thead th", box).forEach((th, i) => {
      if (i === at) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    findRows(box);
  }

  function showPage(box) {
    const { columns, found, rows } = box.state;
    const last = Math.max(0, Math.ceil(found.length / rowsOfPage) - 1);
    const page = box.state.page = Math.min(Math.max(0, box.state.page), last);
    const shown = found.subarray(page * rowsOfPage, (page + 1) * rowsOfPage);
    box.querySelector("tbody").replaceChildren(...Array.from(shown, (row) => {
      const tr = document.createElement("tr");
      for (const { words, values } of columns) {
        const td = document.createElement("td");
        td.dir = "auto";
        td.textContent = words ? words[values[row]] : figures(values[row]);
        if (!words) td.className = "num";
        tr.append(td);
      }
      return tr;
    }));
    const whole = (n) => n.toLocaleString("en-US");
    box.querySelector(".count").textContent = found.length === rows ? "" : `${whole(found.length)} of ${whole(rows)} rows`;
    const first = page * rowsOfPage + 1;
    box.querySelector(".where").textContent = found.length ? `${whole(first)} to ${whole(first + shown.length - 1)} of ${whole(found.length)}` : "no row";
    for (const button of $$("[data-action=page]", box)) {
      button.disabled = /first|previous/.test(button.dataset.page) ? page === 0 : page === last;
    }
    box.querySelector(".scroll").scrollTop = 0;
  }

  function turnPage(box, to) {
    const { page, found } = box.state;
    box.state.page = { first: 0, previous: page - 1, next: page + 1, last: Math.ceil(found.length / rowsOfPage) - 1 }[to];
    showPage(box);
    // A button that is disabled now has lost the focus.
    const button = box.querySelector(`[data-page=${to}]`);
    if (button.disabled) box.querySelector("[data-action=page]:enabled")?.focus();
  }

  // --- When a figure comes into view ------------------------------------------------------------

  const drawers = { plot: drawPlot, rdm: drawMatrices, surface: drawCortex, table: openTable };
  const drawn = new Set();
  // Drawing waits for files and for plotly: one at a time a figure, and only the last one counts.
  async function draw(box) {
    drawn.add(box);
    const turn = box.turn = (box.turn ?? 0) + 1;
    await box.busy;
    if (turn !== box.turn) return;
    try {
      box.busy = drawers[box.dataset.kind](box).finally(() => { box.busy = null; });
      await box.busy;
      if (turn === box.turn) box.dataset.drawn = "yes";
    } catch (error) {
      console.error(error);
      const words = document.createElement("p");
      words.className = "wait";
      words.textContent = `This plot could not be drawn (${error.message}). Its data are below.`;
      (box.querySelector(".plot3d, .panels, .controls") ?? box).replaceChildren(words);
    }
  }
  const boxes = $$("[data-figure]");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      if (!drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "300px 0px" });
  boxes.forEach((box) => seen.observe(box));

  // The rest is drawn while nothing else happens, so that printing and searching find it.
  const idle = window.requestIdleCallback ?? ((f) => setTimeout(f, 200));
  function drawRest() {
    const next = boxes.find((b) => !/surface|table/.test(b.dataset.kind) && !drawn.has(b));
    if (next) draw(next).then(() => idle(drawRest));
  }
  addEventListener("load", () => setTimeout(() => idle(drawRest), 1500));

  // What is in view is drawn again at once, the rest when it comes into view or nothing happens.
  function renew(box) {
    if (!drawn.delete(box)) return;
    box.turn += 1;
    delete box.dataset.drawn;
    seen.unobserve(box);
    seen.observe(box);
    idle(drawRest);
  }

  const widths = new WeakMap();
  const resized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const width = Math.round(contentRect.width);
      if (widths.has(target) && widths.get(target) !== width && drawn.has(target)) {
        clearTimeout(target.timer);
        target.timer = setTimeout(() => renew(target), 120);
      }
      widths.set(target, width);
    }
  });
  boxes.filter((b) => b.dataset.kind !== "table").forEach((box) => resized.observe(box));

  const redraw = () => boxes.filter((b) => b.dataset.kind !== "table").forEach(renew);

  // --- Buttons ----------------------------------------------------------------------------------

  const say = (text) => { document.querySelector(".said").textContent = text; };
  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const themeButton = document.querySelector(".theme");
  function nameTheme() {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
    themeButton.setAttribute("aria-pressed", String(isDark()));
  }
  nameTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); redraw(); });

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const label = button.textContent;
    button.textContent = "Copied";
    say("Copied");
    setTimeout(() => { button.textContent = label; }, 1500);
  }

  async function save(id, format) {
    const place = document.getElementById(id);
    const box = place.querySelector("[data-figure]");
    if (!drawn.has(box)) await draw(box);
    const plots = box.dataset.kind === "plot" ? [box] : $$(".matrix", box);
    for (const [i, plot] of plots.entries()) {
      const name = plots.length > 1 ? `${id}-${i + 1}` : id;
      const layout = { ...plot.layout, paper_bgcolor: css("--paper") };
      await Plotly.downloadImage({ data: plot.data, layout }, { format, filename: name, width: layout.width, height: layout.height, scale: format === "png" ? 3 : 1 });
    }
  }

  const actions = {
    theme() { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); redraw(); },
    copy(button) {
      const from = document.getElementById(button.dataset.from);
      copy(from.hidden || from.tagName === "PRE" ? from.textContent.trim() : from.innerText.trim(), button);
    },
    picture(button) { save(button.dataset.of, button.dataset.format); },
    sort(button) { sortRows(button.closest(".find"), Number(button.dataset.column)); },
    page(button) { turnPage(button.closest(".find"), button.dataset.page); },
    view(button) { choose(button.closest(".surface"), "view", button.dataset.view); },
    larger(button) {
      const box = button.closest(".rdm");
      const large = box.classList.toggle("large");
      button.setAttribute("aria-pressed", String(large));
      if (drawn.has(box)) draw(box);
    },
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-action]");
    if (button) actions[button.dataset.action](button);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("select[data-action=map]")) choose(event.target.closest(".surface"), "map", event.target.value);
  });
  document.addEventListener("input", (event) => {
    const box = event.target.closest(".find");
    if (!box?.state) return;
    clearTimeout(box.timer);
    box.timer = setTimeout(() => findRows(box), 120);
  });
  $$(".plot3d").forEach((place) => place.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey && turn(place.closest(".surface"), event.key)) event.preventDefault();
  }));

  // --- Contents ---------------------------------------------------------------------------------

  const toc = document.querySelector(".toc");
  const wide = matchMedia("(min-width: 1100px)");
  const fit = () => { toc.open = wide.matches; };
  fit();
  wide.addEventListener("change", fit);
  toc.addEventListener("click", (event) => { if (event.target.closest("a") && !wide.matches) toc.open = false; });
  const links = new Map($$("a[href^='#']", toc).map((a) => [a.getAttribute("href").slice(1), a]));
  const marks = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
  function spy() {
    const line = innerHeight * 0.3;
    let here = marks[0];
    for (const mark of marks) if (mark.getBoundingClientRect().top <= line) here = mark;
    for (const [id, link] of links) {
      if (id === here.id) link.setAttribute("aria-current", "location");
      else link.removeAttribute("aria-current");
    }
    const item = links.get(here.id).parentElement;
    const outer = item.parentElement.closest("li") ?? item;
    $$(".toc > ol > li").forEach((li) => li.classList.toggle("open", li === outer));
  }
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; spy(); });
  }, { passive: true });
  spy();

  // --- Paper ------------------------------------------------------------------------------------

  addEventListener("beforeprint", () => {
    root.dataset.screenTheme = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    for (const plot of $$(".plot[data-drawn]")) putPlot(plot, specs[plot.dataset.figure], 640);
  });
  addEventListener("afterprint", () => {
    if (root.dataset.screenTheme) root.dataset.theme = root.dataset.screenTheme;
    else delete root.dataset.theme;
    redraw();
  });
})();
