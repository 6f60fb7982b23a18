import { ConvexError } from "convex/values";

/**
 * Passes if the argument is an integer from `low` to `high`, both included.
 *
 * @throws ConvexError `invalid_argument` that names the argument, the bound and the value.
 */
export function requireIntegerWithin(name: string, value: number, low: number, high: number): void {
  if (Number.isInteger(value) && value >= low && value <= high) return;
  throw new ConvexError({
    code: "invalid_argument",
    message: `${name} must be an integer from ${low} to ${high}, not ${value}.`,
  });
}
