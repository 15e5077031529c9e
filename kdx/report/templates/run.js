document.addEventListener("DOMContentLoaded", () => {
  const payload = document.getElementById("payload");
  if (payload) makeGallery(JSON.parse(payload.textContent));
});
