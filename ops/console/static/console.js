// What a page without a script cannot do: open dialogs, pause polling, take dropped pictures, fill in suggestions.
"use strict";

const IDLE_MS = 30 * 60 * 1000; // nobody looked for so long: stop asking
let touched = Date.now();
const isPublic = () => document.body.hasAttribute("data-public"); // a screen: nobody touches it
for (const kind of ["pointerdown", "keydown", "focus"]) {
  addEventListener(kind, () => { touched = Date.now(); }, { capture: true, passive: true });
}

for (const element of document.querySelectorAll("[data-scripted]")) element.hidden = false;

// -- dialogs
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id !== "dialog") return;
  const dialog = event.detail.target;
  if (!dialog.open) dialog.showModal();
  if (dialog.contains(document.activeElement) && document.activeElement !== dialog) return; // htmx kept the place
  (dialog.querySelector("[autofocus]") || dialog.querySelector("button, a"))?.focus();
});
document.addEventListener("click", (event) => {
  const closer = event.target.closest("[data-close]");
  const dialog = closer?.closest("dialog");
  if (dialog) {
    event.preventDefault();
    dialog.close();
  }
  const trouble = closer?.closest(".trouble");
  if (trouble && !dialog) {
    event.preventDefault();
    trouble.remove();
  }
});
document.addEventListener("keydown", (event) => { // what looks like a button is pressed like one
  if (event.key === " " && event.target.matches("a[role=button]")) {
    event.preventDefault();
    event.target.click();
  }
});

// -- live parts: not while the page is hidden, paused or forgotten
let paused = false;
document.addEventListener("htmx:beforeRequest", (event) => {
  if (!event.target.hasAttribute("data-live")) return;
  if (paused || document.hidden || (!isPublic() && Date.now() - touched > IDLE_MS)) event.preventDefault();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-pause]");
  if (!button) return;
  paused = !paused;
  button.setAttribute("aria-pressed", String(paused));
  button.textContent = paused ? "Resume updates" : "Pause updates";
});
const lost = (isLost) => { document.getElementById("lost").hidden = !isLost; };
document.addEventListener("htmx:sendError", () => lost(true));
document.addEventListener("htmx:afterOnLoad", () => { if (!isPublic()) lost(false); });
document.addEventListener("htmx:afterRequest", (event) => { if (isPublic()) lost(!event.detail.successful); });

// -- pictures
const show = (drop) => {
  const file = drop.querySelector("input").files[0];
  const image = drop.querySelector("img");
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = !file;
  if (file) image.src = URL.createObjectURL(file);
  drop.closest("[data-chooser]").querySelector("[data-clear]").hidden = !file;
};
const take = (drop, files) => {
  const picture = [...files].find((file) => file.type.startsWith("image/"));
  if (!picture) return;
  const transfer = new DataTransfer();
  transfer.items.add(picture);
  drop.querySelector("input").files = transfer.files;
  show(drop);
};
for (const drop of document.querySelectorAll("[data-drop]")) {
  drop.querySelector("input").addEventListener("change", () => show(drop));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(drop, event.dataTransfer.files);
  });
  const forget = () => { drop.querySelector("input").value = ""; show(drop); };
  const chooser = drop.closest("[data-chooser]");
  chooser.querySelector("[data-clear]").addEventListener("click", forget);
  for (const example of chooser.querySelectorAll("input[type=radio]")) example.addEventListener("change", forget);
}
document.addEventListener("paste", (event) => {
  const drop = document.querySelector("[data-drop]");
  if (drop && event.clipboardData.files.length) take(drop, event.clipboardData.files);
});

// -- suggestions
document.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-fill]");
  if (!chip) return;
  const input = document.querySelector(chip.dataset.fill);
  input.value = chip.dataset.value;
  input.form.requestSubmit();
});

// -- the review by keyboard
const review = document.getElementById("review");
if (review) {
  const focusCard = () => review.querySelector("[tabindex]")?.focus();
  const step = (way) => review.querySelector(".queue [aria-current]")?.closest("li")[way]?.querySelector("a").click();
  const press = (decision) => review.querySelector(`button[value=${decision}]`)?.click();
  const edit = () => { review.querySelector("[name=label]")?.focus(); review.querySelector("[name=label]")?.select(); };
  const next = () => step("nextElementSibling");
  const previous = () => step("previousElementSibling");
  const keys = {
    j: next, ArrowRight: next, k: previous, ArrowLeft: previous, e: edit, a: () => press("accept"), d: () => press("dismiss"),
  };
  document.addEventListener("htmx:afterSwap", () => { if (!review.querySelector("[autofocus]")) focusCard(); });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, textarea")) {
      if (event.key !== "Escape" || event.isComposing) return;
      event.target.value = event.target.defaultValue;
      focusCard();
    } else if (keys[event.key] && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey
               && !event.target.closest(".top")) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  if (!document.activeElement || document.activeElement === document.body) focusCard();
}

// -- held samples by keyboard: what is accepted leaves the focus to the next one
const held = document.getElementById("held");
if (held) {
  let place = -1; // of the card in focus
  const cards = () => [...held.querySelectorAll("li[tabindex]")];
  const focusAt = (number) => cards()[Math.max(0, Math.min(number, cards().length - 1))]?.focus();
  held.addEventListener("focusin", (event) => { place = cards().indexOf(event.target.closest("li")); });
  document.addEventListener("htmx:afterSwap", () => focusAt(place));
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("select, textarea, input:not([type=checkbox])")) return;
    if (event.key === "j") focusAt(place + 1);
    if (event.key === "k") focusAt(place - 1);
    if (event.key === "a") event.target.closest("#held li")?.querySelector("[name=only]")?.click();
  });
}
