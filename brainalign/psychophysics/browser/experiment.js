/* A choice among names for each picture; answers leave as a CSV file. `EXPERIMENT` comes from trials.js. */
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const KEYS = [..."1234qwerasdfzxcv"];
  const X = EXPERIMENT;
  const SLOT = `brainalign-${X.id}`;
  const COLUMNS = [
    "subject", "trial", "block", "stimulus_id", "category", "response", "rt", "noise_sd", "band", "frequency",
    "condition", "seed", "picture_px", "pixel_ratio", "started", "experiment",
  ];

  // What is known of this participant. Answers: trial number, response, seconds, pixels of the picture, pixel ratio.
  let run = null;
  let order = [];
  let waiting = null;

  // Random numbers from a text (FNV-1a, then mulberry32): a participant's order follows from the code.
  function randomFrom(text) {
    let state = 2166136261;
    for (const c of text) state = Math.imul(state ^ c.codePointAt(0), 16777619);
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  function shuffled(n, random) {
    const places = [...Array(n).keys()];
    for (let i = n - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [places[i], places[j]] = [places[j], places[i]];
    }
    return places;
  }

  const storage = (() => {
    try {
      localStorage.setItem("brainalign-probe", "1");
      localStorage.removeItem("brainalign-probe");
      return localStorage;
    } catch {
      return null; // The consent page then says that nothing is kept.
    }
  })();
  const keep = () => storage?.setItem(SLOT, JSON.stringify(run));

  function show(id) {
    for (const page of document.querySelectorAll("main[id]")) page.hidden = page.id !== id;
    window.scrollTo(0, 0);
  }

  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const pressed = (button) => new Promise((done) => button.addEventListener("click", done, { once: true }));

  async function until(time) {
    let now = await frame();
    while (now < time) now = await frame();
  }

  // Pictures are decoded before they are due, so that they appear whole and at once.
  const ready = new Map();
  function prepare(trial) {
    if (!trial || ready.has(trial.image)) return;
    const picture = new Image();
    picture.alt = "";
    picture.draggable = false;
    picture.src = `images/${trial.image}`;
    ready.set(trial.image, picture.decode().then(() => picture));
  }
  async function pictureOf(trial) {
    prepare(trial);
    const picture = await ready.get(trial.image);
    ready.delete(trial.image);
    return picture;
  }

  const buttons = X.classes.map((name, i) => {
    const button = document.createElement("button");
    const key = document.createElement("kbd");
    button.type = "button";
    button.disabled = true;
    key.textContent = KEYS[i];
    key.setAttribute("aria-hidden", "true");
    button.append(key, name);
    button.addEventListener("click", (event) => waiting?.(name, event.timeStamp));
    $("choices").append(button);
    return button;
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    const i = KEYS.indexOf(event.key.toLowerCase());
    if (waiting && i >= 0 && i < X.classes.length) {
      event.preventDefault();
      waiting(X.classes[i], event.timeStamp);
    }
  });

  function answer() {
    return new Promise((done) => {
      for (const button of buttons) button.disabled = false;
      waiting = (name, time) => {
        waiting = null;
        for (const button of buttons) button.disabled = true;
        done({ name, time });
      };
    });
  }

  async function present(trial) {
    $("feedback").textContent = "";
    $("picture").replaceChildren();
    $("cross").hidden = false;
    const picture = await pictureOf(trial);
    const start = await frame();
    await until(start + 1000 * X.fixation);
    $("cross").hidden = true;
    $("picture").append(picture);
    await frame(); // The picture is painted at the end of this frame,
    const shown = await frame(); // and is on the screen by this one.
    const given = answer();
    if (X.duration !== null) until(shown + 1000 * X.duration).then(() => picture.remove());
    const { name, time } = await given;
    return { response: name, rt: Math.max(0, time - shown) / 1000 };
  }

  async function practise() {
    show("trial");
    $("stop").hidden = true;
    for (const [i, trial] of X.practice.entries()) {
      $("progress").textContent = `Practice ${i + 1} of ${X.practice.length}`;
      prepare(X.practice[i + 1]);
      const { response } = await present(trial);
      const right = response === trial.category;
      const mark = (name, word) => buttons[X.classes.indexOf(name)].classList.add(word);
      mark(trial.category, "right");
      if (!right) mark(response, "wrong");
      $("feedback").textContent = right ? "Right" : `It was: ${trial.category}`;
      await until((await frame()) + 1000 * X.feedback);
      for (const button of buttons) button.classList.remove("right", "wrong");
    }
  }

  async function rest(block, blocks) {
    const done = run.answers.length;
    $("pause-title").textContent = done ? "Take a rest" : "Now it begins";
    $("pause-text").textContent = done
      ? `You have answered ${done} of ${X.trials.length} pictures. Go on when you like.`
      : `There are ${blocks} ${blocks === 1 ? "block" : "blocks"} of up to ${X.block} pictures. From now on you are not told the right answer.`;
    $("bar").value = done / X.trials.length;
    $("next").textContent = `Start block ${block} of ${blocks}`;
    show("pause");
    $("next").focus();
    await pressed($("next"));
  }

  async function blocks() {
    const total = Math.ceil(order.length / X.block);
    const leave = (event) => event.preventDefault();
    addEventListener("beforeunload", leave);
    $("stop").hidden = false;
    let stopped = false;
    $("stop").onclick = () => {
      stopped = confirm("Stop the experiment and save your answers up to here?");
      if (stopped) finish(leave);
    };
    for (let done = run.answers.length; done < order.length && !stopped; done = run.answers.length) {
      if (done % X.block === 0 || !$("pause").hidden) await rest(Math.floor(done / X.block) + 1, total);
      show("trial");
      for (const place of order.slice(done + 1, done + 4)) prepare(X.trials[place]);
      $("progress").textContent = `${done + 1} of ${order.length}`;
      const { response, rt } = await present(X.trials[order[done]]);
      if (stopped) return;
      run.answers.push([order[done], response, rt, $("stage").clientWidth, devicePixelRatio]);
      keep();
    }
    if (!stopped) finish(leave);
  }

  function csv() {
    const cell = (value) => {
      const text = String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const rows = run.answers.map(([place, response, rt, px, ratio], i) => {
      const trial = X.trials[place];
      const all = {
        ...trial, response, rt: rt.toFixed(4), subject: run.subject, trial: i + 1, block: Math.floor(i / X.block) + 1,
        picture_px: px, pixel_ratio: ratio, started: run.started, experiment: X.id,
      };
      return COLUMNS.map((name) => cell(all[name])).join(",");
    });
    return [COLUMNS.join(","), ...rows].join("\n") + "\n";
  }

  function save() {
    const name = `${run.subject}-${X.id}.csv`;
    const link = $("save");
    if (link.href) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = name;
    $("file").textContent = name;
    link.click();
  }

  function finish(leave) {
    removeEventListener("beforeunload", leave);
    waiting = null;
    const whole = run.answers.length === order.length;
    $("end-text").textContent = whole
      ? "You have answered all pictures."
      : `You have answered ${run.answers.length} of ${order.length} pictures.`;
    show("end");
    document.exitFullscreen?.().catch(() => undefined); // It may not be on.
    save();
  }

  async function begin(known) {
    run = known;
    order = shuffled(X.trials.length, randomFrom(`${X.id} ${run.subject}`));
    if (X.fullscreen) document.documentElement.requestFullscreen?.().catch(() => undefined); // It may be refused.
    if (!run.practised) {
      show("instructions");
      $("start").focus();
      await pressed($("start"));
      if (X.practice.length) await practise();
      run.practised = true;
      keep();
    }
    show("pause");
    await blocks();
  }

  function setUp() {
    document.documentElement.style.setProperty("--side", `${X.side}px`);
    document.title = X.title;
    for (const place of document.querySelectorAll("[data-text=title]")) place.textContent = X.title;
    for (const paragraph of X.consent) {
      const p = document.createElement("p");
      p.textContent = paragraph;
      $("consent-text").append(p);
    }
    $("n-trials").textContent = X.trials.length;
    $("n-classes").textContent = X.classes.length;
    $("n-practice").textContent = X.practice.length;
    $("practice-text").hidden = !X.practice.length;
    $("how-long").textContent = X.duration === null
      ? "The picture stays until you answer."
      : `The picture stays for ${X.duration} s; you may answer later.`;
    for (const [i, name] of X.classes.entries()) {
      const item = document.createElement("li");
      const key = document.createElement("kbd");
      key.textContent = KEYS[i];
      item.append(key, ` ${name}`);
      $("names").append(item);
    }
    $("no-storage").hidden = Boolean(storage);
    const old = JSON.parse(storage?.getItem(SLOT) ?? "null");
    if (old) {
      $("resume").hidden = false;
      $("resume-text").textContent =
        `There is a run of ${old.subject}, with ${old.answers.length} of ${X.trials.length} pictures answered.`;
      $("go-on").addEventListener("click", () => begin(old));
      $("save-old").addEventListener("click", () => {
        run = old;
        save();
      });
    }
    $("consent-form").addEventListener("submit", (event) => {
      event.preventDefault();
      begin({ subject: $("subject").value, started: new Date().toISOString(), practised: false, answers: [] });
    });
    $("finish").addEventListener("click", () => {
      storage?.removeItem(SLOT);
      location.reload();
    });
    show("consent");
  }

  setUp();
})();
