// How large the cells of a step are, for the room that there is.

export interface Sizes {
  token: number; // width of a cell that stands for a row or a key
  line: number; // its height
  dim: number; // width of a cell of head_dim
  thin: number; // its height, where a matrix lies on its side
  number: number; // width of a lone column of numbers
  label: number; // room for words
  isNarrow: boolean; // a phone: columns of numbers go below
}

export function sizesFor(
  room: number,
  [down, across]: [number, number],
  dims: number,
  numbers: number,
  zoom: number,
): Sizes {
  const isNarrow = room < 520;
  const label = isNarrow ? 46 : 64;
  const free = room - 2 * label - 28;
  const bound = (x: number, low: number, high: number): number =>
    Math.max(low, Math.min(high, Math.floor(x * 4) / 4)) * zoom;
  const number = isNarrow ? 34 : 42;
  const dim = bound((free * (isNarrow ? 0.27 : 0.24)) / dims, 0.25, 14);
  // The left column holds Q, or numbers.
  const first = Math.max(dims * (dim / zoom), (isNarrow ? 0 : numbers) * (number + 4));
  return {
    token: bound((free - first - dims * (dim / zoom)) / across, 4, 34),
    line: bound((isNarrow ? 190 : 204) / down, 4, 16),
    dim,
    thin: bound(64 / dims, 0.25, 8),
    number: Math.min(60, number * zoom), // a number needs no more
    label,
    isNarrow,
  };
}
