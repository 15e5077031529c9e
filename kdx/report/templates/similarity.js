// The value of the cell under the pointer, or of the one that the arrow keys have reached, in words beside the heat map.
function heatMaps() {
  for (const svg of document.querySelectorAll("svg.heat")) {
    const figure = svg.closest("figure");
    const readout = figure.querySelector(".readout");
    const cells = new Map([...svg.querySelectorAll("rect[data-row]")].map((cell) => [`${cell.dataset.row},${cell.dataset.column}`, cell]));
    let current = null;
    const show = (cell) => {
      if (current) current.classList.remove("current");
      current = cell;
      cell.classList.add("current");
      cell.parentNode.append(cell); // so that no neighbour covers its outline
      for (const text of svg.querySelectorAll("text[pointer-events]")) svg.append(text); // nor the cell its own number
      readout.textContent = cell.querySelector("title").textContent;
    };
    svg.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("rect[data-row]");
      if (cell) show(cell);
    });
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    svg.parentNode.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      const { row, column } = current ? current.dataset : { row: 0, column: 0 };
      const next = current ? cells.get(`${Number(row) + step[0]},${Number(column) + step[1]}`) : cells.get("0,0");
      if (next) show(next);
      event.preventDefault();
    });
  }
}

document.addEventListener("DOMContentLoaded", heatMaps);
