"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);

// The reader's preference first, then the button. Plots take their colours when drawn, so they are drawn anew.
function followTheme(redraw) {
  const root = document.documentElement;
  const set = dark => {
    root.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "light" : "dark"; $("theme").setAttribute("aria-pressed", dark);
    redraw();
  };
  $("theme").addEventListener("click", () => set(root.dataset.theme !== "dark"));
  set(matchMedia("(prefers-color-scheme: dark)").matches);
}
