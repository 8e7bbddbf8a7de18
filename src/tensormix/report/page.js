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
    const box = mark.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
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
    panel.addEventListener("pointerleave", hide);
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
  addEventListener("scroll", hide, { passive: true });
})();
