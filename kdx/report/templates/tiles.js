// The tiles of an image: each shows the image, a map over it, and lines that describe the map.

// image: the <img> that the tile repeats. name: the value of data-kind.
function newTile(image, name) {
  const figure = document.createElement("figure");
  figure.className = "map";
  figure.dataset.kind = name;
  const stack = document.createElement("div");
  stack.className = "stack";
  const copy = image.cloneNode();
  copy.alt = "";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  stack.append(copy, canvas);
  const caption = document.createElement("figcaption");
  caption.append(...["kind", "sum", "quality"].map((line) => {
    const part = document.createElement("span");
    part.className = line;
    return part;
  }));
  figure.append(stack, caption);
  return figure;
}

// The options of `drawMap` that the form's inputs choose. limit: the end of the scale that the maps share. edge: the canvas's size in pixels.
function chosenLook(inputs, colours, signed, limit, edge) {
  return {
    signed,
    colours: signed ? colours.diverging : colours.sequential,
    limit: inputs.scale.value === "own" ? 0 : limit,
    smooth: inputs.cells.value !== "raw",
    edge,
  };
}

// Draws a map into a tile and writes its caption. map: packed, or null for an empty map. label: the first line of the caption.
// spoken: the map in words. words: { sum, quality } of describeMap. look: { signed, colours, limit, smooth, edge } of drawMap.
function paintTile(figure, { map, label, spoken, words, look }) {
  const canvas = figure.querySelector("canvas");
  const image = figure.querySelector("img");
  canvas.hidden = !map;
  canvas.setAttribute("aria-label", spoken);
  figure.querySelector(".kind").textContent = label;
  figure.querySelector(".sum").textContent = words.sum;
  figure.querySelector(".quality").textContent = words.quality;
  if (map) drawMap(canvas, map, { ...look, ratio: image.width / image.height });
  return figure;
}

// A column of the strip at the top of the page: the class of a card's image, the image, and tiles of its maps. button: opens the dialog.
function stripItem(card, tiles, button) {
  const item = document.createElement("div");
  const picture = document.createElement("div");
  const name = document.createElement("p");
  const label = document.createElement("bdi");
  item.className = "stripitem";
  item.style.setProperty("--ratio", card.style.getPropertyValue("--ratio"));
  picture.className = "stack";
  picture.append(card.querySelector("img").cloneNode());
  name.className = "name";
  label.textContent = card.dataset.name;
  name.append(label);
  item.append(name, picture, ...tiles, button);
  return item;
}

// The button over an image that opens the dialog.
function enlargeButton(name, open) {
  const button = document.createElement("button");
  const text = document.createElement("span");
  button.type = "button";
  button.className = "enlarge";
  text.className = "unseen";
  text.textContent = `Enlarge ${name}`;
  button.append(text);
  button.addEventListener("click", open);
  return button;
}
