document.addEventListener("DOMContentLoaded", () => {
  sortableTables();
  const payload = document.getElementById("payload");
  if (payload) makeGallery(JSON.parse(payload.textContent));
});
