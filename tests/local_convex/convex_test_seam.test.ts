import { AsyncLocalStorage } from "node:async_hooks";
import type { GenericSchema, SchemaDefinition } from "convex/server";
import { convexTest, type TestConvex } from "convex-test";
import { expect, test } from "vitest";
import { internalsOf } from "../../dev/local_convex/convex_test_seam.js";

type Test = TestConvex<SchemaDefinition<GenericSchema, boolean>>;

const fresh = () => convexTest<GenericSchema>({ modules: { "./_generated/api.js": async () => ({}) } });

/** A convex-test whose state is what `change` makes of the real one. */
function changed(change: (state: Record<string, unknown>) => unknown): Test {
  const storage = new AsyncLocalStorage<unknown>();
  const state = change({ ...internalsOf(fresh()) });
  return { finishInProgressScheduledFunctions: () => storage.run(state, async () => undefined) } as unknown as Test;
}

test("the installed convex-test is the one that is expected", () => {
  const internals = internalsOf(fresh());
  expect(Object.keys(internals.components)).toEqual([""]);
});

test("watching leaves nothing behind", () => {
  const before = AsyncLocalStorage.prototype.run;
  internalsOf(fresh());
  expect(AsyncLocalStorage.prototype.run).toBe(before);
});

test.each([
  ["no state", () => null, "its state does not show"],
  ["no system calls", (state: object) => ({ ...state, asyncSyscall: undefined }), "no system calls"],
  ["no metrics", (state: object) => ({ ...state, transactionManager: {} }), "nothing counts"],
  ["no root component", (state: object) => ({ ...state, components: {} }), "no store"],
  [
    "another store",
    (state: object) => ({ ...state, components: { "": { db: { get: () => null } } } }),
    "no startTransaction()",
  ],
])("a convex-test with %s is refused, with the reason", (_, change, reason) => {
  expect(() => internalsOf(changed(change))).toThrow(reason);
  expect(() => internalsOf(changed(change))).toThrow("Install convex-test 0.0.60");
});
