// plotly.js comes once a page, from the kernel: loading it must not hold up the messages of each figure.
const KEY = Symbol.for("obc_tools.plotly");

function told(model, name) {
  return model.widget_manager.get_model(model.get(name).replace("IPY_MODEL_", ""));
}

async function load(model) {
  const source = await told(model, "library");
  const parts = [
    "const before = globalThis.Plotly, module = {exports: {}}, exports = module.exports, define = undefined;\n",
    source.get("text"),
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
  const drawing = await told(model, "drawing");
  const Plotly = await (globalThis[KEY] ??= load(model));
  let busy = false, again = false, width = 0;
  // What changes while a figure is drawn is drawn once, as it is then: a slow page must not fall behind. Its width is
  // given, since Plotly.Plots.resize takes a timer and may never answer.
  async function draw() {
    again = busy;
    if (busy) return;
    busy = true;
    do {
      again = false;
      width = el.offsetWidth;
      const { data, layout } = JSON.parse(drawing.get("text"));
      try {
        await Plotly.react(el, data, width ? { ...layout, width } : layout, {
          displaylogo: false,
          scrollZoom: layout.dragmode === "pan",
        });
      } catch (error) {
        console.error(error);
      }
    } while (again);
    busy = false;
  }
  drawing.on("change:text", draw);
  const resized = new ResizeObserver(() => el.offsetWidth && width !== el.offsetWidth && draw());
  resized.observe(el);
  await draw();
  el.on("plotly_click", (event) => click(model, event));
  return () => {
    drawing.off("change:text", draw);
    resized.disconnect();
    Plotly.purge(el);
  };
}

export default { render };
