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

// Whether what stands here stands on a dark page.
function isDark(element) {
  for (let at = element; at; at = at.parentElement) {
    const [red, green, blue, alpha = 1] = getComputedStyle(at).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
    if (alpha > 0) return 0.3 * red + 0.59 * green + 0.11 * blue < 128;
  }
  return false;
}

// The figure as the kernel drew it, or in the dark template where that is told and the page is dark.
function read(text, dark, el) {
  const figure = JSON.parse(text), own = figure.layout?.template?.layout?.paper_bgcolor;
  if (!dark || !own || !isDark(el)) return figure;
  const template = JSON.parse(dark), paper = template.layout.paper_bgcolor;
  const data = JSON.parse(JSON.stringify(figure.data).replaceAll(own, paper));
  return { data, layout: { ...figure.layout, template } };
}

const GONE = ["dead", "terminating", "restarting", "autorestarting"];

// Says since when there is no kernel: neither ipywidgets nor JupyterLab tell a view of each way in which one ends.
function watchKernel(model, drawing, el) {
  const sign = document.createElement("div");
  sign.className = "obc-lost";
  sign.style.cssText =
    "position: absolute; top: 4px; right: 4px; padding: 2px 8px; background: #B45309; color: white; font-size: 12px";
  const look = () => {
    const kernel = model.widget_manager?.kernel;
    const lost = kernel === null || kernel?.isDisposed || GONE.includes(kernel?.status) || drawing.comm_live === false;
    if (!lost) return sign.remove();
    if (sign.isConnected) return;
    const since = new Date().toLocaleTimeString([], { hourCycle: "h23" });
    sign.textContent = `no kernel since ${since}: this is how it was then; run the cell again`;
    el.append(sign);
  };
  return setInterval(look, 1000);
}

async function render({ model, el: place }) {
  const drawing = await told(model, "drawing");
  const Plotly = await (globalThis[KEY] ??= load(model));
  const el = document.createElement("div");
  place.style.position = "relative";
  place.append(el);
  const kernel = watchKernel(model, drawing, place);
  let busy = false, again = false, width = 0, dark = isDark(place);
  // What changes while a figure is drawn is drawn once, as it is then: a slow page must not fall behind. Its width is
  // given, since Plotly.Plots.resize takes a timer and may never answer.
  async function draw() {
    again = busy;
    if (busy) return;
    busy = true;
    do {
      again = false;
      width = el.offsetWidth;
      const { data, layout } = read(drawing.get("text"), model.get("dark"), place);
      // What is under the mouse is told again when it moves: asked for after each drawing, it makes a click slow.
      if (el._fullLayout) delete el._fullLayout._rehover;
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
  const recoloured = new MutationObserver(() => {
    if (dark === isDark(place)) return;
    dark = !dark;
    draw();
  });
  recoloured.observe(document.body, { attributes: true });
  await draw();
  el.on("plotly_click", (event) => click(model, event));
  return () => {
    drawing.off("change:text", draw);
    resized.disconnect();
    recoloured.disconnect();
    clearInterval(kernel);
    Plotly.purge(el);
  };
}

export default { render };
