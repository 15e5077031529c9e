// The script is in the head so that a stored theme applies before the first paint. Everything else waits for the document.
const root = document.documentElement;

// A browser can refuse storage to a page opened from disk. The theme then lasts until the page is closed.
const readTheme = () => { try { return localStorage.getItem("kdx-theme"); } catch { return null; } };
const storeTheme = (theme) => { try { localStorage.setItem("kdx-theme", theme); } catch { /* no storage */ } };
const stored = readTheme();
if (stored === "dark" || stored === "light") root.dataset.theme = stored;

function themeButton() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    storeTheme(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

// The button beside the command of a page that has one.
function copyButton() {
  const button = document.getElementById("copy");
  const command = document.getElementById("command");
  const status = document.getElementById("copied");
  if (!button) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(command.textContent);
    } catch {
      // Without access to the clipboard the command is selected, so that one key copies it.
      getSelection().selectAllChildren(command);
      copied = false;
    }
    button.textContent = copied ? "Copied" : "Selected";
    status.textContent = copied ? "Command copied" : "Command selected";
    setTimeout(() => { button.textContent = "Copy"; status.textContent = ""; }, 2000);
  });
}
