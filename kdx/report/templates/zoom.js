// The dialog that shows one image with its maps, large. Escape closes it, and the arrow keys go to the previous and the next image.

const ZOOM_EDGE = 480; // longer edge of a map's canvas in the dialog, in pixels

// gallery: { layerName, tiles, neighbours, card, opacity }, functions of the gallery.
function makeZoom(gallery) {
  const dialog = document.getElementById("zoom");
  const tiles = document.getElementById("zoom-tiles");
  const title = document.querySelector("#zoom-title bdi");
  const about = document.getElementById("zoom-about");
  let current = 0;

  function fill() {
    const card = gallery.card(current);
    title.textContent = `${card.dataset.name} · ${card.dataset.id}`;
    const predictions = [...card.querySelectorAll(".predictions tr")].map((row) => {
      const [role, verdict, name, confidence] = [...row.children].map((part) => part.textContent);
      return `${role} ${verdict[0]} ${name} ${confidence}`;
    });
    about.textContent = [gallery.layerName(), ...predictions].join(" · ");
    dialog.style.setProperty("--ratio", card.style.getPropertyValue("--ratio"));
    const source = document.createElement("figure");
    const stack = document.createElement("div");
    const caption = document.createElement("figcaption");
    stack.className = "stack";
    stack.append(card.querySelector("img").cloneNode());
    caption.textContent = "image";
    source.append(stack, caption);
    tiles.replaceChildren(source, ...gallery.tiles(current, ZOOM_EDGE));
    const [before, after] = gallery.neighbours(current);
    document.getElementById("zoom-previous").disabled = before === null;
    document.getElementById("zoom-next").disabled = after === null;
  }

  function go(direction) {
    const next = gallery.neighbours(current)[direction];
    if (next === null) return;
    current = next;
    fill();
    // A button that was just disabled loses the focus, and with it the keyboard.
    if (!dialog.contains(document.activeElement) || document.activeElement.disabled) document.getElementById("zoom-close").focus();
  }

  function save() {
    const card = gallery.card(current);
    const parts = [...tiles.children].map((figure) => {
      const canvas = figure.querySelector("canvas");
      const lines = [...figure.querySelectorAll("figcaption > span")].map((line) => line.textContent);
      return {
        image: figure.querySelector("img"),
        canvas: canvas && !canvas.hidden ? canvas : null,
        lines: lines.length ? lines : [figure.textContent],
      };
    });
    const sheet = drawSheet(`${title.textContent} · ${gallery.layerName()}`, parts, gallery.opacity(), dialog.classList.contains("pixelated"));
    sheet.toBlob((blob) => saveFile(`${fileName(card.dataset.id)}.png`, blob), "image/png");
  }

  document.getElementById("zoom-previous").addEventListener("click", () => go(0));
  document.getElementById("zoom-next").addEventListener("click", () => go(1));
  document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
  document.getElementById("zoom-save").addEventListener("click", save);
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(0);
    if (event.key === "ArrowRight") go(1);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  return (index) => {
    current = index;
    fill();
    dialog.showModal();
  };
}
