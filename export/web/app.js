// The page: a picture or the camera goes in, boxes and a list of objects come out.

import { Detector } from "./detector.js";

const MODEL = "model.onnx"; // beside this page

const element = (id) => document.getElementById(id);
const [view, stage] = [element("view"), element("stage")];
let detector = null;
let picture = null; // the ImageData on the stage
let stream = null; // the camera's, while it runs

function say(message, bad = false) {
  element("status").textContent = message;
  element("status").classList.toggle("bad", bad);
}

/** Runs a task, and says what went wrong if it fails. */
async function attempt(doing, task) {
  try {
    return await task();
  } catch (error) {
    say(`${doing}: ${error.message}`, true);
  }
}

async function loadModel(name, bytes) {
  say(`Loading ${name} …`);
  detector = await Detector.load(bytes);
  const names = Object.values(detector.names);
  const shown = names.slice(0, 8).join(", ") + (names.length > 8 ? ", …" : "");
  say(`${name} finds ${names.length} ${names.length === 1 ? "class" : "classes"}: ${shown}`);
  element("picture").disabled = element("camera").disabled = false;
  if (picture) await showObjects();
}

async function loadDefaultModel() {
  const response = await fetch(MODEL);
  if (!response.ok) {
    say(`Put an exported file beside this page as ${MODEL}, or choose one with "Another model".`);
    return;
  }
  await loadModel(MODEL, new Uint8Array(await response.arrayBuffer()));
}

/** Puts an image or a video's frame on the stage, and keeps its pixels. */
function take(source, width, height) {
  view.width = width;
  view.height = height;
  view.hidden = false;
  element("hint").hidden = true;
  const context = view.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  picture = context.getImageData(0, 0, width, height);
}

async function openPicture(file) {
  stopCamera();
  const bitmap = await createImageBitmap(file);
  take(bitmap, bitmap.width, bitmap.height);
  await showObjects();
}

async function showObjects() {
  const searched = picture;
  const started = performance.now();
  const found = await detector.detect(searched, Number(element("conf").value));
  const milliseconds = performance.now() - started;
  if (searched !== picture) return; // another one has come meanwhile
  draw(found);
  list(found, milliseconds);
}

function draw(found) {
  const context = view.getContext("2d");
  const line = Math.max(Math.round((view.width + view.height) / 600), 2);
  context.putImageData(picture, 0, 0);
  context.lineWidth = line;
  context.font = `${6 * line}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const { class: id, name, score, box: [x1, y1, x2, y2] } of [...found].reverse()) {
    const label = `${name} ${score.toFixed(2)}`;
    const top = Math.max(y1, 7 * line);
    context.strokeStyle = context.fillStyle = colour(id);
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.fillRect(x1 - line / 2, top - 7 * line, context.measureText(label).width + 2 * line, 7 * line);
    context.fillStyle = "#fff";
    context.fillText(label, x1 + line / 2, top);
  }
}

/** Keeps the hues of neighbouring classes far apart, however many there are. */
function colour(id) {
  return `hsl(${((id * 0.618) % 1) * 360} 75% 38%)`;
}

function list(found, milliseconds) {
  const objects = found.length === 1 ? "1 object" : `${found.length} objects`;
  element("count").textContent = `${objects}, ${Math.round(milliseconds)} ms`;
  element("found").replaceChildren(...found.map((each) => {
    const [item, patch, name, score] = ["li", "i", "span", "b"].map((tag) => document.createElement(tag));
    patch.style.background = colour(each.class);
    name.textContent = each.name;
    score.textContent = each.score.toFixed(2);
    item.dataset.detection = JSON.stringify(each);
    item.append(patch, name, score);
    return item;
  }));
}

async function startCamera() {
  if (!navigator.mediaDevices) throw new Error("browsers give it to https:// and localhost only");
  stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
  element("camera").textContent = "Stop the camera";
  await video.play();
  while (stream && video.srcObject === stream) {
    take(video, video.videoWidth, video.videoHeight);
    await showObjects();
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  element("camera").textContent = "Start the camera";
}

element("picture").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) attempt("This picture cannot be shown", () => openPicture(file));
});
element("model").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) attempt(`${file.name} cannot be used`, async () => loadModel(file.name, new Uint8Array(await file.arrayBuffer())));
});
element("camera").addEventListener("click", () => {
  if (stream) stopCamera();
  else attempt("The camera does not start", startCamera);
});
element("conf").addEventListener("input", ({ target }) => {
  element("conf-value").textContent = Number(target.value).toFixed(2);
  if (picture && detector && !stream) attempt("The model does not run", showObjects);
});
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  stage.addEventListener(event, (happened) => {
    happened.preventDefault();
    stage.classList.toggle("drop", over);
  });
}
stage.addEventListener("drop", ({ dataTransfer }) => {
  const [file] = dataTransfer.files;
  if (file && detector) attempt("This picture cannot be shown", () => openPicture(file));
});

attempt(`${MODEL} cannot be used`, loadDefaultModel);
