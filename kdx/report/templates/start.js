document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  copyButton();
  plotButtons();
  tableButtons();
});
