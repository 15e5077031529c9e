"use strict";
// The script is in the head so that a stored theme applies before the first paint. Everything else waits for the document.
(() => {
  const root = document.documentElement;
  const PER_PAGE = 12;
  const CANVAS = 144; // longer edge of a map's canvas, in pixels; the browser scales the canvas to the tile

  // A browser can refuse storage to a page opened from disk. The theme then lasts until the page is closed.
  const readTheme = () => { try { return localStorage.getItem("kdx-theme"); } catch { return null; } };
  const storeTheme = (theme) => { try { localStorage.setItem("kdx-theme", theme); } catch { /* no storage */ } };
  const stored = readTheme();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  function themeButton() {
    const button = document.getElementById("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const show = () => button.setAttribute("aria-pressed", String(dark()));
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      storeTheme(root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    button.hidden = false;
    show();
  }

  function copyButton() {
    const button = document.getElementById("copy");
    const command = document.getElementById("command");
    const status = document.getElementById("copied");
    button.hidden = false;
    button.addEventListener("click", async () => {
      let copied = true;
      try {
        await navigator.clipboard.writeText(command.textContent);
      } catch {
        // Without access to the clipboard the command is selected, so that one key copies it.
        getSelection().selectAllChildren(command);
        copied = false;
      }
      button.textContent = copied ? "Copied" : "Selected";
      status.textContent = copied ? "Command copied" : "Command selected";
      setTimeout(() => { button.textContent = "Copy"; status.textContent = ""; }, 2000);
    });
  }

  // Bilinear interpolation with aligned pixel centres and repeated edges: the formula of the pictures under overlays/.
  function taps(size, out) {
    return Array.from({ length: out }, (_, i) => {
      const position = Math.min(Math.max(((i + 0.5) * size) / out - 0.5, 0), size - 1);
      const below = Math.floor(position);
      return [below, Math.min(below + 1, size - 1), position - below];
    });
  }

  function draw(canvas, [height, width, packed], colours, ratio) {
    const value = bytes(packed);
    canvas.width = Math.max(1, Math.round(ratio >= 1 ? CANVAS : CANVAS * ratio));
    canvas.height = Math.max(1, Math.round(ratio >= 1 ? CANVAS / ratio : CANVAS));
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    const columns = taps(width, canvas.width);
    let offset = 0;
    for (const [top, bottom, down] of taps(height, canvas.height)) {
      for (const [left, right, along] of columns) {
        const above = value[top * width + left] * (1 - along) + value[top * width + right] * along;
        const under = value[bottom * width + left] * (1 - along) + value[bottom * width + right] * along;
        const t = Math.round(above * (1 - down) + under * down);
        pixels.data.set([colours[3 * t], colours[3 * t + 1], colours[3 * t + 2], t], offset);
        offset += 4;
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  function gallery() {
    const { colours: packed, layers, kinds, maps } = JSON.parse(document.getElementById("payload").textContent);
    const colours = bytes(packed);
    const container = document.getElementById("cards");
    const cards = [...container.children];
    const buttons = [...document.querySelectorAll("[data-layer]")];
    const classes = document.getElementById("class");
    const outcome = document.getElementById("outcome");
    const opacity = document.getElementById("opacity");
    const more = document.getElementById("more");
    const empty = document.getElementById("empty");
    const explained = Number(container.dataset.explained).toLocaleString("en");
    let layer = buttons.findIndex((button) => button.getAttribute("aria-pressed") === "true");
    let limit = PER_PAGE;

    function tiles(card) {
      const views = card.querySelector(".views");
      const source = views.querySelector("img");
      return kinds.map((kind) => {
        const figure = document.createElement("figure");
        figure.className = "map";
        figure.dataset.kind = kind;
        const stack = document.createElement("div");
        stack.className = "stack";
        const image = source.cloneNode();
        image.alt = "";
        const canvas = document.createElement("canvas");
        canvas.setAttribute("role", "img");
        const caption = document.createElement("figcaption");
        stack.append(image, canvas);
        figure.append(stack, caption);
        views.append(figure);
        return { canvas, caption, kind };
      });
    }

    function paint(card, index) {
      if (card.dataset.shown === String(layer)) return;
      card.tiles ??= tiles(card);
      const image = card.querySelector("img");
      card.tiles.forEach(({ canvas, caption, kind }, k) => {
        const map = maps[index][layer][k];
        canvas.hidden = !map;
        caption.textContent = map ? kind : `${kind}: empty map`;
        canvas.setAttribute("aria-label", `${kind} features of ${card.dataset.id} at ${layers[layer]}`);
        if (map) draw(canvas, map, colours, image.width / image.height);
      });
      card.dataset.shown = layer;
    }

    function render() {
      const conditions = outcome.value.split(" ").filter(Boolean).map((part) => part.split(":"));
      const matches = (card) =>
        (classes.value === "" || card.dataset.label === classes.value) && conditions.every(([role, verdict]) => card.dataset[role] === verdict);
      let count = 0;
      cards.forEach((card, index) => {
        const match = matches(card);
        count += match;
        card.hidden = !match || count > limit;
        if (!card.hidden) paint(card, index);
      });
      const filtered = classes.value !== "" || conditions.length > 0;
      document.getElementById("count").textContent =
        `Showing ${Math.min(count, limit)} of ${count} ${filtered ? "matching images" : "images"}. ` +
        `The gallery contains ${cards.length} of the ${explained} explained images.`;
      empty.hidden = count > 0;
      more.hidden = count <= limit;
      more.textContent = `Show ${Math.min(PER_PAGE, count - limit)} more`;
    }

    const refilter = () => { limit = PER_PAGE; render(); };
    buttons.forEach((button, index) => button.addEventListener("click", () => {
      layer = index;
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      render();
    }));
    classes.addEventListener("change", refilter);
    outcome.addEventListener("change", refilter);
    opacity.addEventListener("input", () => {
      container.style.setProperty("--opacity", opacity.value / 100);
      document.getElementById("opacity-value").textContent = `${opacity.value}%`;
    });
    more.addEventListener("click", () => {
      const before = cards.filter((card) => !card.hidden).length;
      limit += PER_PAGE;
      render();
      // The button moves or disappears, so the focus goes to the first of the new images.
      const first = cards.filter((card) => !card.hidden)[before];
      first.tabIndex = -1;
      first.focus({ preventScroll: true });
    });
    document.getElementById("reset").addEventListener("click", () => {
      classes.value = "";
      outcome.value = "";
      refilter();
      classes.focus();
    });
    const controls = document.getElementById("controls");
    controls.addEventListener("submit", (event) => event.preventDefault());
    // After a reload, the form must not keep filters that the cards do not apply.
    controls.reset();
    controls.hidden = false;
    render();
  }

  document.addEventListener("DOMContentLoaded", () => {
    themeButton();
    copyButton();
    if (document.getElementById("payload")) gallery();
  });
})();
