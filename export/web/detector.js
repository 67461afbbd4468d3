// Finds objects with an ONNX file from `yolokd export`, as ../detect.py does: the same boxes.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { pythonLiteral, readMetadata } from "./metadata.js";

const GREY = 114; // the network was trained with images padded in this grey
const MAX_ROWS = 300;
const ONE = 2048; // the weight 1 in OpenCV's integers

export class Detector {
  /** Loads an ONNX file, given as a Uint8Array. Throws an Error that says what is wrong with it. */
  static async load(bytes) {
    const metadata = readMetadata(bytes);
    const read = (key, missing) => (key in metadata ? pythonLiteral(metadata[key]) : missing);
    const task = metadata.task ?? "detect";
    if (task !== "detect") throw new Error(`this page shows upright boxes, and its task is ${task}; use detect.py`);
    return new Detector(await ort.InferenceSession.create(bytes), read);
  }

  constructor(session, read) {
    this.session = session;
    this.names = read("names", {});
    this.stride = read("stride", 32);
    const [input] = session.inputMetadata;
    const [output] = session.outputMetadata;
    if (session.inputMetadata.length !== 1 || input.shape?.length !== 4 || output.shape?.length !== 3) {
      throw new Error("not a YOLO detector: other tensors than one image and one result");
    }
    if (input.type !== "float32") throw new Error(`takes ${input.type} images: export it without quantize=16`);
    this.input = input.name;
    this.output = output.name;
    this.batch = Number.isInteger(input.shape[0]) ? input.shape[0] : 1;
    // With an end-to-end head or an embedded NMS, the output is final rows of x1, y1, x2, y2, score, class.
    this.final = read("end2end", false) || read("args", {}).nms === true || output.shape[2] === 6;
    this.dynamic = !input.shape.slice(2).every(Number.isInteger);
    this.size = this.dynamic ? read("imgsz", [640, 640]) : input.shape.slice(2);
  }

  /**
   * Returns the objects in an ImageData that score above `conf`, best first: {class, name, score, box}, with the box
   * x1, y1, x2, y2 in pixels of the image. A box that overlaps a better one of its class by more than `iou` is dropped.
   */
  async detect(image, conf = 0.25, iou = 0.7) {
    const { pixels, width, height, scale, offset } = letterbox(image, this.size, this.dynamic ? this.stride : 0);
    const tensor = new Float32Array(this.batch * pixels.length);
    for (let i = 0; i < this.batch; i++) tensor.set(pixels, i * pixels.length);
    const shape = [this.batch, 3, height, width];
    const results = await this.session.run({ [this.input]: new ort.Tensor("float32", tensor, shape) });
    const { data, dims } = results[this.output];
    const rows = this.final ? finalRows(data, dims, conf) : suppress(candidates(data, dims, conf), iou);
    return rows.slice(0, MAX_ROWS).map((row) => ({
      class: row.class,
      name: this.names[row.class] ?? String(row.class),
      score: row.score,
      box: row.box.map((side, i) => clamp((side - offset[i % 2]) / scale[i % 2], i % 2 ? image.height : image.width)),
    }));
  }
}

function clamp(value, most) {
  return Math.min(Math.max(value, 0), most);
}

/**
 * Scales an image to fit into size [height, width], and pads it with grey on all sides, centred; with a stride, only to
 * the next multiple of it. Returns the pixels as red, green and blue planes in 0..1, with scale and offset (x, y).
 */
function letterbox(image, [height, width], stride) {
  const ratio = Math.min(height / image.height, width / image.width);
  const inner = [image.width, image.height].map((side) => Math.max(roundHalfToEven(side * ratio), 1));
  let spare = [width - inner[0], height - inner[1]];
  if (stride) spare = spare.map((side) => side % stride);
  const [outerWidth, outerHeight] = [inner[0] + spare[0], inner[1] + spare[1]];
  const [left, top] = spare.map((side) => Math.floor(side / 2));
  const area = outerWidth * outerHeight;
  const pixels = new Float32Array(3 * area).fill(GREY / 255);
  const [columns, rows] = [neighbours(image.width, inner[0]), neighbours(image.height, inner[1])];
  for (let y = 0; y < inner[1]; y++) {
    for (let x = 0; x < inner[0]; x++) {
      const at = (top + y) * outerWidth + left + x;
      for (let c = 0; c < 3; c++) pixels[c * area + at] = interpolate(image, rows[y], columns[x], c) / 255;
    }
  }
  const scale = [inner[0] / image.width, inner[1] / image.height];
  return { pixels, width: outerWidth, height: outerHeight, scale, offset: [left, top] };
}

/** Returns for each new position the two old ones that it lies between, and the weight of each in 0..ONE. */
function neighbours(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const position = clamp(((i + 0.5) * from) / to - 0.5, from - 1);
    const low = Math.floor(position);
    const weight = Math.round((position - low) * ONE);
    return { low, high: Math.min(low + 1, from - 1), lowWeight: ONE - weight, highWeight: weight };
  });
}

/** Returns a colour between four pixels, in integers as OpenCV's INTER_LINEAR computes it, so that both round alike. */
function interpolate(image, row, column, colour) {
  const along = (y) => {
    const value = (x) => image.data[4 * (y * image.width + x) + colour];
    return (value(column.low) * column.lowWeight + value(column.high) * column.highWeight) >> 4;
  };
  return (((row.lowWeight * along(row.low)) >> 16) + ((row.highWeight * along(row.high)) >> 16) + 2) >> 2;
}

/** Rounds as Python does. */
function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

/** Returns the rows of a model that chooses its boxes itself. data: (batch, rows, 6). */
function finalRows(data, [, count], conf) {
  return Array.from({ length: count }, (_, i) => data.subarray(6 * i, 6 * i + 6))
    .filter((row) => row[4] > conf)
    .map((row) => ({ box: [...row.subarray(0, 4)], score: row[4], class: Math.trunc(row[5]) }));
}

/** Returns a row for each anchor whose best class scores above `conf`. data: (batch, 4 + classes, anchors). */
function candidates(data, [, fields, anchors], conf) {
  const rows = [];
  for (let i = 0; i < anchors; i++) {
    let best = 4;
    for (let k = 5; k < fields; k++) if (data[k * anchors + i] > data[best * anchors + i]) best = k;
    const score = data[best * anchors + i];
    if (!(score > conf)) continue;
    const [x, y, w, h] = [0, 1, 2, 3].map((k) => data[k * anchors + i]);
    rows.push({ box: [x - w / 2, y - h / 2, x + w / 2, y + h / 2], score, class: best - 4 });
  }
  return rows;
}

/** Returns the rows without those that overlap a better one of their class by more than `iou`, best first. */
function suppress(rows, iou) {
  const kept = [];
  for (const row of rows.sort((a, b) => b.score - a.score)) {
    if (!kept.some((better) => better.class === row.class && overlap(better.box, row.box) > iou)) kept.push(row);
  }
  return kept;
}

function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  const shared = Math.max(width, 0) * Math.max(height, 0);
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return shared / (area(a) + area(b) - shared);
}
