// What the browser tests ask of a page; evaluated in it, so that one question is one call.
globalThis.probe = (() => {
  const panels = () => [...document.querySelectorAll("svg.panel")];
  const named = (panel) => `${panel.closest("figure").id}: ${panel.getAttribute("aria-label")}`;
  const controls = () =>
    [...document.querySelectorAll("a[href], summary, button, input, select, [tabindex='0']")].filter((one) => one.checkVisibility());
  const light = (colour) => {
    const parts = colour.match(/[\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const seen = []; // [place among the controls, outline] of everything that got the focus
  return {
    seen,
    /** Drawings without a value in sight, and figures without rows to download. */
    empty() {
      const bare = panels().filter(
        (panel) => ![...panel.querySelectorAll("[data-x][data-tip]")].some((mark) => mark.getBoundingClientRect().width > 1),
      );
      const lines = (figure) => decodeURIComponent(figure.querySelector("a[download$='.csv']").href).trim().split("\n");
      const without = [...document.querySelectorAll("figure")].filter((figure) => lines(figure).length < 2);
      return [...bare.map(named), ...without.map((figure) => figure.id)];
    },
    /** Every piece of text that is seen: text, pixels high, left, right, whether it scrolls inside a box of its own. */
    texts() {
      const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode, owner = node.parentElement;
        const apart = owner.closest("script, style, title, .hidden, .skip, .sub, sub, [hidden]");
        if (apart || !node.textContent.trim() || !owner.checkVisibility()) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const box = range.getBoundingClientRect(), drawing = owner.closest("svg");
        const size = parseFloat(getComputedStyle(owner).fontSize) * (drawing ? drawing.getScreenCTM().a : 1);
        const scrolls = Boolean(owner.closest(".scroll, pre"));
        if (box.width) found.push([node.textContent.trim(), size, box.left, box.right, scrolls]);
      }
      return found;
    },
    /** Pairs of labels of one drawing that cover each other. */
    covered() {
      const over = (a, b) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
      return panels().flatMap((panel) => {
        const labels = [...panel.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
        return labels.flatMap(([one, a], at) =>
          labels.slice(at + 1).filter(([, b]) => over(a, b)).map(([other]) => `${named(panel)}: ${one} | ${other}`),
        );
      });
    },
    /** Drawings in which the arrow keys do not walk through every value. */
    silent() {
      const tip = document.getElementById("tip");
      return panels().filter((panel) => {
        const marks = panel.querySelectorAll("[data-tip]"), active = new Set();
        panel.focus();
        for (const _ of marks) {
          panel.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
          if (!tip.hidden && tip.textContent) active.add(panel.querySelector(".active"));
        }
        return document.activeElement !== panel || active.size !== marks.length;
      }).map(named);
    },
    /** Notes from now on in `seen` what gets the focus; returns how many controls there are. */
    watch() {
      const known = controls();
      addEventListener("focusin", ({ target }) => seen.push([known.indexOf(target), getComputedStyle(target).outlineStyle]));
      return known.length;
    },
    /** Texts whose contrast with the ground is below 4.5 (WCAG AA). */
    faint() {
      const ground = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll("svg.panel text, p, td, th, figcaption")].filter((text) => {
        const style = getComputedStyle(text), own = light(text.closest("svg") ? style.fill : style.color);
        return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05) < 4.5;
      }).map((text) => text.textContent);
    },
  };
})();
