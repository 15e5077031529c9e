// Maps as colours on a canvas: the formulas of the pictures under overlays/.

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// The two positions and the weight of the second, per output pixel: bilinear interpolation with aligned pixel centres and repeated edges,
// or the cell that contains the pixel.
function taps(size, out, smooth) {
  return Array.from({ length: out }, (_, i) => {
    if (!smooth) {
      const cell = Math.floor(((i + 0.5) * size) / out);
      return [cell, cell, 0];
    }
    const position = Math.min(Math.max(((i + 0.5) * size) / out - 0.5, 0), size - 1);
    const below = Math.floor(position);
    return [below, Math.min(below + 1, size - 1), position - below];
  });
}

// The linear function [start, slope] from a byte of a packed map to the scale of colours, [0, 1] or [-1, 1] for a signed map.
// limit: the value at which the scale ends, or 0 for the map's own scale.
function toScale([, , , offset, step], signed, limit) {
  if (limit > 0) return [offset / limit, step / limit];
  return signed ? [-1, 1 / 127] : [0, step > 0 ? 1 / 255 : 0];
}

// The values of a map on the scale of colours, one per pixel of the canvas in rows.
function valuesOf(map, canvas, { signed, limit, smooth }) {
  const [height, width, packed] = map;
  const value = bytes(packed);
  const [start, slope] = toScale(map, signed, limit);
  const columns = taps(width, canvas.width, smooth);
  return Float32Array.from(taps(height, canvas.height, smooth).flatMap(([top, bottom, down]) => columns.map(([left, right, along]) => {
    const above = value[top * width + left] * (1 - along) + value[top * width + right] * along;
    const under = value[bottom * width + left] * (1 - along) + value[bottom * width + right] * along;
    return Math.min(Math.max(start + slope * (above * (1 - down) + under * down), signed ? -1 : 0), 1);
  })));
}

function paintValues(canvas, values, colours, signed) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  values.forEach((x, place) => {
    const row = Math.round(signed ? (x + 1) * 127.5 : x * 255);
    pixels.data.set([colours[3 * row], colours[3 * row + 1], colours[3 * row + 2], Math.round(255 * Math.abs(x))], 4 * place);
  });
  context.putImageData(pixels, 0, 0);
}

function sizeCanvas(canvas, { ratio, edge }) {
  canvas.width = Math.max(1, Math.round(ratio >= 1 ? edge : edge * ratio));
  canvas.height = Math.max(1, Math.round(ratio >= 1 ? edge / ratio : edge));
}

function drawMap(canvas, map, options) {
  sizeCanvas(canvas, options);
  paintValues(canvas, valuesOf(map, canvas, options), options.colours, options.signed);
}

// The first map minus the second, both on the scale of colours [0, 1] that `limits` end, or on their own. An empty map is 0 everywhere.
function drawDifference(canvas, maps, limits, { colours, smooth, ratio, edge }) {
  sizeCanvas(canvas, { ratio, edge });
  const [first, second] = maps.map((map, i) =>
    map ? valuesOf(map, canvas, { signed: false, limit: limits[i], smooth }) : new Float32Array(canvas.width * canvas.height));
  paintValues(canvas, first.map((x, place) => x - second[place]), colours, true);
}

// Two significant digits with a sign, such as +0.0031 or −5.2e−7.
function signedNumber(x) {
  const size = Math.abs(x);
  const text = size >= 100 ? String(Math.round(size)) : size.toPrecision(2);
  return x === 0 ? "0" : (x < 0 ? "−" : "+") + text.replace("e-", "e−");
}

// What a caption states of a map besides its name: its sum, and its strength and stability where they are known.
function describeMap(kind, map, [total, strength, stability], nullStrength) {
  if (!map) return { sum: "", quality: "empty map" };
  const parts = [];
  if (strength !== null) {
    parts.push(`strength\u00a0${strength.toFixed(1)}${nullStrength !== null && strength <= nullStrength ? " (chance)" : ""}`);
  }
  if (stability !== null) parts.push(`stability\u00a0${stability.toFixed(2).replace("-", "−")}`);
  return { sum: kind.signed ? `sum\u00a0${signedNumber(total)}` : "", quality: parts.join(", ") };
}
