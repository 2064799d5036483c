// The page of a report: draws the figures in the theme's colours, sorts and filters tables, shows layers.
(() => {
  "use strict";
  const $ = (query, root = document) => root.querySelector(query);
  const $$ = (query, root = document) => [...root.querySelectorAll(query)];
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const reduced = matchMedia("(prefers-reduced-motion: reduce)");
  const PRINT_WIDTH = 670;

  // Figures: "var(--name)" stands for the value of a CSS variable.
  const themed = (text) => {
    const style = getComputedStyle(root);
    const value = (_, name) => JSON.stringify(style.getPropertyValue(name).trim());
    return JSON.parse(text.replace(/"var\((--[a-z0-9-]+)\)"/g, value));
  };
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const draw = (box) => {
    const figure = themed($("script", box.parentElement).textContent);
    if (box.dataset.fill) fill(figure);
    const printing = root.classList.contains("printing");
    figure.layout.dragmode = touch.matches ? false : "zoom";
    if (printing) Object.assign(figure.layout, { width: PRINT_WIDTH, autosize: false });
    for (const key of $$("button[data-trace]", box.parentElement)) {
      figure.data[key.dataset.trace].visible = pressed(key);
    }
    const all = $("button[data-range]", box.parentElement);
    if (all && pressed(all)) delete figure.layout.yaxis.range;
    const narrow = !printing && box.clientWidth < 520;
    if (narrow) {
      figure.layout.margin.l = 44;
      figure.layout.hoverlabel.font.size = 11;
      if (box.dataset.fill) figure.layout.height = 300;
      else figure.layout.yaxis.title = { text: "" };
      for (const note of figure.layout.annotations || []) note.font = { ...note.font, size: 11 };
    }
    const config = { displayModeBar: false, responsive: !printing, showTips: false };
    return Plotly.react(box, figure.data, figure.layout, config);
  };
  const drawAll = () => $$(".plot").forEach(draw);

  // Layers: one panel a trial, and the histograms of the chosen row.
  const panel = $("#panel");
  let chosen = null;
  const fill = (figure) => {
    const pick = chosen || {};
    [pick.weights, pick.activations].forEach((bins, index) => {
      const width = (bins && bins.width) || 1;
      figure.data[index].x = bins ? bins.counts.map((_, bin) => bins.low + (bin + 0.5) * width) : [];
      figure.data[index].y = bins ? bins.counts : [];
      figure.data[index].width = width;
    });
    const title = (index, text) => ({
      text, showarrow: false, xref: "paper", x: 0, xanchor: "left", align: "left",
      yref: `y${index} domain`, y: 1, yanchor: "bottom", yshift: 6,
    });
    const dashed = (what, ends) => (ends ? `${what}, count; dashed: ends of its grid` : `${what}, count`);
    figure.layout.annotations = [
      title("", pick.weights ? dashed("weights", pick.weight_ends) : "no weights"),
      title("2", pick.activations ? dashed("output", pick.ends) : "output not recorded"),
    ];
    const lines = (axis, ends) => (ends || []).map((x) => ({
      type: "line", xref: `x${axis}`, yref: `y${axis} domain`, x0: x, x1: x, y0: 0, y1: 1,
      line: { color: figure.layout.font.color, width: 1.5, dash: "dash" },
    }));
    figure.layout.shapes = [...lines("", pick.weight_ends), ...lines("2", pick.ends)];
  };
  const choose = (row) => {
    for (const button of $$("button.layer", panel)) {
      const on = row.contains(button);
      button.setAttribute("aria-pressed", on);
      button.closest("tr").classList.toggle("chosen", on);
    }
    chosen = JSON.parse(row.dataset.layer);
    $("#layer-name").textContent = $("button.layer", row).textContent;
    draw($("#layer-plot"));
  };
  const showPanel = (name) => {
    panel.replaceChildren($(`#panel-${name}`).content.cloneNode(true));
    const aside = $(".layers aside");
    const first = $(".layer-table tbody tr[data-shown]", panel) || $(".layer-table tbody tr", panel);
    aside.hidden = !first;
    $(".layers").style.display = first ? "" : "block";
    if (first) choose(first);
    if (first && first.dataset.shown) $(".layer-table", panel).scrollTop = first.offsetTop - 80;
  };

  // Tables: sorted by the data-sort value of a column's cells, empty ones last.
  const sort = (button) => {
    const head = button.closest("th");
    const body = $("tbody", head.closest("table"));
    const column = head.cellIndex;
    const first = head.dataset.first;
    const second = first === "ascending" ? "descending" : "ascending";
    const next = head.getAttribute("aria-sort") === first ? second : first;
    const value = (row) => row.cells[column].dataset.sort;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const by = head.dataset.kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return next === "ascending" ? by : -by;
    };
    $$("th[aria-sort]", head.parentElement).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", next);
    body.append(...[...body.rows].sort(order));
  };

  const filter = () => {
    const wanted = Object.fromEntries(new FormData($("#filter")));
    const words = (wanted.text || "").toLowerCase().split(/\s+/).filter(Boolean);
    const rows = $$("#trials tbody tr");
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(
        words.every((word) => text.includes(word)) &&
        (!wanted.network || row.dataset.network === wanted.network) &&
        (!wanted.engine || row.dataset.engine === wanted.engine) &&
        (!wanted.front || row.dataset.front)
      );
    }
    $("#count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };

  // From a point of a figure to its row.
  const reveal = (key) => {
    const layer = $$(".layer-table tbody tr").find((one) => one.dataset.key === key);
    if (layer) {
      choose(layer);
      return layer.scrollIntoView({ block: "center", behavior: reduced.matches ? "auto" : "smooth" });
    }
    const row = $$("#trials tbody tr").find((one) => one.dataset.key === key);
    if (!row) return;
    if (row.hidden) {
      $("#filter").reset();
      filter();
    }
    $$("#trials tr.found").forEach((other) => other.classList.remove("found"));
    row.classList.add("found");
    row.scrollIntoView({ block: "center", behavior: reduced.matches ? "auto" : "smooth" });
  };

  document.addEventListener("click", (event) => {
    const target = event.target;
    const header = target.closest("thead button");
    if (header) return sort(header);
    const layer = target.closest(".layer-table tbody tr");
    if (layer) return choose(layer);
    const toggle = target.closest("button[data-trace], button[data-range]");
    if (toggle) {
      toggle.setAttribute("aria-pressed", !pressed(toggle));
      return draw($(".plot", toggle.closest("figure")));
    }
    const copy = target.closest("#copy");
    if (copy) copyCommand(copy);
  });

  const copyCommand = async (button) => {
    const text = $("#command").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // A page opened as a file may not reach the clipboard: select the text and use the old way.
      getSelection().selectAllChildren($("#command"));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  };

  // Paper: light colours, everything open, figures as wide as the sheet.
  let closed = [];
  const print = (on) => {
    root.classList.toggle("printing", on);
    if (on) closed = $$("details:not([open])");
    closed.forEach((details) => (details.open = on));
    drawAll();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  dark.addEventListener("change", drawAll);

  if ($("#filter")) {
    $("#filter").addEventListener("input", filter);
    $("#filter").addEventListener("submit", (event) => event.preventDefault());
    filter();
  }
  if (panel) {
    $("#panel-of").addEventListener("change", (event) => showPanel(event.target.value));
    showPanel($("#panel-of").value);
  }
  $$(".plot:not([data-fill])").forEach((box) => {
    draw(box).then(() => box.on("plotly_click", (event) => reveal(event.points[0].customdata)));
  });
})();
