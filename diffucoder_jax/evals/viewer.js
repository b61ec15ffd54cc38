// The denoising viewer's behaviour; viewer.py writes the page around it and the data it reads.
// A step changes only the tokens that the step concerns: their class and their spoken name. Where
// each token stands never changes, since a mask is as wide as the token that it hides.
(() => {
  "use strict";
  const root = document.currentScript.closest("section");
  const find = (selector) => root.querySelector(selector);
  const { ramp, traces } = JSON.parse(find(".viewer-data").textContent);
  const [slider, button, speed] = [".viewer-slider", ".viewer-play", "select"].map(find);
  const [details, said] = [".viewer-details", ".viewer-said"].map(find);
  const several = traces.length > 1;
  const last = Math.max(...traces.map((trace) => trace.steps));
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const MASKED = "viewer-token masked", WRITTEN = "viewer-token", NEW = "viewer-token new";
  const owner = new Map(); // element of a token -> its cell
  let step = 0; // of the slider: so many steps were taken
  let playing = false;
  let shown = null; // the cell that the details are about

  function make(tag, text, attributes = {}) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  // Words.

  /** A token as it is read aloud: white space by name. */
  function spoken(cell) {
    if (cell.name) return cell.name;
    if (cell.text.trim()) return "“" + cell.text.trim() + "”";
    const names = { "\n": "newline", " ": "space", "\t": "tab" };
    const runs = cell.text.match(/(.)\1*/gsu) || [];
    return runs
      .map((run) => {
        const name = names[run[0]] || "blank";
        return run.length > 1 ? run.length + " " + name + "s" : name;
      })
      .join(" and ");
  }

  /** A token as it is printed in the details: white space as signs. */
  function printed(text) {
    return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  }

  function nameOf(cell, state) {
    if (cell.step === -2) return "left masked, position " + cell.position;
    if (state === MASKED) return "masked, position " + cell.position;
    return spoken(cell) + ", position " + cell.position + ", step " + (cell.step + 1);
  }

  function progress(pane) {
    return (
      "step " + pane.step + " of " + pane.trace.steps + ", " + pane.count[pane.step] + " of " +
      pane.order.length + " tokens written"
    );
  }

  function summary() {
    if (!several) return progress(panes[0]);
    return panes.map((pane) => pane.trace.label + ": " + progress(pane)).join("; ");
  }

  // One pane for each trace: its cells, in the text's order and in the order they were written.

  function makePane(trace, element) {
    const pane = { trace, cells: [], order: [], count: [], step: 0 };
    pane.text = element.querySelector(".viewer-text");
    for (let i = 0; i < trace.step.length; i++) {
      const before = pane.cells[pane.cells.length - 1];
      if (trace.step[i] === -1 && before && before.step === -1) {
        before.text += trace.text[i]; // what was given is one piece
        continue;
      }
      const cell = { pane, i, index: pane.cells.length };
      for (const field of ["position", "token", "text", "name", "step"]) cell[field] = trace[field][i];
      pane.cells.push(cell);
    }
    const list = document.createDocumentFragment();
    for (const cell of pane.cells) {
      const node = (cell.node = make("span", undefined, { role: "option", tabindex: -1 }));
      if (cell.step === -1) {
        node.textContent = cell.text;
        node.setAttribute("aria-label", "given: " + cell.text);
      } else {
        // A newline is seen only by a sign before it.
        node.append(make("span", cell.name ? cell.text : cell.text.replace(/\n/g, "↵\n")));
        cell.state = node.className = MASKED;
        node.setAttribute("aria-label", nameOf(cell, MASKED));
        if (cell.step >= 0) pane.order.push(cell);
      }
      owner.set(node, cell);
      list.append(node);
    }
    pane.text.append(list);
    pane.order.sort((a, b) => a.step - b.step || a.i - b.i);
    // count[s]: how many tokens were written after s steps.
    for (let s = 0, n = 0; s <= trace.steps; s++) {
      while (n < pane.order.length && pane.order[n].step < s) n++;
      pane.count.push(n);
    }
    const left = pane.cells.filter((cell) => cell.step === -2).length;
    pane.progress = document.createTextNode(progress(pane));
    element
      .querySelector(".viewer-count")
      .append(
        pane.progress,
        "; " + trace.nfe + " network evaluations" + (left ? "; " + left + " left masked" : ""),
      );
    pane.current = pane.order[0];
    for (const cell of pane.order) if (cell.index < pane.current.index) pane.current = cell;
    pane.current.node.tabIndex = 0;
    return pane;
  }

  /** Shows a pane as it was after `target` of its own steps. */
  function paint(pane, target) {
    const from = pane.step;
    if (from === target) return;
    pane.step = target;
    const { count, order } = pane;
    const ranges = [
      [count[Math.min(from, target)], count[Math.max(from, target)]], // written or masked again
      [count[Math.max(from - 1, 0)], count[from]], // no longer new
      [count[Math.max(target - 1, 0)], count[target]], // new
    ];
    for (const [low, high] of ranges) {
      for (let k = low; k < high; k++) {
        const cell = order[k];
        const state = cell.step >= target ? MASKED : cell.step === target - 1 ? NEW : WRITTEN;
        if (state === cell.state) continue;
        if (state === MASKED || cell.state === MASKED) {
          cell.node.setAttribute("aria-label", nameOf(cell, state));
          if (cell === shown) stale = true;
        }
        cell.node.className = cell.state = state;
      }
    }
    pane.progress.data = progress(pane);
  }

  // Steps.

  let stale = false; // the details are about a token that was written or masked since
  const now = find(".viewer-now").appendChild(document.createTextNode(""));

  function show(target) {
    step = Math.min(Math.max(target, 0), last);
    const share = several && find(".viewer-align input:checked").value === "share";
    for (const pane of panes) {
      const own = share ? Math.round((step / last) * pane.trace.steps) : step;
      paint(pane, Math.min(own, pane.trace.steps));
    }
    if (+slider.value !== step) slider.value = step;
    // A slider that is played while it has the focus would be read aloud without end.
    if (!playing || document.activeElement !== slider) slider.setAttribute("aria-valuetext", summary());
    now.data = step + " / " + last;
    if (stale) describe(shown);
  }

  function play() {
    if (step === last) show(0);
    playing = true;
    button.textContent = "Pause";
    let before = null, due = 0, waited = 0;
    function frame(time) {
      if (!playing) return;
      // A hidden page gets no frames; what it missed is not caught up with.
      const passed = before === null ? 0 : Math.min(time - before, 250);
      before = time;
      due += (passed / 1000) * speed.value;
      waited += passed;
      if (due >= 1 && (!calm.matches || waited >= 500)) {
        const whole = Math.floor(due);
        due -= whole;
        waited = 0;
        show(step + whole);
      }
      if (step === last) pause();
      else requestAnimationFrame(frame);
    }
    requestAnimationFrame(frame);
  }

  function pause() {
    if (!playing) return;
    playing = false;
    button.textContent = "Play";
    slider.setAttribute("aria-valuetext", summary());
    said.textContent = summary();
  }

  // Details.

  function pair(list, term, value) {
    const row = make("div");
    row.append(make("dt", term), typeof value === "string" ? make("dd", value) : value);
    list.append(row);
  }

  function describe(cell) {
    shown = cell;
    stale = false;
    if (!cell) {
      details.replaceChildren(
        make("p", "Point at a token, or go to one with Tab and the arrow keys, to see its numbers."),
      );
      return;
    }
    const { trace } = cell.pane, { i } = cell;
    const list = make("dl");
    if (several) pair(list, "Trace", trace.label);
    const written = cell.step >= 0 && cell.step < cell.pane.step;
    const value = make("dd");
    if (cell.step === -1) value.textContent = "given";
    else if (cell.step === -2) value.textContent = "left masked";
    else if (!written) value.textContent = "masked until step " + (cell.step + 1);
    else value.append(make("code", cell.name || printed(cell.text)), " (id " + cell.token + ")");
    pair(list, "Token", value);
    pair(list, cell.step === -1 ? "From position" : "Position", String(cell.position));
    if (written) {
      const number = (x) => (x === null ? "none" : x.toFixed(3));
      pair(list, "Commit step", cell.step + 1 + " of " + trace.steps);
      pair(list, "Confidence", number(trace.confidence[i]));
      pair(list, "Entropy", number(trace.entropy[i]) + (trace.entropy[i] === null ? "" : " nats"));
      if (trace.alternatives) {
        const likely = make("ul");
        for (const [text, probability, chosen] of trace.alternatives[i]) {
          const share = "--share:" + 100 * (probability || 0) + "%";
          const item = make("li", printed(text) + " " + number(probability), { style: share });
          if (chosen) item.className = "chosen";
          likely.append(item);
        }
        const row = make("dd");
        row.append(likely);
        pair(list, "Likeliest then", row);
        list.lastChild.className = "likely";
      }
    }
    details.replaceChildren(list);
  }

  // Colours.

  function paintColours() {
    const by = find(".viewer-colour input:checked").value;
    const share = several && find(".viewer-align input:checked").value === "share";
    const values = (trace) => trace[by].filter((x, i) => x !== null && trace.step[i] >= 0);
    const all = traces.flatMap(values);
    let low = 0, high = last - 1, ends = ["step 1", "step " + last];
    if (by === "step" && share) ends = ["first step", "last step"];
    if (by === "confidence") {
      // Probabilities fill 0 to 1; a confidence that is a negative entropy does not.
      low = Math.min(0, ...all);
      high = low < 0 ? Math.max(...all) : Math.max(1, ...all);
      ends = [low.toFixed(2), high.toFixed(2)];
    }
    if (by === "entropy") {
      high = Math.max(...all);
      ends = ["0.00", high.toFixed(2) + " nats"];
    }
    for (const pane of panes) {
      const top = by === "step" && share ? pane.trace.steps - 1 : high;
      for (const cell of pane.order) {
        const value = pane.trace[by][cell.i];
        const place = top > low && value !== null ? (value - low) / (top - low) : 0;
        cell.node.style.setProperty("--colour", ramp[Math.round(place * (ramp.length - 1))]);
      }
    }
    find(".viewer-low").textContent = ends[0];
    find(".viewer-high").textContent = ends[1];
    const label = "Colours: violet is " + ends[0] + ", yellow is " + ends[1];
    find(".viewer-legend").setAttribute("aria-label", label);
  }

  // Hands: pointer and keys.

  const cellAt = (target) => owner.get(target.closest(".viewer-text > *"));

  function focusOn(cell) {
    describe(cell); // before the focus, whose description it is
    cell.node.focus();
  }

  /** The cell nearest on the line above (-1) or below (1). */
  function otherLine(cell, direction) {
    const boxOf = (one) => one.node.getClientRects()[0] || { top: 0, left: 0 };
    const from = boxOf(cell);
    let found = cell, best = Infinity;
    for (const other of cell.pane.cells) {
      const box = boxOf(other);
      const down = (box.top - from.top) * direction;
      const distance = down * 1000 + Math.abs(box.left - from.left);
      if (down > 4 && distance < best) [found, best] = [other, distance];
    }
    return found;
  }

  function moved(cell, key) {
    const { cells } = cell.pane;
    switch (key) {
      case "ArrowLeft": return cells[Math.max(cell.index - 1, 0)];
      case "ArrowRight": return cells[Math.min(cell.index + 1, cells.length - 1)];
      case "ArrowUp": return otherLine(cell, -1);
      case "ArrowDown": return otherLine(cell, 1);
      case "Home": return cells[0];
      case "End": return cells[cells.length - 1];
    }
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const cell = cellAt(event.target);
    const goal = cell && moved(cell, event.key);
    if (goal) focusOn(goal);
    else if (event.key === "," || event.key === ".") {
      pause();
      show(step + (event.key === "." ? 1 : -1));
      said.textContent = summary();
    } else if (event.key === " " && !event.target.matches("button, select, input[type=radio]")) {
      if (playing) pause();
      else play();
    } else return;
    event.preventDefault();
  });
  root.addEventListener("focusin", (event) => {
    const cell = cellAt(event.target);
    if (!cell) return;
    const { current } = cell.pane;
    current.node.tabIndex = -1;
    current.node.removeAttribute("aria-selected");
    cell.pane.current = cell;
    cell.node.tabIndex = 0;
    cell.node.setAttribute("aria-selected", "true");
    if (shown !== cell) describe(cell);
    cell.node.setAttribute("aria-describedby", details.id);
  });
  root.addEventListener("focusout", (event) => {
    if (cellAt(event.target)) event.target.removeAttribute("aria-describedby");
  });
  root.addEventListener("pointerover", (event) => {
    const cell = cellAt(event.target);
    const held = owner.get(document.activeElement);
    if (cell && cell !== shown) describe(cell);
    else if (!cell && held && held !== shown) describe(held); // back to the one with the focus
  });
  button.addEventListener("click", () => (playing ? pause() : play()));
  slider.addEventListener("input", () => {
    const wanted = +slider.value;
    pause();
    show(wanted);
  });
  root.addEventListener("change", (event) => {
    if (event.target.type !== "radio") return;
    paintColours();
    show(step);
  });

  const elements = [...root.querySelectorAll(".viewer-pane")];
  const panes = traces.map((trace, i) => makePane(trace, elements[i]));
  slider.max = last;
  // About eight seconds for the whole.
  const far = (option) => Math.abs(Math.log((option.value * 8) / last));
  for (const option of speed.options) if (far(option) < far(speed.selectedOptions[0])) option.selected = true;
  paintColours();
  describe(null);
  show(last); // the finished text first: what it is about
  root.hidden = false;
})();
