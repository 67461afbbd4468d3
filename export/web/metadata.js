// Reads what an ONNX file says about itself. ONNX Runtime Web does not hand it on.

const METADATA_PROPS = 14; // the field of ONNX's ModelProto that holds pairs of key and value
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5]; // protobuf's wire types

/** Returns the metadata of an ONNX file, an object of strings. Throws an Error for bytes that are no ONNX file. */
export function readMetadata(bytes) {
  const metadata = {};
  for (const [field, value] of fieldsOf(bytes)) {
    if (field === METADATA_PROPS) {
      const pair = Object.fromEntries(fieldsOf(value));
      metadata[text(pair[1])] = text(pair[2]);
    }
  }
  return metadata;
}

/** Yields [number, bytes] of each field of a protobuf message that holds bytes, and skips the others. */
function* fieldsOf(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new Error("it is cut off");
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === BYTES) {
      const length = varint();
      if (at + length > bytes.length) throw new Error("it is cut off");
      yield [Math.floor(tag / 8), bytes.subarray(at, (at += length))];
    } else if (kind === VARINT) varint();
    else if (kind === FIXED64) at += 8;
    else if (kind === FIXED32) at += 4;
    else throw new Error("it is no ONNX file");
  }
}

function text(bytes = new Uint8Array()) {
  return new TextDecoder().decode(bytes);
}

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\", "'": "'", '"': '"' };
const WORDS = { True: true, False: false, None: null };

/**
 * Returns the value of a Python literal: numbers, strings, lists, tuples, dicts, True, False and None.
 * A dict becomes an object. Throws an Error for anything else; no code is run.
 */
export function pythonLiteral(source) {
  let at = 0;
  const skipSpaces = () => { while (/\s/.test(source[at] ?? "")) at++; };
  const fail = () => { throw new Error(`no value that can be read: ${source.slice(0, 60)}`); };

  function many(close, readOne) {
    at++;
    const items = [];
    for (skipSpaces(); source[at] !== close; skipSpaces()) {
      items.push(readOne());
      skipSpaces();
      if (source[at] === ",") at++;
      else if (source[at] !== close) fail();
    }
    at++;
    return items;
  }

  function entry() {
    const key = value();
    skipSpaces();
    if (source[at++] !== ":") fail();
    return [key, value()];
  }

  function string(quote) {
    let result = "";
    for (at++; source[at] !== quote; at++) {
      if (at >= source.length) fail();
      if (source[at] !== "\\") { result += source[at]; continue; }
      const code = /^(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))/.exec(source.slice(++at, at + 9));
      if (code) {
        result += String.fromCodePoint(parseInt(code[1] ?? code[2] ?? code[3], 16));
        at += code[0].length - 1;
      } else if (source[at] in ESCAPES) result += ESCAPES[source[at]];
      else fail();
    }
    at++;
    return result;
  }

  function value() {
    skipSpaces();
    const first = source[at];
    if (first === "{") return Object.fromEntries(many("}", entry));
    if (first === "[") return many("]", value);
    if (first === "(") return many(")", value);
    if (first === "'" || first === '"') return string(first);
    const word = /^[\w.+-]+/.exec(source.slice(at))?.[0] ?? fail();
    at += word.length;
    if (word in WORDS) return WORDS[word];
    const number = Number(word);
    return Number.isNaN(number) ? fail() : number;
  }

  const result = value();
  skipSpaces();
  return at === source.length ? result : fail();
}
