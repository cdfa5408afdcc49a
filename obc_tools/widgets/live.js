// plotly.js comes once a page, from the kernel: loading it must not hold up the messages of each figure.
const KEY = Symbol.for("obc_tools.plotly");

async function load(model) {
  const source = await model.widget_manager.get_model(model.get("library").replace("IPY_MODEL_", ""));
  const parts = [
    "const before = globalThis.Plotly, module = {exports: {}}, exports = module.exports, define = undefined;\n",
    source.get("code"),
    "\nglobalThis.Plotly = before;\nexport default module.exports;\n",
  ];
  const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  try {
    return (await import(url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

function click(model, event) {
  const [point] = event.points;
  const place = point.pointIndex ?? point.pointNumber;
  model.send({ trace: point.curveNumber, place: [place].flat(), x: point.x, y: point.y });
}

async function render({ model, el }) {
  const Plotly = await (globalThis[KEY] ??= load(model));
  let busy = false, again = false, width = el.offsetWidth;
  // What changes while a figure is drawn is drawn once, as it is then: a slow page must not fall behind.
  async function draw() {
    again = busy;
    if (busy) return;
    busy = true;
    try {
      do {
        again = false;
        const { data, layout } = JSON.parse(model.get("drawing"));
        await Plotly.react(el, data, layout, { displaylogo: false });
        if (width !== el.offsetWidth && el.offsetWidth) {
          width = el.offsetWidth;
          await Plotly.Plots.resize(el);
        }
      } while (again);
    } finally {
      busy = false;
    }
  }
  model.on("change:drawing", draw);
  await draw();
  el.on("plotly_click", (event) => click(model, event));
  const resized = new ResizeObserver(() => width !== el.offsetWidth && draw());
  resized.observe(el);
  return () => {
    model.off("change:drawing", draw);
    resized.disconnect();
    Plotly.purge(el);
  };
}

export default { render };
