"use strict";
// Values of points: under the pointer, under a finger, and with the arrow keys once a drawing has the focus.
(() => {
  const tip = document.getElementById("tip");
  let active = null;
  const hide = () => {
    tip.hidden = true;
    if (active) active.classList.remove("active");
    active = null;
  };
  const show = (mark) => {
    if (active) active.classList.remove("active");
    active = mark;
    mark.classList.add("active");
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    place();
  };
  const place = () => {
    const box = active.getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) return hide();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  const nearest = (marks, x, y) => {
    const away = (mark) => {
      const box = mark.getBoundingClientRect();
      return Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
    };
    const found = marks.reduce((best, mark) => (best && away(best) <= away(mark) ? best : mark), null);
    return found && away(found) < 24 ? found : null; // a finger is wider than a mark
  };
  for (const panel of document.querySelectorAll("svg.panel")) {
    const marks = [...panel.querySelectorAll("[data-x]")].filter((mark) => mark.querySelector("title"));
    for (const mark of marks) {
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      title.remove(); // else the browser shows it a second time
    }
    const order = marks.slice().sort((a, b) => a.dataset.x - b.dataset.x);
    panel.addEventListener("pointerover", (event) => (event.target.dataset.tip ? show(event.target) : hide()));
    panel.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide()); // a finger leaves at once
    panel.addEventListener("pointerdown", (event) => {
      const mark = event.target.dataset.tip ? event.target : nearest(marks, event.clientX, event.clientY);
      if (mark) show(mark);
      event.stopPropagation();
    });
    panel.addEventListener("blur", hide);
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step || !order.length) return;
      event.preventDefault();
      const at = order.indexOf(active);
      show(order[at < 0 ? (step > 0 ? 0 : order.length - 1) : (at + step + order.length) % order.length]);
    });
  }
  addEventListener("pointerdown", hide);
  addEventListener("scroll", () => active && place(), { passive: true }); // reaching a drawing by Tab scrolls to it
})();
