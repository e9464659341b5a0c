// Runs before the first paint, so that a chosen theme does not flash. "auto" leaves it to prefers-color-scheme.
try {
  const theme = JSON.parse(localStorage.getItem("prairie.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  /* no storage: the system decides */
}
