/**
 * The one place that reaches into convex-test.
 *
 * convex-test keeps its store private and scans all of it for every query. What is taken over here, on one instance and
 * without changing its code: where a query finds its documents (an index instead of a scan), when the results of a query
 * are forgotten, what is checked before a document is written, and the word that a transaction has committed.
 * Everything else (transactions, validators, schema, system calls, pagination) stays convex-test's own.
 *
 * It rests on names that convex-test does not promise, so the version is pinned exactly and everything that is used is
 * looked for at start: a convex-test that looks different is refused, with the reason.
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { createRequire } from "node:module";
import type { GenericSchema, SchemaDefinition } from "convex/server";
import type { Value } from "convex/values";
import type { TestConvex } from "convex-test";
import type { Document } from "./document_index.js";

const KNOWN_VERSION = "0.0.60";

export type RangeExpression = {
  readonly type: "Eq" | "Gt" | "Gte" | "Lt" | "Lte";
  readonly fieldPath: string;
  readonly value: unknown;
};

export type SerializedQuery = {
  readonly source:
    | { readonly type: "FullTableScan"; readonly tableName: string }
    | { readonly type: "IndexRange"; readonly indexName: string; readonly range: readonly RangeExpression[] }
    | { readonly type: "Search"; readonly indexName: string };
};

/** What convex-test makes of a query: where its documents are, sorted, and what is left to do with them. */
export type QueryPlan = {
  sortedDocs: { readonly length: number; readonly [position: number]: Document };
  readonly filterFn: (document: Document) => boolean;
  readonly limit: number | null;
  readonly fieldPathsToSortBy: readonly string[];
  readonly order: "asc" | "desc";
};

export type PageRequest = { readonly query: SerializedQuery; readonly cursor: string | null };

/** The part of convex-test's store that is used or taken over. */
export type Store = {
  readonly _documents: Readonly<Record<string, Document>>;
  /** One layer of pending writes for each level of nested transactions; null is a delete. */
  readonly _writes: readonly Readonly<Record<string, Document | null>>[];
  readonly _schema: {
    readonly tables: ReadonlyMap<string, { readonly indexes: readonly { readonly fields: readonly string[] }[] }>;
  } | null;
  _nextQueryId: number;
  get(table: string | undefined, id: string): Document | null;
  startTransaction(): void;
  commit(timestamp: bigint | null): void;
  rollbackWrites(): void;
  stashWrites(): Readonly<Record<string, Document | null>>[];
  restoreWrites(stashed: Readonly<Record<string, Document | null>>[]): void;
  startQuery(query: SerializedQuery): number;
  queryNext(queryId: number): { value: Document | null; done: boolean };
  paginate(request: PageRequest): unknown;
  _addWrite(id: string, document: Document | null): void;
  _validate(table: string, fields: Record<string, Value | undefined>): void;
  _iterateDocs(table: string, found: (document: Document) => void): void;
  _resolveQuerySource(query: SerializedQuery): QueryPlan;
};

export type MetricsTracker = { trackIndexRange(): void; trackRead(bytes: number): void };

/** The state of one convexTest(): its store, its transactions and its system calls. */
export type Internals = {
  readonly components: Readonly<Record<string, { readonly db: Store }>>;
  readonly transactionManager: { getMetricsTracker(): MetricsTracker | null };
  syscall: (op: string, jsonArgs: string) => string;
  asyncSyscall: (op: string, jsonArgs: string) => Promise<string>;
};

const STORE_METHODS = [
  "get",
  "startTransaction",
  "commit",
  "rollbackWrites",
  "stashWrites",
  "restoreWrites",
  "startQuery",
  "queryNext",
  "paginate",
  "_addWrite",
  "_validate",
  "_iterateDocs",
  "_resolveQuerySource",
] as const satisfies readonly (keyof Store)[];

/**
 * The internals of a convexTest() that nothing has run in yet.
 *
 * @throws Error when convex-test is not the one that this was written for.
 */
export function internalsOf(test: TestConvex<SchemaDefinition<GenericSchema, boolean>>): Internals {
  const { version } = createRequire(import.meta.url)("convex-test/package.json") as { version: string };
  if (version !== KNOWN_VERSION) refuse(`version ${KNOWN_VERSION} is expected and ${version} is installed`);
  const internals = captureContext(() => void test.finishInProgressScheduledFunctions());
  const { syscall, asyncSyscall, transactionManager } = internals;
  if (typeof syscall !== "function" || typeof asyncSyscall !== "function") refuse("there are no system calls");
  if (typeof transactionManager?.getMetricsTracker !== "function") refuse("nothing counts what a transaction does");
  const store = internals.components[""]?.db;
  if (store === undefined) return refuse("there is no store for the root component");
  for (const method of STORE_METHODS) {
    if (typeof store[method] !== "function") refuse(`the store has no ${method}()`);
  }
  if (typeof store._documents !== "object" || !Array.isArray(store._writes) || typeof store._nextQueryId !== "number") {
    refuse("the store keeps its documents elsewhere");
  }
  return internals;
}

// convex-test hands its state from call to call through an AsyncLocalStorage, and nowhere else. One call that does
// nothing, watched, is the only way to lay hands on it.
function captureContext(call: () => void): Internals {
  const original = AsyncLocalStorage.prototype.run;
  let found: Internals | undefined;
  AsyncLocalStorage.prototype.run = function run(
    this: AsyncLocalStorage<unknown>,
    ...args: Parameters<typeof original>
  ) {
    const state: unknown = args[0];
    if (typeof state === "object" && state !== null && "components" in state && "transactionManager" in state) {
      found = state as Internals;
    }
    return original.apply(this, args);
  } as typeof original;
  try {
    call();
  } finally {
    AsyncLocalStorage.prototype.run = original;
  }
  return found ?? refuse("its state does not show");
}

function refuse(reason: string): never {
  throw new Error(
    `This convex-test is not the one that the local Convex was written for: ${reason}. ` +
      `Install convex-test ${KNOWN_VERSION}, or bring dev/local_convex/convex_test_seam.ts up to date.`,
  );
}
