// Files that the page makes by itself; nothing is sent.

function saveFile(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function asCsv(rows) {
  // As in kdx.disk.csv_text, an apostrophe keeps a spreadsheet from executing a text that is not a number as a formula.
  const harmless = (text) => (/^'*[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text.replace("−", "-"))) ? `'${text}` : text);
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const field = (x) => (x === null ? "" : quoted(harmless(String(x))));
  return rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
}

// A name without characters that a file system might refuse.
const fileName = (text) => text.replace(/[^A-Za-z0-9._-]+/g, "-").slice(0, 80).replace(/^[-.]+|-+$/g, "") || "image";

// One picture of several tiles in a row: each has an image, a canvas with its map or null, and lines of text.
function drawSheet(title, tiles, opacity, pixelated) {
  const edge = 320, gap = 16, line = 20, top = 44;
  const sheet = document.createElement("canvas");
  const columns = Math.min(4, tiles.length);
  const lines = Math.max(...tiles.map((tile) => tile.lines.length));
  const cell = edge + gap + lines * line;
  sheet.width = gap + columns * (edge + gap);
  sheet.height = top + Math.ceil(tiles.length / columns) * cell + gap;
  const context = sheet.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.fillStyle = "#1c2125";
  context.font = "600 17px system-ui, sans-serif";
  context.fillText(title, gap, 28, sheet.width - 2 * gap);
  tiles.forEach(({ image, canvas, lines: texts }, place) => {
    const scale = edge / Math.max(image.width, image.height);
    const [width, height] = [image.width * scale, image.height * scale];
    const x = gap + (place % columns) * (edge + gap), y = top + Math.floor(place / columns) * cell;
    context.imageSmoothingEnabled = !pixelated;
    context.drawImage(image, x, y, width, height);
    context.imageSmoothingEnabled = true;
    if (canvas) {
      context.globalAlpha = opacity;
      context.drawImage(canvas, x, y, width, height);
      context.globalAlpha = 1;
    }
    texts.forEach((text, i) => {
      context.font = `${i ? 400 : 600} 14px system-ui, sans-serif`;
      context.fillText(text, x, y + height + line * (i + 1), edge);
    });
  });
  return sheet;
}

// A drawing of the page as a file of its own: with the colours and fonts of the page as it looks now, and its background.
function ownSvg(svg) {
  const copy = svg.cloneNode(true);
  const parts = [...copy.querySelectorAll("*")];
  [...svg.querySelectorAll("*")].forEach((part, i) => {
    if (part.closest("defs")) return; // a shape there has the colours of the place that uses it
    const style = getComputedStyle(part);
    for (const name of ["fill", "stroke", "font-family", "font-size", "font-weight"]) parts[i].style.setProperty(name, style.getPropertyValue(name));
  });
  const { x, y, width, height } = svg.viewBox.baseVal;
  for (const [name, value] of Object.entries({ xmlns: "http://www.w3.org/2000/svg", width, height })) copy.setAttribute(name, value);
  const background = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x, y, width, height })) background.setAttribute(name, value);
  background.setAttribute("fill", getComputedStyle(document.body).backgroundColor);
  copy.prepend(background);
  return new XMLSerializer().serializeToString(copy);
}

function savePng(name, svg) {
  const { width, height } = svg.viewBox.baseVal;
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [Math.round(3 * width), Math.round(3 * height)];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => saveFile(name, blob), "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(ownSvg(svg))}`;
}

// A button for each format under every plot.
function plotButtons() {
  for (const figure of document.querySelectorAll("figure.plot")) {
    const svg = figure.querySelector(".drawing svg");
    const title = figure.querySelector("h3").textContent.trim();
    const formats = {
      SVG: () => saveFile(`${fileName(title)}.svg`, new Blob([ownSvg(svg)], { type: "image/svg+xml" })),
      PNG: () => savePng(`${fileName(title)}.png`, svg),
    };
    const buttons = document.createElement("p");
    buttons.className = "buttons";
    buttons.append(...Object.entries(formats).map(([format, save]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `Save ${format}`;
      button.setAttribute("aria-label", `Save the plot “${title}” as ${format}`);
      button.addEventListener("click", save);
      return button;
    }));
    figure.append(buttons);
  }
}
