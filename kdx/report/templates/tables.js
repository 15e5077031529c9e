// Tables of the macro data_table as CSV with all digits, and as LaTeX with the digits that the page shows.

// A table as rows of fields. A column with intervals becomes three columns.
function tableFields(table) {
  const rows = [...table.tBodies[0].rows].map((row) => [...row.cells]);
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const ranged = heads.map((_, column) => rows.some((row) => row[column].hasAttribute("data-low")));
  const numbers = (cell, names) => names.map((name) => cell.getAttribute(`data-${name}`) ?? "");
  const head = heads.flatMap((name, column) => (ranged[column] ? [name, `${name} low`, `${name} high`] : [name]));
  const body = rows.map((row) => row.flatMap((cell, column) => {
    const value = cell.getAttribute("data-value") ?? cell.querySelector(".value").textContent.trim();
    return ranged[column] ? [value, ...numbers(cell, ["low", "high"])] : [value];
  }));
  return [head, ...body];
}

const TEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "−": "$-$", "×": "$\\times$", "–": "--", "·": "$\\cdot$", "→": "$\\rightarrow$", "≥": "$\\geq$", "≤": "$\\leq$", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}" };

const asTex = (text) => text.replace(/[\\~^−×–·→≥≤<>|&%$#_{}]/g, (c) => TEX[c] ?? `\\${c}`);

// A tabular for the package booktabs. A second line of a cell follows in brackets.
function asLatex(table) {
  const line = (cells) => `${cells.join(" & ")} \\\\`;
  const heads = [...table.tHead.rows[0].cells].map((cell) => asTex(cell.textContent.trim()));
  const rows = [...table.tBodies[0].rows].map((row) => line([...row.cells].map((cell) => {
    const [value, detail] = ["value", "interval"].map((name) => asTex(cell.querySelector(`.${name}`)?.textContent.trim() ?? ""));
    return detail ? `${value} (${detail})` : value;
  })));
  const columns = `l${"r".repeat(heads.length - 1)}`;
  return [`\\begin{tabular}{${columns}}`, "\\toprule", line(heads), "\\midrule", ...rows, "\\bottomrule", "\\end{tabular}", ""].join("\n");
}

// Without access to the clipboard, a field with the text opens below the table, selected, so that one key copies it.
async function copyText(text, figure, status, name) {
  figure.querySelector("textarea")?.remove();
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = `${name} copied`;
  } catch {
    const area = document.createElement("textarea");
    area.readOnly = true;
    area.rows = 6;
    area.value = text;
    area.setAttribute("aria-label", `${name} of the table`);
    figure.append(area);
    area.select();
    status.textContent = `${name} selected`;
  }
  setTimeout(() => { status.textContent = ""; }, 4000);
}

// The buttons under every table of the macro data_table.
function tableButtons() {
  for (const figure of document.querySelectorAll("figure.datatable")) {
    const table = figure.querySelector("table");
    const title = figure.querySelector("figcaption").textContent.trim();
    const bar = document.createElement("p");
    const status = document.createElement("span");
    status.className = "note";
    status.setAttribute("role", "status");
    const csv = () => asCsv(tableFields(table));
    const actions = {
      "Copy CSV": () => copyText(csv(), figure, status, "CSV"),
      "Copy LaTeX": () => copyText(asLatex(table), figure, status, "LaTeX"),
      "Save CSV": () => saveFile(`${fileName(table.id)}.csv`, new Blob([csv()], { type: "text/csv" })),
    };
    bar.className = "buttons";
    bar.append(...Object.entries(actions).map(([name, act]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.setAttribute("aria-label", `${name} of the table “${title}”`);
      button.addEventListener("click", act);
      return button;
    }), status);
    figure.append(bar);
  }
}
