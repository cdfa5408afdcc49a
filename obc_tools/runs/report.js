const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  for (const source of document.querySelectorAll("script[data-figure]")) {
    const figure = JSON.parse(source.textContent);
    figure.layout.template = LOOKS[dark.matches ? "dark" : "light"].layout.template;
    Plotly.react(source.dataset.figure, figure.data, figure.layout, {responsive: true, displaylogo: false});
  }
}
draw();
dark.addEventListener("change", draw);
