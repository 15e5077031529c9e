document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  copyButton();
  plotButtons();
  if (document.getElementById("payload")) makeGallery(JSON.parse(document.getElementById("payload").textContent));
});
