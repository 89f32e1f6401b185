// Formulas between $…$ and $$…$$ in the pages, by KaTeX; again after each change of the page.
document$.subscribe(({ body }) =>
  renderMathInElement(body, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "$", right: "$", display: false },
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  }),
);
