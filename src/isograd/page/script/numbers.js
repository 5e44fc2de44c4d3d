// Numbers: arrays as they travel, and how the field writes a value.

const ARRAYS = {
  f4: Float32Array, f8: Float64Array,
  i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array,
};

/** A plain list (null is missing) or plotly's {dtype, bdata} as an array of numbers in which NaN is missing. */
function decoded(array) {
  if (!array) return [];
  if (Array.isArray(array)) return Float64Array.from(array, (value) => (value === null ? NaN : value));
  const text = atob(array.bdata);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[array.dtype](bytes.buffer);
}

/** `0.15`, `1.2e-9`, `25300`: `digits` significant ones, and an exponent where zeros would have to be counted. */
function written(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 2).replace("e+", "e").replace(/\.0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

const counted = (count, thing, things = `${thing}s`) => `${count} ${count === 1 ? thing : things}`;

const percent = (share) => `${written(100 * share, 2)} %`;

/** `a, b and 3 more` */
function listed(names, most = 3) {
  const more = names.length - most;
  return names.slice(0, most).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

const finite = Number.isFinite;

/** Smallest and largest of the finite entries that `keep` lets through; null where there are none. */
function span(values, keep = () => true) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (!finite(value) || !keep(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** Of a sorted list, by linear interpolation. */
function quantile(sorted, share) {
  const at = share * (sorted.length - 1);
  const below = Math.floor(at);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
}

/** The index of the entry of the rising `xs` that is nearest to `x`; -1 where there is none. */
function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}
