document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  copyButton();
  if (document.getElementById("payload")) makeGallery(JSON.parse(document.getElementById("payload").textContent));
});
