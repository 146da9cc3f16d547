// What Python wrote into the page: the same tree as recording.py beside this folder. Arrays are decoded when
// they are first looked at, so a long recording opens as fast as a short one.

export type Index = number; // into `arrays`

export interface Recording {
  format: 1;
  title: string;
  made: Record<string, string>;
  call: Call;
  words: Words;
  arrays: { shape: number[]; type: "f4" | "i4" | "u1"; data: string }[];
  tensors: Record<string, Index>;
  passes: Pass[];
  sources: Record<string, [string, string][][]>;
  glossary: Record<string, { symbol: string; text: string }>;
  compare: Compare;
  omitted: Record<string, string>; // what could not be recorded, and why
}

export interface Words {
  queries: string[];
  keys: string[];
}

export interface Call {
  text: string;
  q: number[];
  k: number[];
  v: number[];
  dtype: string;
  mask: string;
  score: string;
  similarity: string;
  scale: number | null; // null: it has been applied among the scores
  batch: number;
  head: number;
}

export type PassName = "forward" | "splits" | "combine" | "dkv" | "dq" | "hopper";

export interface Pass {
  name: PassName;
  title: string;
  about: string;
  file: string;
  kernel: string;
  tile: [number, number];
  lengths: [number, number];
  grid: string[];
  programs: Program[];
  timeline?: Timeline | null;
  words?: Words | null; // where they are not the call's
  tensors?: Record<string, Index> | null; // likewise
}

export interface Program {
  id: number[];
  walks: "keys" | "rows" | "splits";
  owns: [number, number];
  split: number | null;
  stages: Stage[];
}

export interface Stage {
  kind: "start" | "step" | "end";
  tile: [number, number] | null;
  state: "cut" | "full" | null;
  moments: Moment[];
  head?: number | null; // of queries, where a program walks the rows of several
}

export interface Load {
  tensor: string;
  rows: Index; // the byte at which each row begins; -1: not read, 0 stands in for it
  column: number; // bytes from one column to the next
}

export interface Store {
  tensor: string;
  variable: string;
  rows: Index; // as of a load
  column: number;
}

export interface Moment {
  file: string;
  lines: [number, number];
  function: string;
  depth: number;
  equation: string;
  note: string;
  sets: Record<string, Index>;
  loads: Load[];
  stores: Store[];
  role?: string;
}

export interface Span {
  name: string;
  step: number;
  begin: number;
  end: number;
}

export interface Timeline {
  about: string;
  clocks: number;
  lanes: { name: string; unit: boolean; spans: Span[] }[];
}

export interface Compare {
  similarity: { name: string; equation: string; weights: Index }[];
  mask: { name: string; weights: Index; grid: string[]; visited: number; total: number }[];
  rounding: { dtype: string; keys: number[]; error: Index }[];
  bytes: { heads: number; element: number };
}

/** An array as a matrix: a vector is one column of rows, a number one cell. */
export interface Matrix {
  shape: number[];
  rows: number;
  columns: number;
  data: ArrayLike<number>;
  type: "f4" | "i4" | "u1";
}

function read(): Recording {
  const text = document.getElementById("recording")?.textContent ?? "";
  const found = JSON.parse(text) as Recording;
  if (found.format !== 1) throw new Error(`format ${String(found.format)}: this page reads format 1`);
  return found;
}

export const recording = read();

const decoded = new Map<Index, Matrix>();

export function matrix(index: Index): Matrix {
  let found = decoded.get(index);
  if (!found) {
    found = decode(index);
    decoded.set(index, found);
  }
  return found;
}

function decode(index: Index): Matrix {
  const kept = recording.arrays[index];
  if (!kept) throw new Error(`array ${index}: the recording has ${recording.arrays.length}`);
  const text = atob(kept.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const data =
    kept.type === "f4"
      ? new Float32Array(bytes.buffer)
      : kept.type === "i4"
        ? new Int32Array(bytes.buffer)
        : bytes;
  const shape = kept.shape;
  const columns = shape.length >= 2 ? (shape[shape.length - 1] ?? 1) : 1;
  const rows = columns === 0 ? 0 : data.length / columns;
  return { shape, rows, columns, data, type: kept.type };
}

/** A tensor of the head shown, such as q or out, as a pass has it; null where the recording has none. */
export function tensor(name: string, pass: Pass | null): Matrix | null {
  const index = pass?.tensors?.[name] ?? recording.tensors[name];
  return index === undefined ? null : matrix(index);
}

export function wordsOf(pass: Pass | null): Words {
  return pass?.words ?? recording.words;
}

export function at(x: Matrix, row: number, column: number): number {
  return x.data[row * x.columns + column] ?? NaN;
}
