// The page of a scan: NiiVue draws, this script gives it volumes and moves what the reader moves.
// The scan's numbers are 1 from its lowest, foremost and rightmost slice (of the patient).
"use strict";

const scan = JSON.parse(document.getElementById("scan").textContent);
const byId = (id) => document.getElementById(id);
const SLICES = { all: 3, axial: 0, coronal: 1, sagittal: 2 };

function bytes(base64) {
  const letters = atob(base64);
  const array = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) array[i] = letters.charCodeAt(i);
  return array;
}

async function unzipped(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// A script of the page's own, which its content security policy knows by its sum.
async function loadViewer() {
  const script = document.createElement("script");
  script.type = "module";
  script.textContent = await unzipped(byId("viewer-script").textContent);
  document.head.append(script);
  const begun = performance.now();
  while (!globalThis.Niivue) {
    if (performance.now() - begun > 60000) throw new Error("its script does not run");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return globalThis.Niivue;
}

function hasWebGL() {
  const context = document.createElement("canvas").getContext("webgl2");
  context?.getExtension("WEBGL_lose_context")?.loseContext();
  return context !== null;
}

// Voxels of a volume (x to the right, y to the front, z to the head) and of the scan (D, H, W).
function toScan(vox) {
  const page = [vox[2], scan.shape[1] - 1 - vox[1], scan.shape[2] - 1 - vox[0]];
  return page.map((at, axis) =>
    Math.min(scan.start[axis] + Math.floor((at + 0.5) * scan.step[axis]), scan.stop[axis] - 1));
}

// Which voxel of a volume a voxel of the scan lies in.
function toVoxel(index, step, size) {
  const [z, y, x] = index.map((at, axis) => Math.floor((at - scan.start[axis]) / step[axis]));
  return [size[0] - 1 - x, size[1] - 1 - y, z];
}

// Where a voxel of the scan lies in the first volume of a view, as shares of its sides.
function toFraction(index, view, step) {
  const [x, y, z] = view.volumes[0].dimsRAS.slice(1, 4);
  const page = index.map((at, axis) =>
    (at - scan.start[axis] + 0.5) / (step[axis] * [z, y, x][axis]));
  return [1 - page[2], 1 - page[1], page[0]];
}

class Page {
  constructor(slices, space) {
    Object.assign(this, { slices, space });
    this.at = scan.at;
    this.view = "all";
  }

  draw() {
    if (this.view === "all") layOut(this.slices);
    else if (this.view !== "3d") {
      this.slices.clearCustomLayout();
      this.slices.setSliceType(SLICES[this.view]);
    }
  }

  go(index) {
    this.at = index;
    this.point(this.slices, scan.step);
    this.point(this.space, scan.all.lungs.step);
    this.tell();
  }

  point(view, step) {
    toFraction(this.at, view, step).forEach((share, i) => { view.scene.crosshairPos[i] = share; });
    view.drawScene();
  }

  // What lies under the cross-hair, in words.
  tell() {
    const parts = ["axial", "coronal", "sagittal"].map((name, axis) => {
      byId(name).value = this.at[axis] + 1;
      byId(`${name}-at`).value = `${this.at[axis] + 1} of ${scan.size[axis]}`;
      return `${name} ${this.at[axis] + 1}`;
    });
    this.slices.volumes.forEach((volume, i) => {
      const size = volume.dimsRAS.slice(1, 4);
      const [x, y, z] = toVoxel(this.at, scan.volumes[i].step, size);
      const raw = volume.img[x + size[0] * (y + size[1] * z)];
      const value = scan.volumes[i].low + raw * (scan.volumes[i].high - scan.volumes[i].low) / 255;
      const said = scan.volumes[i].kind === "mask" ? (raw ? "yes" : "no")
        : value.toFixed(scan.volumes[i].digits);
      parts.push(`${scan.volumes[i].says} ${said.replace("-", "\u2212")}${scan.volumes[i].unit}`);
    });
    byId("place").textContent = parts.join("; ");
  }

  window(low, high) {
    const image = this.slices.volumes[0];
    [image.cal_min, image.cal_max] = [low, high];
    this.slices.updateGLVolume();
  }

  fade(i) {
    const on = byId(`show-${i}`).checked;
    const opacity = on ? byId(`fade-${i}`).value / 100 : 0;
    byId(`fade-${i}-at`).value = `${byId(`fade-${i}`).value} %`;
    this.slices.setOpacity(i, opacity);
    const inSpace = this.space.volumes.findIndex((volume) => volume.name === this.slices.volumes[i].name);
    if (inSpace > 0) this.space.setOpacity(inSpace, on ? Math.max(opacity, 0.05) : 0);
  }
}

// The axial slice large, the others beside it, or below where the page is narrow.
function layOut(view) {
  const box = byId("slices").parentElement;
  const wide = box.clientWidth > 1.35 * box.clientHeight;
  const places = wide
    ? [[0, 0, 0.6, 1], [0.6, 0, 0.4, 0.5], [0.6, 0.5, 0.4, 0.5]]
    : [[0, 0, 1, 0.58], [0, 0.58, 0.5, 0.42], [0.5, 0.58, 0.5, 0.42]];
  view.setCustomLayout(places.map((position, sliceType) => ({ sliceType, position })));
}

function pressed(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}

function listen(page) {
  ["axial", "coronal", "sagittal"].forEach((name, axis) => {
    byId(name).addEventListener("input", (event) => {
      const index = [...page.at];
      index[axis] = Number(event.target.value) - 1;
      page.go(index);
    });
  });
  const windows = [...document.querySelectorAll("[data-low]")];
  for (const button of windows) {
    button.addEventListener("click", () => {
      page.window(Number(button.dataset.low), Number(button.dataset.high));
      pressed(windows, button);
    });
  }
  const views = [...document.querySelectorAll("[data-view]")];
  for (const button of views) {
    button.addEventListener("click", () => {
      const view = button.dataset.view;
      byId("slices").parentElement.hidden = view === "3d";
      byId("space").parentElement.hidden = !(view === "3d" || view === "all");
      byId("views").classList.toggle("both", view === "all");
      for (const each of [page.slices, page.space]) each.resizeListener();
      page.view = view;
      page.draw();
      pressed(views, button);
    });
  }
  scan.volumes.forEach((volume, i) => {
    if (volume.kind === "image") return;
    for (const control of [`show-${i}`, `fade-${i}`]) {
      byId(control).addEventListener("input", () => page.fade(i));
    }
    page.fade(i);
  });
  for (const button of document.querySelectorAll("[data-at]")) {
    button.addEventListener("click", () => {
      page.go(JSON.parse(button.dataset.at));
      for (const row of document.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
      button.closest("tr").classList.add("chosen");
      byId("views").scrollIntoView({ block: "nearest" });
    });
  }
  // Keys of the slices' canvas; NiiVue's own would change what no control shows.
  const moves = {
    PageUp: [1, 0, 0], PageDown: [-1, 0, 0], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
    ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1],
  };
  byId("slices").addEventListener("keydown", (event) => {
    if (event.key === "Tab" || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopImmediatePropagation();
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    page.go(page.at.map((at, axis) =>
      Math.min(Math.max(at + move[axis], scan.start[axis]), scan.stop[axis] - 1)));
  }, true);
  byId("space").addEventListener("keydown", (event) => {
    if (event.key === "Tab" || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopImmediatePropagation();
    const turn = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] }[event.key];
    if (!turn) return;
    event.preventDefault();
    const { renderAzimuth, renderElevation } = page.space.scene;
    page.space.setRenderAzimuthElevation(renderAzimuth + turn[0], renderElevation + turn[1]);
  }, true);
}

async function volumesInto(view, names) {
  for (const name of names) {
    const volume = scan.all[name];
    await view.addVolumeFromUrl({
      url: `${name}.nii.gz`, name: `${name}.nii.gz`, buffer: bytes(byId(`volume-${name}`).textContent).buffer,
      colormap: volume.colours, opacity: 1, cal_min: volume.window[0], cal_max: volume.window[1],
    });
  }
}

async function open() {
  if (!hasWebGL()) throw new Error("this browser has no WebGL 2");
  const Niivue = await loadViewer();
  const options = {
    isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "",
    backColor: [0, 0, 0, 1], crosshairColor: [0.94, 0.89, 0.26, 0.8], fontColor: [0.84, 0.37, 0, 1],
    viewModeHotKey: "", clipPlaneHotKey: "", show3Dcrosshair: true, crosshairWidth: 0.8, crosshairWidthUnit: "mm",
    multiplanarShowRender: 0, textHeight: 0.035, isAntiAlias: true,
  };
  byId("stage").hidden = false;
  const slices = new Niivue(options);
  const space = new Niivue({ ...options, sliceType: 4 });
  await slices.attachToCanvas(byId("slices"), true);
  await space.attachToCanvas(byId("space"), true);
  for (const view of [slices, space]) {
    for (const [name, colours] of Object.entries(scan.colours)) view.addColormap(name, colours);
  }
  const [image, ...found] = scan.volumes.map((volume) => volume.name);
  await volumesInto(slices, [image]);
  byId("fallback").hidden = true;
  document.documentElement.dataset.firstPicture = String(Math.round(performance.now()));
  await volumesInto(slices, found);
  await volumesInto(space, scan.space);
  space.setRenderAzimuthElevation(200, 15);
  const page = new Page(slices, space);
  listen(page);
  slices.onLocationChange = (location) => {
    page.at = toScan(location.vox);
    page.point(space, scan.all.lungs.step);
    page.tell();
  };
  page.draw();
  page.go(scan.at);
  addEventListener("resize", () => page.draw());
  return page;
}

open().then(
  (page) => {
    globalThis.page = page;
    document.documentElement.dataset.viewer = "drawn";
  },
  (error) => {
    byId("stage").hidden = true;
    byId("fallback").hidden = false;
    byId("why").textContent = `The viewer cannot be shown (${error.message}); the picture can.`;
    document.documentElement.dataset.viewer = "failed";
  },
);
