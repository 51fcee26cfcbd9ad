"use strict";
// Draws the page's charts, and keeps them, the tables and the address in step with one form.
(() => {
  const $ = (id) => document.getElementById(id);
  const read = (id) => JSON.parse($(id).textContent);
  const data = read("data"), specs = read("specs"), form = $("controls"), views = {}, drawn = {};
  const filters = ["model", "dataset", "criterion", "bias"];
  const most = { columns: 12, agreeing: 40 };
  let waiting = Promise.resolve(), newest = 0;

  // One at a time; of a slider that is drawn along, the last place.
  function update() {
    const mine = ++newest, now = () => (mine === newest ? refresh() : null);
    return (waiting = waiting.then(now, now));
  }

  const made = (tag, text, kind = "") => Object.assign(document.createElement(tag), { textContent: text, className: kind });
  const shortly = (value, digits = 5) => (value == null ? "-" : String(Number(value.toPrecision(digits))));

  // Sorted layers in the words of --layers, such as 3-5,9.
  function span(layers) {
    const runs = [];
    for (const layer of [...layers].sort((a, b) => a - b)) {
      const last = runs.at(-1);
      if (last && layer === last[1] + 1) last[1] = layer;
      else runs.push([layer, layer]);
    }
    return runs.map(([low, high]) => (low === high ? low : `${low}-${high}`)).join(",");
  }

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // Sizes that follow the window; Vega-Lite has none for charts of several panels.
  const sized = {
    heat(spec, wide) {
      const labels = wide < 600 ? 110 : 160;
      spec.spec.width = Math.max(150, wide - labels - 30);
      spec.spec.encoding.y.axis.labelLimit = labels;
    },
    curves(spec, wide) {
      spec.spec.width = Math.max(150, wide - 75);
      for (const layer of spec.spec.layer) if (layer.encoding.color) layer.encoding.color.legend.labelLimit = wide - 60;
    },
    cka(spec, wide) {
      spec.columns = wide < 640 ? 1 : 2;
      spec.spec.width = spec.spec.height = Math.max(150, Math.min(430, wide / spec.columns - 75));
    },
    agreement(spec, wide) {
      spec.encoding.y.axis.labelLimit = wide < 600 ? 130 : 260;
    },
  };

  // Draws a chart anew where its rows or the window have changed; else its parameters alone change.
  async function chart(name, rows, key, params) {
    const box = $(name), now = `${key} ${innerWidth}`, given = drawn[name] === now ? null : rows();
    if (given?.length === 0) {
      views[name]?.finalize();
      box.replaceChildren(made("p", "Nothing to draw: nothing is ticked, or nothing passes the filters.", "note"));
      drawn[name] = views[name] = null;
    } else if (given) {
      const spec = structuredClone(specs[name]);
      sized[name](spec, box.parentElement.clientWidth);
      for (const one of spec.params ?? []) one.value = params[one.name];
      box.style.minHeight = `${box.offsetHeight}px`;
      views[name]?.finalize();
      const tooltip = { disableDefaultStyle: true, formatTooltip: (datum, clean) => told(spec.usermeta.told, datum, clean) };
      const how = { ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip };
      views[name] = (await vegaEmbed(box, { ...spec, data: { values: given } }, how)).view;
      views[name].addEventListener("click", (_, item) => $(`on-${item?.datum?.id}`)?.click());
      box.style.minHeight = "";
      drawn[name] = now;
    } else if (specs[name].params) {
      for (const [key, value] of Object.entries(params)) views[name].signal(key, value);
      await views[name].runAsync();
    }
  }

  function told(fields, datum, clean) {
    const rows = Object.entries(fields).filter(([field]) => datum[field] != null && datum[field] !== "");
    return `<table>${rows.map(([field, name]) => `<tr><td class="key">${clean(name)}</td><td>${clean(datum[field])}</td></tr>`).join("")}</table>`;
  }

  async function refresh() {
    const asked = new FormData(form), params = { k: Number(asked.get("k")), share: asked.has("share") };
    const shown = data.series.filter((one) => filters.every((name) => !asked.get(name) || one[name] === asked.get(name)));
    const on = shown.filter((one) => asked.getAll("on").includes(String(one.id)));
    const numbers = (rows) => rows.map((one) => one.id), passing = new Set(numbers(shown)), matrix = asked.get("cka");
    for (const row of $("scores").tBodies[0].rows) row.hidden = !passing.has(Number(row.dataset.id));
    $("count").textContent = `${shown.length} of ${data.series.length} scores pass the filters; ${on.length} ticked`;
    $("k-is").textContent = params.k;
    $("layers").replaceChildren(...on.map((one) => layersOf(one, params.k)));
    $("values").replaceChildren(...valuesOf(on.slice(0, most.columns), params.k));
    $("values-said").textContent = on.length > most.columns ? `The first ${most.columns} of ${on.length} ticked scores.` : "";
    await chart("heat", () => shown, numbers(shown), params);
    await chart("curves", () => on, numbers(on), params);
    if (matrix) await chart("cka", () => pairs(matrix), matrix);
    await chart("agreement", () => agreeing(passing), numbers(shown));
  }

  function layersOf(one, k) {
    const item = made("li", ""), code = made("code", `--layers=${span(one.ranking.slice(0, k))}`), copy = made("button", "Copy");
    copy.type = "button";
    copy.setAttribute("aria-label", `Copy the layers of ${one.label}`);
    copy.addEventListener("click", async () => {
      getSelection().selectAllChildren(code);
      await navigator.clipboard?.writeText(code.textContent).then(() => (copy.textContent = "Copied"), () => {});
    });
    const few = one.ranking.length < k ? ` (all ${one.ranking.length} that may be chosen)` : "";
    if (one.ranking.length) item.append(code, copy);
    item.append(made("span", `${one.label}, ${one.direction} is critical${few}`, "note"));
    return item;
  }

  function valuesOf(columns, k) {
    const head = document.createElement("thead"), body = document.createElement("tbody");
    const top = head.insertRow();
    for (const text of ["layer", ...columns.map((one) => `${one.label} ± s.e.`)]) {
      top.append(Object.assign(made("th", text, "number"), { scope: "col" }));
    }
    const chosen = columns.map((one) => new Set(one.ranking.slice(0, k)));
    for (let layer = 0; layer < Math.max(0, ...columns.map((one) => one.num_layers)); layer++) {
      const row = body.insertRow();
      row.append(Object.assign(made("th", layer, "number"), { scope: "row" }));
      columns.forEach((one, place) => {
        const error = one.stderr[layer] == null ? "" : ` ± ${shortly(one.stderr[layer], 3)}`;
        const marked = chosen[place].has(layer);
        row.append(made("td", `${marked ? "◀ " : ""}${shortly(one.value[layer])}${error}`, marked ? "number chosen" : "number"));
      });
    }
    return [head, body];
  }

  function pairs(source) {
    const found = [];
    for (const [estimator, rows] of Object.entries(data.cka[source] ?? {})) {
      const columns = rows.at(-1).length;
      rows.forEach((_, row) => {
        for (let column = 0; column < columns; column++) {
          found.push({ estimator, row, column, cka: rows[row][column] ?? rows[column]?.[row] ?? null });
        }
      });
    }
    return found;
  }

  function agreeing(passing) {
    const found = [];
    let left = passing.size;
    for (const { ids, rho } of data.agreement) {
      const places = [...ids.keys()].filter((place) => passing.has(ids[place])).slice(0, most.agreeing);
      left -= places.length;
      for (const a of places) {
        for (const b of places) {
          const value = rho[Math.max(a, b)][Math.min(a, b)];
          found.push({ row: data.series[ids[a]].label, column: data.series[ids[b]].label, rho: value });
        }
      }
    }
    $("agreement-said").textContent = left ? `The first ${most.agreeing} of each depth that pass the filters.` : "";
    return found;
  }

  // The address holds the form: it can be kept, sent and gone back to.
  function remember() {
    const kept = [...new FormData(form)].filter(([, value]) => value !== "");
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  function restore() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (![...asked].length) return;
    for (const one of form.elements) {
      if (one.type === "checkbox") one.checked = asked.getAll(one.name).includes(one.value);
      else if (one.name) one.value = asked.get(one.name) ?? "";
      if (one.tagName === "SELECT" && one.selectedIndex < 0) one.selectedIndex = 0;
    }
  }

  async function start() {
    const began = performance.now();
    restore();
    data.cka = JSON.parse(await unpacked("pairs"));
    document.head.append(Object.assign(document.createElement("script"), { textContent: await unpacked("vega") }));
    await update();
    document.documentElement.dataset.drawn = Math.round(performance.now() - began);
    // Ticks stand in the table, outside of the form that they belong to.
    addEventListener("input", update);
    addEventListener("change", remember);
    addEventListener("hashchange", () => (restore(), update()));
    addEventListener("resize", update);
  }
  start();
})();
