// The tour of a first visit: a dialog that points to parts of the Overview, one after the other.
"use strict";

(() => {
  const SEEN = "ratchet-tour";
  const GAP = 12; // pixels between the dialog and what it points to
  const dialog = document.getElementById("tour");
  if (!dialog) return;
  const steps = [...document.querySelectorAll("#tour-steps li")];
  const part = (id) => document.getElementById(id);
  const button = (name) => dialog.querySelector(`[data-tour=${name}]`);
  let current = -1;

  const remembered = () => { // true where nothing can be remembered: no tour at every visit
    try { return localStorage.getItem(SEEN) !== null; } catch { return true; }
  };
  const remember = () => {
    try { localStorage.setItem(SEEN, "seen"); } catch { /* then it was asked for by its link */ }
  };
  const mark = () => {
    for (const old of document.querySelectorAll(".toured")) old.classList.remove("toured");
    const target = current < 0 ? null : part(steps[current].dataset.target);
    target?.classList.add("toured");
    return target;
  };
  const place = (target) => {
    dialog.style.left = dialog.style.top = "";
    if (!target || innerWidth <= 820) return; // the style sheet puts it at the bottom
    const box = target.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = dialog;
    const beside = box.right + GAP + width <= innerWidth && box.width < innerWidth / 3;
    const below = box.bottom + GAP + height <= innerHeight;
    const left = beside ? box.right + GAP : box.left;
    const top = beside ? box.top : below ? box.bottom + GAP : box.top - GAP - height;
    dialog.style.left = `${Math.max(GAP, Math.min(left, innerWidth - width - GAP))}px`;
    dialog.style.top = `${Math.max(GAP, Math.min(top, innerHeight - height - GAP))}px`;
  };
  const show = (index) => {
    current = index;
    part("tour-count").textContent = `${index + 1} of ${steps.length}`;
    part("tour-title").textContent = steps[index].dataset.title;
    part("tour-text").textContent = steps[index].textContent;
    button("back").hidden = index === 0;
    const last = index === steps.length - 1;
    button("next").textContent = last ? "Done" : "Next";
    button("end").hidden = last;
    if (!dialog.open) dialog.show();
    const target = mark();
    target?.scrollIntoView({ block: "center", behavior: "instant" });
    place(target);
    part("tour-title").focus({ preventScroll: true }); // a screen reader reads the step
  };
  const end = () => {
    current = -1;
    mark();
    dialog.close();
    remember();
    part("main").focus({ preventScroll: true });
  };

  button("next").addEventListener("click", () => (current + 1 < steps.length ? show(current + 1) : end()));
  button("back").addEventListener("click", () => show(current - 1));
  button("end").addEventListener("click", end);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && dialog.open && !part("dialog").open) end();
  });
  document.addEventListener("htmx:afterSwap", () => { if (dialog.open) place(mark()); }); // the parts are new ones
  addEventListener("resize", () => { if (dialog.open) place(mark()); });
  if (new URLSearchParams(location.search).has("tour") || !remembered()) show(0);
})();
