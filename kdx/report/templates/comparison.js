// The gallery of a comparison: one kind of map at one layer, for every shown student, on one scale of colours.

const IMAGES_PER_PAGE = 8;
const COMPARED_EDGE = 144; // longer edge of a map's canvas, in pixels

function makeComparison(data) {
  const { layers, kinds, students, maps, figures, limits, predictions } = data;
  const colours = { sequential: bytes(data.colours.sequential), diverging: bytes(data.colours.diverging) };
  const element = (id) => document.getElementById(id);
  const container = element("cards");
  const cards = [...container.children];
  const inputs = Object.fromEntries(["class", "outcome", "scale", "cells"].map((id) => [id, element(id)]));
  const buttons = (name) => [...document.querySelectorAll(`[data-${name}]`)];
  const layerButtons = buttons("layer"), kindButtons = buttons("kind-button"), studentButtons = buttons("student-button");
  const shown = new Set(students.keys());
  let layer = data.opening;
  let kind = data.kind;
  let limit = IMAGES_PER_PAGE;
  let order = []; // the indices of the images that match

  const opacity = () => element("opacity").value / 100;

  function fillTile(tile, index, student, edge, atLayer = layer, atKind = kind) {
    const map = maps[index][atLayer][atKind][student];
    const figure = figures[index][atLayer][atKind][student];
    const { label, signed } = kinds[atKind];
    const [name, right, confidence] = predictions[index][student];
    return paintTile(tile ?? newTile(cards[index].querySelector("img"), students[student]), {
      map,
      label: `${students[student]}: ${right ? "✓" : "✗"} ${name} ${confidence}`,
      spoken: `${label} map of ${students[student]} for ${cards[index].dataset.id} at ${layers[atLayer]}`,
      words: figure ? describeMap(kinds[atKind], map, figure, null) : { sum: "", quality: "does not have this layer" },
      look: chosenLook(inputs, colours, signed, limits[atLayer][atKind], edge),
    });
  }

  const enlarge = (index) => enlargeButton(cards[index].dataset.id, () => zoom(index));

  // The strip keeps the layer and the kind of map of the page as it opens.
  const stripStudents = students.slice(0, data.stripStudents);
  const stripTile = (tile, index, student) => fillTile(tile, index, student, COMPARED_EDGE, data.opening, data.kind);
  const strip = data.strip.map((index) => {
    const tiles = stripStudents.map((_, student) => stripTile(null, index, student));
    return { index, tiles, item: stripItem(cards[index], tiles, enlarge(index)) };
  });

  function paint(index) {
    const card = cards[index];
    const look = JSON.stringify([layer, kind, [...shown], inputs.scale.value, inputs.cells.value]);
    if (card.dataset.look === look) return;
    const views = card.querySelector(".views");
    if (!card.tiles) {
      card.tiles = students.map(() => null);
      card.querySelector(".source .stack").append(enlarge(index));
    }
    const visible = students.flatMap((_, student) => (shown.has(student) ? [student] : []));
    for (const student of visible) card.tiles[student] = fillTile(card.tiles[student], index, student, COMPARED_EDGE);
    views.replaceChildren(views.querySelector(".source"), ...visible.map((student) => card.tiles[student]));
    card.dataset.look = look;
  }

  function matches(card, index) {
    const right = predictions[index].filter(([, isRight]) => isRight).length;
    const outcomes = { "": true, mixed: right > 0 && right < students.length, right: right === students.length, wrong: right === 0 };
    return (inputs.class.value === "" || card.dataset.label === inputs.class.value) && outcomes[inputs.outcome.value];
  }

  function render() {
    order = cards.flatMap((card, index) => (matches(card, index) ? [index] : []));
    const visible = new Set(order.slice(0, limit));
    cards.forEach((card, index) => {
      card.hidden = !visible.has(index);
      if (visible.has(index)) paint(index);
    });
    strip.forEach(({ index, tiles }) => tiles.forEach((tile, student) => stripTile(tile, index, student)));
    const press = (all, isPressed) => all.forEach((button, place) => button.setAttribute("aria-pressed", String(isPressed(place))));
    press(layerButtons, (place) => place === layer);
    press(kindButtons, (place) => place === kind);
    press(studentButtons, (place) => shown.has(place));
    document.querySelectorAll("[data-scale]").forEach((scale) => { scale.hidden = (scale.dataset.scale === "signed") !== kinds[kind].signed; });
    element("meaning").textContent = `${kinds[kind].label} at ${layers[layer]}. ${kinds[kind].meaning}`;
    element("count").textContent = `Showing ${visible.size} of ${order.length} ${order.length < cards.length ? "matching images" : "images"}.`;
    element("empty").hidden = order.length > 0;
    element("more").hidden = order.length <= limit;
    element("more").textContent = `Show ${Math.min(IMAGES_PER_PAGE, order.length - limit)} more`;
  }

  const zoom = makeZoom({
    layerName: () => `${kinds[kind].label} · ${layers[layer]}`,
    card: (index) => cards[index],
    neighbours: (index) => {
      const place = order.indexOf(index);
      return [order[place - 1] ?? null, order[place + 1] ?? null];
    },
    tiles: (index, edge) => students.flatMap((_, student) => (shown.has(student) ? [fillTile(null, index, student, edge)] : [])),
    opacity,
  });
  const restart = () => { limit = IMAGES_PER_PAGE; render(); };
  layerButtons.forEach((button, place) => button.addEventListener("click", () => { layer = place; render(); }));
  kindButtons.forEach((button, place) => button.addEventListener("click", () => { kind = place; render(); }));
  studentButtons.forEach((button, place) => button.addEventListener("click", () => {
    if (!shown.delete(place)) shown.add(place);
    render();
  }));
  for (const input of Object.values(inputs)) input.addEventListener("change", restart);
  element("opacity").addEventListener("input", () => {
    document.documentElement.style.setProperty("--opacity", opacity());
    element("opacity-value").textContent = `${element("opacity").value}%`;
  });
  element("more").addEventListener("click", () => {
    const next = cards[order[limit]];
    limit += IMAGES_PER_PAGE;
    render();
    // The button moves or disappears, so the focus goes to the first of the new images.
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
  });
  container.addEventListener("click", (event) => {
    const card = event.target.closest(".map .stack")?.closest(".card");
    if (card) zoom(cards.indexOf(card));
  });
  const controls = element("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.reset(); // after a reload, the form must not keep choices that the images do not have
  controls.hidden = false;
  element("strip")?.append(...strip.map(({ item }) => item));
  render();
}

document.addEventListener("DOMContentLoaded", () => {
  const payload = document.getElementById("payload");
  if (payload) makeComparison(JSON.parse(payload.textContent));
});
