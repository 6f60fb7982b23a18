import { compareValues, type Value } from "convex/values";

/** Greater than every value: closes a range of index keys from above. */
export const AFTER: unique symbol = Symbol("after every value");

/** The values of an index's fields, in order; a bound may be shorter than a key, and end in AFTER. */
export type IndexKey = readonly (Value | undefined | typeof AFTER)[];

/** Orders index keys as Convex does. A key sorts behind each of its own prefixes. */
export function compareKeys(left: IndexKey, right: IndexKey): number {
  const shared = Math.min(left.length, right.length);
  for (let position = 0; position < shared; position += 1) {
    const order = compareParts(left[position], right[position]);
    if (order !== 0) return order;
  }
  return left.length - right.length;
}

function compareParts(left: IndexKey[number], right: IndexKey[number]): number {
  if (left === right) return left === 0 ? compareValues(left, right as number) : 0;
  if (left === AFTER) return 1;
  if (right === AFTER) return -1;
  // compareValues wraps both sides in new arrays; strings and plain numbers are nearly all there is.
  if (typeof left === "string" && typeof right === "string") return compareStrings(left, right);
  if (typeof left === "number" && typeof right === "number" && left < right) return -1;
  if (typeof left === "number" && typeof right === "number" && left > right) return 1;
  return compareValues(left, right);
}

// The first code unit that may belong to a surrogate pair: from here UTF-16 order is not UTF-8 order.
const FIRST_SURROGATE = 0xd800;

function compareStrings(left: string, right: string): number {
  const shared = Math.min(left.length, right.length);
  for (let position = 0; position < shared; position += 1) {
    const a = left.charCodeAt(position);
    const b = right.charCodeAt(position);
    if (a !== b) return a < FIRST_SURROGATE || b < FIRST_SURROGATE ? a - b : compareValues(left, right);
  }
  return left.length - right.length;
}
