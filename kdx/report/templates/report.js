"use strict";
// One script, in the head, so that a stored theme is there before the first paint; the rest waits for the document.
(() => {
  const root = document.documentElement;
  const PER_PAGE = 12;
  const CANVAS = 144; // longer edge of a drawn map, in pixels; the browser scales it to the tile

  // Storage can be refused to a page opened from disk; the theme then lasts as long as the page.
  const remembered = () => { try { return localStorage.getItem("kdx-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("kdx-theme", theme); } catch { /* nothing to keep it in */ } };
  const stored = remembered();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  function themeButton() {
    const button = document.getElementById("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const show = () => button.setAttribute("aria-pressed", String(dark()));
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      remember(root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    button.hidden = false;
    show();
  }

  function copyButton() {
    const button = document.getElementById("copy");
    const command = document.getElementById("command");
    const said = document.getElementById("copied");
    button.hidden = false;
    button.addEventListener("click", async () => {
      let done = true;
      try {
        await navigator.clipboard.writeText(command.textContent);
      } catch {
        // Without a clipboard the command is selected, one key from copied.
        getSelection().selectAllChildren(command);
        done = false;
      }
      button.textContent = done ? "Copied" : "Selected";
      said.textContent = done ? "Command copied" : "Command selected";
      setTimeout(() => { button.textContent = "Copy"; said.textContent = ""; }, 2000);
    });
  }

  // Bilinear, pixel centres aligned, edges held: the same formula as the pictures under overlays/.
  function taps(size, out) {
    return Array.from({ length: out }, (_, i) => {
      const place = Math.min(Math.max(((i + 0.5) * size) / out - 0.5, 0), size - 1);
      const below = Math.floor(place);
      return [below, Math.min(below + 1, size - 1), place - below];
    });
  }

  function draw(canvas, [height, width, packed], colours, ratio) {
    const value = bytes(packed);
    canvas.width = Math.max(1, Math.round(ratio >= 1 ? CANVAS : CANVAS * ratio));
    canvas.height = Math.max(1, Math.round(ratio >= 1 ? CANVAS / ratio : CANVAS));
    const context = canvas.getContext("2d");
    const picture = context.createImageData(canvas.width, canvas.height);
    const columns = taps(width, canvas.width);
    let at = 0;
    for (const [top, bottom, down] of taps(height, canvas.height)) {
      for (const [left, right, along] of columns) {
        const above = value[top * width + left] * (1 - along) + value[top * width + right] * along;
        const under = value[bottom * width + left] * (1 - along) + value[bottom * width + right] * along;
        const t = Math.round(above * (1 - down) + under * down);
        picture.data.set([colours[3 * t], colours[3 * t + 1], colours[3 * t + 2], t], at);
        at += 4;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  function gallery() {
    const { colours: packed, layers, kinds, maps } = JSON.parse(document.getElementById("payload").textContent);
    const colours = bytes(packed);
    const holder = document.getElementById("cards");
    const cards = [...holder.children];
    const buttons = [...document.querySelectorAll("[data-layer]")];
    const classes = document.getElementById("class");
    const outcome = document.getElementById("outcome");
    const opacity = document.getElementById("opacity");
    const more = document.getElementById("more");
    const empty = document.getElementById("empty");
    const explained = Number(holder.dataset.explained).toLocaleString("en");
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
        caption.textContent = map ? kind : `${kind}: nothing here`;
        canvas.setAttribute("aria-label", `${kind} features of ${card.dataset.id} at ${layers[layer]}`);
        if (map) draw(canvas, map, colours, image.width / image.height);
      });
      card.dataset.shown = layer;
    }

    function render() {
      const wanted = outcome.value.split(" ").filter(Boolean).map((part) => part.split(":"));
      const fits = (card) =>
        (classes.value === "" || card.dataset.label === classes.value) && wanted.every(([role, verdict]) => card.dataset[role] === verdict);
      let found = 0;
      cards.forEach((card, index) => {
        const fit = fits(card);
        found += fit;
        card.hidden = !fit || found > limit;
        if (!card.hidden) paint(card, index);
      });
      const shown = Math.min(found, limit);
      const filtered = classes.value !== "" || wanted.length > 0;
      document.getElementById("count").textContent =
        `Showing ${shown} of ${found} ${filtered ? "that fit, among" : "images,"} ${filtered ? `${cards.length} kept` : "kept"} from the ${explained} explained.`;
      empty.hidden = found > 0;
      more.hidden = found <= limit;
      more.textContent = `Show ${Math.min(PER_PAGE, found - limit)} more`;
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
      holder.style.setProperty("--opacity", opacity.value / 100);
      document.getElementById("opacity-value").textContent = `${opacity.value}%`;
    });
    more.addEventListener("click", () => {
      const before = cards.filter((card) => !card.hidden).length;
      limit += PER_PAGE;
      render();
      // The button moves away or goes; the reader's place is the first image it brought.
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
    // A reloaded page must not keep filters in the form that the cards do not show.
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
