// The gallery: which images, which layer and which maps it shows, and in which order. The page's address contains these choices.

const PER_PAGE = 12;
const TILE_EDGE = 144; // longer edge of a map's canvas, in pixels; the browser scales the canvas to the tile

function makeGallery(data) {
  const { layers, kinds, maps, figures, limits, nulls, numbers, inside } = data;
  const colours = { sequential: bytes(data.colours.sequential), diverging: bytes(data.colours.diverging) };
  const container = document.getElementById("cards");
  const cards = [...container.children];
  const element = (id) => document.getElementById(id);
  const inputs = Object.fromEntries(["search", "sort", "class", "outcome", "scale", "cells", "plus", "minus"].map((id) => [id, element(id)]));
  const layerButtons = [...document.querySelectorAll("[data-layer]")];
  const kindButtons = [...document.querySelectorAll("[data-kind-button]")];
  const explained = Number(container.dataset.explained).toLocaleString("en");
  const initiallyShown = kinds.flatMap((kind, k) => (kind.shown ? [k] : []));
  let layer = data.opening;
  let shown = new Set(initiallyShown);
  let limit = PER_PAGE;
  let order = []; // the indices of the images that match, in the order of the page

  const shownKinds = () => [...shown].sort((a, b) => a - b);
  const firstKind = () => (shown.size ? shownKinds()[0] : 0);
  const opacity = () => element("opacity").value / 100;

  // The two kinds whose difference is shown, or null.
  function comparedKinds() {
    const [plus, minus] = ["plus", "minus"].map((id) => kinds.findIndex(({ name }) => name === inputs[id].value));
    return plus < 0 || minus < 0 || plus === minus ? null : [plus, minus];
  }

  const tileOf = (index, name) => newTile(cards[index].querySelector("img"), name);

  // Draws one map into a tile, which it makes if there is none, and writes its caption.
  function fillTile(tile, index, kind, edge, atLayer = layer) {
    const map = maps[index][atLayer][kind];
    const { label, name, signed } = kinds[kind];
    return paintTile(tile ?? tileOf(index, name), {
      map,
      label,
      spoken: `${label} map of ${cards[index].dataset.id} at ${layers[atLayer].name}`,
      words: describeMap(kinds[kind], map, figures[index][atLayer][kind], nulls[atLayer][kind]),
      look: chosenLook(inputs, colours, signed, limits[atLayer][kind], edge),
    });
  }

  // The difference of two maps of the shown layer, as a new tile.
  function differenceTile(index, edge) {
    const compared = comparedKinds();
    const figure = tileOf(index, "difference");
    const canvas = figure.querySelector("canvas");
    const image = figure.querySelector("img");
    const both = compared.map((kind) => maps[index][layer][kind]);
    const label = compared.map((kind) => kinds[kind].label).join(" − ");
    canvas.hidden = !both.some(Boolean);
    canvas.setAttribute("aria-label", `${label} of ${cards[index].dataset.id} at ${layers[layer].name}`);
    figure.querySelector(".kind").textContent = label;
    figure.querySelector(".quality").textContent = canvas.hidden ? "both maps are empty" : "";
    drawDifference(canvas, both, compared.map((kind) => (inputs.scale.value === "own" ? 0 : limits[layer][kind])), {
      colours: colours.diverging,
      smooth: inputs.cells.value !== "raw",
      ratio: image.width / image.height,
      edge,
    });
    return figure;
  }

  function describeDifference() {
    const compared = comparedKinds();
    element("difference").hidden = !compared;
    if (!compared) return;
    const [plus, minus] = compared.map((kind) => kinds[kind].label);
    element("difference-low").textContent = `−1: only ${minus}`;
    element("difference-high").textContent = `+1: only ${plus}`;
  }

  const enlarge = (index) => enlargeButton(cards[index].dataset.id, () => zoom(index));

  function paint(index) {
    const card = cards[index];
    const look = JSON.stringify([layer, shownKinds(), comparedKinds(), inputs.scale.value, inputs.cells.value]);
    if (card.dataset.look === look) return;
    const views = card.querySelector(".views");
    if (!card.tiles) {
      card.tiles = kinds.map(() => null);
      card.querySelector(".source .stack").append(enlarge(index));
    }
    kinds.forEach((_, kind) => {
      if (shown.has(kind)) card.tiles[kind] = fillTile(card.tiles[kind], index, kind, TILE_EDGE);
    });
    const difference = comparedKinds() ? [differenceTile(index, TILE_EDGE)] : [];
    views.replaceChildren(views.querySelector(".source"), ...shownKinds().map((kind) => card.tiles[kind]), ...difference);
    card.dataset.look = look;
  }

  const strip = data.strip.map((index) => {
    const figure = fillTile(null, index, 0, TILE_EDGE, data.opening);
    return { index, figure, item: stripItem(cards[index], [figure], enlarge(index)) };
  });

  function matches(card) {
    const conditions = inputs.outcome.value.split(" ").filter(Boolean).map((part) => part.split(":"));
    const text = inputs.search.value.trim().toLowerCase();
    return (
      (inputs.class.value === "" || card.dataset.label === inputs.class.value) &&
      conditions.every(([role, verdict]) => card.dataset[role] === verdict) &&
      (text === "" || card.dataset.id.toLowerCase().includes(text) || card.dataset.name.toLowerCase().includes(text))
    );
  }

  // What an image is sorted by, highest first. Images with equal values stay in the order of the data.
  function sortValue(index) {
    const by = inputs.sort.value;
    if (Object.hasOwn(numbers, by)) return numbers[by][index];
    if (by === "inside") return inside[layer][firstKind()]?.[index] ?? -1;
    const [total, strength, stability] = figures[index][layer][firstKind()];
    return { highest: total, lowest: -total, strength: strength ?? total, stability: stability ?? -2 }[by] ?? 0;
  }

  function describeOrder() {
    if (!inputs.sort.value) return "";
    const by = inputs.sort.selectedOptions[0].textContent.replace("the first map", kinds[firstKind()].label);
    return ` Sorted by ${by[0].toLowerCase()}${by.slice(1)}.`;
  }

  function render() {
    order = cards.map((_, index) => index).sort((a, b) => sortValue(b) - sortValue(a) || a - b).filter((index) => matches(cards[index]));
    const visible = order.slice(0, limit);
    cards.forEach((card) => { card.hidden = true; });
    visible.forEach((index) => {
      cards[index].hidden = false;
      paint(index);
    });
    container.prepend(...order.map((index) => cards[index]));
    strip.forEach(({ index, figure }) => fillTile(figure, index, 0, TILE_EDGE, data.opening));
    document.querySelectorAll("[data-notes]").forEach((notes) => { notes.hidden = Number(notes.dataset.notes) !== layer; });
    layerButtons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === layer)));
    kindButtons.forEach((button, index) => button.setAttribute("aria-pressed", String(shown.has(index))));
    describeDifference();
    const filtered = order.length < cards.length;
    element("count").textContent =
      `Showing ${visible.length} of ${order.length} ${filtered ? "matching images" : "images"}.${describeOrder()} ` +
      `The gallery contains ${cards.length} of the ${explained} explained images.`;
    element("empty").hidden = order.length > 0;
    element("more").hidden = order.length <= limit;
    element("more").textContent = `Show ${Math.min(PER_PAGE, order.length - limit)} more`;
    writeAddress();
  }

  // The address has only what differs from the page as it opens.
  function writeAddress() {
    const state = new URLSearchParams();
    if (layer !== data.opening) state.set("layer", layers[layer].name);
    const names = shownKinds().map((kind) => kinds[kind].name).join(" ");
    if (names !== initiallyShown.map((kind) => kinds[kind].name).join(" ")) state.set("maps", names);
    for (const [name, input] of Object.entries(inputs)) if (input.value) state.set(name, input.value);
    const text = state.toString();
    const known = location.hash.includes("=");
    if (text ? location.hash !== `#${text}` : known) history.replaceState(null, "", `#${text || "gallery"}`);
  }

  // Returns whether the address has a state of the gallery. A name that this page does not have changes nothing.
  function readAddress() {
    if (!location.hash.includes("=")) return false;
    const state = new URLSearchParams(location.hash.slice(1));
    const place = layers.findIndex(({ name }) => name === state.get("layer"));
    layer = place < 0 ? data.opening : place;
    const names = state.get("maps")?.split(" ");
    shown = new Set(names ? kinds.flatMap((kind, k) => (names.includes(kind.name) ? [k] : [])) : initiallyShown);
    for (const [name, input] of Object.entries(inputs)) {
      input.value = state.get(name) ?? "";
      if (input.selectedIndex === -1) input.value = "";
    }
    limit = PER_PAGE;
    return true;
  }

  function saveTable() {
    const head = ["image", "class", ...Object.keys(numbers), "layer", "map", "sum", "strength", "stability"];
    const rows = order.flatMap((index) => layers.flatMap(({ name }, l) => kinds.map((kind, k) =>
      [cards[index].dataset.id, cards[index].dataset.name, ...Object.values(numbers).map((of) => of[index]), name, kind.name, ...figures[index][l][k]])));
    saveFile("maps.csv", new Blob([asCsv([head, ...rows])], { type: "text/csv" }));
  }

  const refilter = () => { limit = PER_PAGE; render(); };
  const zoom = makeZoom({
    layerName: () => layers[layer].name,
    card: (index) => cards[index],
    neighbours: (index) => {
      const place = order.indexOf(index);
      return [order[place - 1] ?? null, place < 0 ? null : order[place + 1] ?? null];
    },
    tiles: (index, edge) => [
      ...shownKinds().map((kind) => fillTile(null, index, kind, edge)),
      ...(comparedKinds() ? [differenceTile(index, edge)] : []),
    ],
    opacity,
  });
  layerButtons.forEach((button, index) => button.addEventListener("click", () => { layer = index; render(); }));
  kindButtons.forEach((button, index) => button.addEventListener("click", () => {
    if (!shown.delete(index)) shown.add(index);
    render();
  }));
  for (const input of Object.values(inputs)) input.addEventListener(input.type === "search" ? "input" : "change", refilter);
  element("opacity").addEventListener("input", () => {
    root.style.setProperty("--opacity", opacity());
    element("opacity-value").textContent = `${element("opacity").value}%`;
  });
  element("more").addEventListener("click", () => {
    const before = limit;
    limit += PER_PAGE;
    render();
    // The button moves or disappears, so the focus goes to the first of the new images.
    const first = cards[order[before]];
    first.tabIndex = -1;
    first.focus({ preventScroll: true });
  });
  element("reset").addEventListener("click", () => {
    for (const name of ["search", "class", "outcome"]) inputs[name].value = "";
    refilter();
    inputs.class.focus();
  });
  element("save-table").addEventListener("click", saveTable);
  container.addEventListener("click", (event) => {
    const card = event.target.closest(".map .stack")?.closest(".card");
    if (card) zoom(cards.indexOf(card));
  });
  const controls = element("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  // After a reload, the form must not keep choices that neither the address nor the cards have.
  controls.reset();
  controls.hidden = false;
  // A link to a section replaces the address, which then gets the choices again.
  addEventListener("hashchange", () => (readAddress() ? render() : writeAddress()));
  const restored = readAddress();
  element("strip")?.append(...strip.map(({ item }) => item));
  render();
  if (restored) element("gallery").scrollIntoView();
}
