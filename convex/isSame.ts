/**
 * Says whether two values of Convex that came as JSON are equal.
 *
 * In place of `compareValues`, which first copies both: for a document of 1 MiB that is made of small values it takes
 * more than the 64 MB that Convex gives a function, so that such a document could be inserted, and never changed again.
 */
export function isSame(left: unknown, right: unknown): boolean {
  if (Object.is(left, right)) return true;
  if (typeof left !== "object" || left === null || typeof right !== "object" || right === null) return false;
  // No JSON has bytes, so what was imported with some is not what the worker brings.
  if (left instanceof ArrayBuffer || right instanceof ArrayBuffer) return false;
  if (Array.isArray(left) || Array.isArray(right)) {
    if (!Array.isArray(left) || !Array.isArray(right) || left.length !== right.length) return false;
    return left.every((item, place) => isSame(item, right[place]));
  }
  const fields = Object.entries(left);
  const others = new Map<string, unknown>(Object.entries(right));
  return fields.length === others.size && fields.every(([name, field]) => isSame(field, others.get(name)));
}
