// One image and one kind of map, for the students that the reader selects. Maps are drawn when they are shown.

const STUDENTS_PER_PAGE = 11; // with the image itself, two rows of six
const SIDE_EDGE = 160; // longer edge of a map's canvas, in pixels

function makeSideBySide(data) {
  const element = (id) => document.getElementById(id);
  const colours = { signed: bytes(data.colours.diverging), unsigned: bytes(data.colours.sequential) };
  const filters = ["chain", "student", "method", "seed"].map(element);
  const [set, image, layer, kind, scale] = ["set", "image", "layer", "kind", "scale"].map(element);
  let limit = STUDENTS_PER_PAGE;
  const current = () => data.sets[set.selectedIndex];

  function fill(select, texts, selected = 0) {
    select.replaceChildren(...texts.map((text, place) => new Option(text, String(place), false, place === selected)));
    select.closest(".control").hidden = texts.length < 2;
  }

  function fillFilter(select) {
    const values = [...new Set(current().students.map((student) => String(student[select.id])))];
    const texts = values.map((value) => (select.id === "seed" ? `Seed ${value}` : value));
    select.replaceChildren(new Option("All", ""), ...values.map((value, place) => new Option(texts[place], value)));
    select.closest(".control").hidden = values.length < 2;
    // Students of one seed differ in what the study compares.
    if (select.id === "seed" && values.length < current().students.length) select.value = values[0];
  }

  function open() {
    const { images, layers, kinds } = current();
    fill(image, images.map(({ label, id }) => `${label} · ${id}`));
    fill(layer, layers, layers.length - 1);
    fill(kind, kinds.map(({ label }) => label));
    filters.forEach(fillFilter);
    limit = STUDENTS_PER_PAGE;
    render();
  }

  const selected = () => current().students.filter((student) => filters.every(({ id, value }) => value === "" || String(student[id]) === value));

  function newTile(name, picture, lines) {
    const figure = document.createElement("figure");
    const stack = document.createElement("div");
    const caption = document.createElement("figcaption");
    const img = document.createElement("img");
    stack.className = "stack";
    img.src = picture.uri;
    img.width = picture.width;
    img.height = picture.height;
    img.alt = "";
    figure.style.setProperty("--ratio", `${picture.width} / ${picture.height}`);
    stack.append(img);
    caption.append(...lines.map(([text, look, link]) => {
      const line = document.createElement("span");
      line.className = look;
      if (link) {
        const anchor = document.createElement("a");
        anchor.href = link;
        anchor.textContent = text;
        line.append(anchor);
      } else line.textContent = text;
      return line;
    }));
    figure.append(stack, caption);
    figure.setAttribute("aria-label", name);
    return figure;
  }

  function studentTile(student) {
    const [i, l, k] = [image, layer, kind].map((select) => select.selectedIndex);
    const picture = current().images[i];
    const { signed, label } = current().kinds[k];
    const [map, total] = student.maps[i][l][k] ?? [null, 0];
    const [name, right, confidence] = student.predictions[i];
    const words = describeMap({ signed }, map, [total, null, null], null);
    const missing = student.has[l] ? "" : "no such layer";
    const figure = newTile(student.label, picture, [
      [student.label, "name", student.page],
      [`${right ? "✓" : "✗"} ${name} ${Math.round(100 * confidence)}%`, right ? "right" : "wrong"],
      [missing || words.sum || words.quality, "sum"],
    ]);
    if (map) {
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${label} of ${student.label} at ${current().layers[l]}`);
      drawMap(canvas, map, {
        signed,
        colours: signed ? colours.signed : colours.unsigned,
        limit: scale.value === "own" ? 0 : current().limits[l][k],
        smooth: true,
        ratio: picture.width / picture.height,
        edge: SIDE_EDGE,
      });
      figure.querySelector(".stack").append(canvas);
    }
    return figure;
  }

  function render() {
    const students = selected();
    const picture = current().images[image.selectedIndex];
    const { signed, meaning } = current().kinds[kind.selectedIndex];
    const shown = students.slice(0, limit);
    element("tiles").classList.toggle("pixelated", Math.max(picture.width, picture.height) <= 96);
    element("tiles").replaceChildren(newTile("image", picture, [[picture.label, "name"], [picture.id, ""]]), ...shown.map(studentTile));
    element("count").textContent = `Showing ${shown.length} of ${students.length} ${students.length === 1 ? "student" : "students"}.`;
    element("meaning").textContent = meaning;
    element("more").hidden = students.length <= limit;
    element("more").textContent = `Show ${Math.min(STUDENTS_PER_PAGE, students.length - limit)} more`;
    document.querySelectorAll("[data-ramp]").forEach((ramp) => { ramp.hidden = (ramp.dataset.ramp === "signed") !== signed; });
    element("ramp-low").textContent = signed ? "lowers the score" : "zero, or lowest";
    element("ramp-high").textContent = signed ? "adds to the score" : "highest";
  }

  function move(step) {
    const count = image.options.length;
    image.selectedIndex = (image.selectedIndex + step + count) % count;
    render();
  }

  const opacity = () => Number(getComputedStyle(root).getPropertyValue("--opacity"));
  const title = () => `${image.selectedOptions[0].textContent} · ${kind.selectedOptions[0].textContent} at ${layer.selectedOptions[0].textContent}`;
  const parts = () => [...element("tiles").children].map((figure) => ({
    image: figure.querySelector("img"),
    canvas: figure.querySelector("canvas"),
    lines: [...figure.querySelectorAll("figcaption > span")].map((line) => line.textContent),
  }));
  const pixelated = () => element("tiles").classList.contains("pixelated");

  // The tiles are pictures, so the SVG contains the picture of the PNG.
  function saveSvg() {
    const sheet = drawSheet(title(), parts(), opacity(), pixelated());
    const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${sheet.width}" height="${sheet.height}">`;
    saveFile(`${fileName(title())}.svg`, new Blob([`${head}<image width="100%" height="100%" href="${sheet.toDataURL()}"/></svg>`], { type: "image/svg+xml" }));
  }

  set.addEventListener("change", open);
  for (const select of [image, layer, kind, scale]) select.addEventListener("change", render);
  for (const select of filters) select.addEventListener("change", () => { limit = STUDENTS_PER_PAGE; render(); });
  element("previous").addEventListener("click", () => move(-1));
  element("next").addEventListener("click", () => move(1));
  element("more").addEventListener("click", () => {
    const before = Math.min(limit, selected().length);
    limit += STUDENTS_PER_PAGE;
    render();
    element("tiles").children[before + 1].querySelector("a").focus({ preventScroll: true });
  });
  element("save-png").addEventListener("click", () =>
    drawSheet(title(), parts(), opacity(), pixelated()).toBlob((blob) => saveFile(`${fileName(title())}.png`, blob), "image/png"));
  element("save-svg").addEventListener("click", saveSvg);
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  element("controls").hidden = false;
  fill(set, data.sets.map(({ name }) => name));
  open();
}

document.addEventListener("DOMContentLoaded", () => {
  const payload = document.getElementById("payload");
  if (payload) makeSideBySide(JSON.parse(payload.textContent));
});
