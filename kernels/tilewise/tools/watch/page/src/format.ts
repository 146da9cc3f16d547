// Numbers as text.

/** A program's number without the dimensions of the grid that are not used. */
export function idOf(id: number[]): string {
  const last = id.findLastIndex((each) => each !== 0);
  return id.slice(0, Math.max(1, last + 1)).join(", ");
}

const MINUS = "−";

/** Nine significant digits tell every fp32 from its neighbours. */
export function exact(x: number, type: "f4" | "i4" | "u1" = "f4"): string {
  if (type === "u1") return x ? "true" : "false";
  if (type === "i4") return String(x);
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  if (x === 0) return Object.is(x, -0) ? "-0" : "0";
  return String(Number(x.toPrecision(9)));
}

/** As much as a term of a sum needs. */
export function short(x: number): string {
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : `${MINUS}∞`;
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  return (x < 0 ? MINUS : "") + text;
}

/** What fits into a cell of so many characters; "" where nothing does. */
export function brief(x: number, characters: number): string {
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : `${MINUS}∞`;
  if (Number.isInteger(x) && Math.abs(x) < 1e4) return (x < 0 ? MINUS : "") + String(Math.abs(x));
  const sign = x < 0 ? MINUS : "";
  for (const digits of [2, 1, 0]) {
    const text = sign + Math.abs(x).toFixed(digits);
    if (text.length <= characters) return text;
  }
  return "";
}

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(count: number): string {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) {
    count /= 1024;
    unit++;
  }
  return `${Number(count.toPrecision(3))} ${UNITS[unit]}`;
}
