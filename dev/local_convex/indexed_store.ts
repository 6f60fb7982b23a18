import { AsyncLocalStorage } from "node:async_hooks";
import { getDocumentSize, type JSONValue, jsonToConvex, type Value } from "convex/values";
import type { Internals, QueryPlan, RangeExpression, SerializedQuery, Store } from "./convex_test_seam.js";
import { type Document, DocumentIndex, type KeyRange, restOf, tableOfId } from "./document_index.js";
import { LazyList } from "./lazy_list.js";
import { checkDocument } from "./limits.js";
import { AFTER, type IndexKey } from "./value_order.js";

/** A transaction that committed: when (ns since 1970, rising), and which tables it wrote. */
export type Commit = { readonly timestamp: bigint; readonly tables: ReadonlySet<string> };

// The real backend counts one index range for each of these, convex-test none.
const COUNTED_AS_INDEX_RANGE: ReadonlySet<string> = new Set(["1.0/shallowMerge", "1.0/replace", "1.0/remove"]);

// What the store's own methods did before they were taken over.
type Originals = Pick<
  Store,
  "commit" | "get" | "paginate" | "restoreWrites" | "rollbackWrites" | "startTransaction" | "stashWrites"
> &
  Pick<Store, "_addWrite" | "_resolveQuerySource" | "_validate">;

/** Puts an index beside convex-test's store, and tells what it reads and commits. */
export class IndexedStore {
  readonly #store: Store;
  readonly #internals: Internals;
  readonly #index = new DocumentIndex();
  readonly #original: Originals;
  readonly #running = new Map<number, Iterator<Document>>();
  readonly #readers = new AsyncLocalStorage<Set<string>>();
  readonly #onCommit: (commit: Commit) => void;
  #resumeAfter: IndexKey | null = null;
  #mute = false;

  constructor(internals: Internals, onCommit: (commit: Commit) => void) {
    const store = internals.components[""]?.db;
    if (store === undefined) throw new Error("convex-test has no store");
    this.#store = store;
    this.#internals = internals;
    this.#onCommit = onCommit;
    this.#original = bindMethods(store);
    for (const [table, { indexes }] of store._schema?.tables ?? []) {
      for (const index of indexes) this.#index.ensure(table, [...index.fields, "_creationTime", "_id"]);
    }
    this.#followWrites();
    this.#serveReads();
    this.#countSyscalls();
  }

  /** Runs `call`, and notes in `tables` the names of all tables that it reads. */
  watchReads<T>(tables: Set<string>, call: () => Promise<T>): Promise<T> {
    return this.#readers.run(tables, call);
  }

  #followWrites(): void {
    const store = this.#store;
    const original = this.#original;
    const follow = (ids: Iterable<string>) => {
      for (const id of ids) this.#index.set(id, store.get(undefined, id));
    };
    store.startTransaction = () => {
      // At the start of an outermost transaction, no query of an earlier one is still read.
      if (store._writes.length === 0) this.#running.clear();
      original.startTransaction();
    };
    store._validate = (table, fields) => {
      if (!table.startsWith("_")) checkDocument(table, fields);
      original._validate(table, fields);
    };
    store._addWrite = (id, document) => {
      original._addWrite(id, document);
      this.#index.set(id, document);
    };
    store.commit = (timestamp) => {
      const ids = Object.keys(store._writes.at(-1) ?? {});
      original.commit(timestamp);
      follow(ids);
      if (timestamp !== null) this.#onCommit({ timestamp, tables: new Set(ids.map(tableOfId)) });
    };
    store.rollbackWrites = () => {
      const ids = Object.keys(store._writes.at(-1) ?? {});
      original.rollbackWrites();
      follow(ids);
    };
    store.stashWrites = () => {
      const stashed = original.stashWrites();
      follow(stashed.flatMap((layer) => Object.keys(layer)));
      return stashed;
    };
    store.restoreWrites = (stashed) => {
      original.restoreWrites(stashed);
      follow(stashed.flatMap((layer) => Object.keys(layer)));
    };
  }

  #serveReads(): void {
    const store = this.#store;
    const original = this.#original;
    store._iterateDocs = (table, found) => {
      this.#readers.getStore()?.add(table);
      if (this.#mute) return;
      for (const document of this.#index.all(table)) found(document);
    };
    store._resolveQuerySource = (query) => {
      if (query.source.type === "Search") return original._resolveQuerySource(query);
      const plan = this.#planWithoutScan(query);
      const documents = this.#scan(query, plan);
      return { ...plan, sortedDocs: LazyList.over(documents) };
    };
    store.get = (table, id) => {
      if (typeof id === "string") this.#readers.getStore()?.add(tableOfId(id));
      return original.get(table, id);
    };
    store.startQuery = (query) => {
      const id = store._nextQueryId;
      store._nextQueryId += 1;
      this.#running.set(id, this.#results(query));
      return id;
    };
    store.queryNext = (id) => {
      const results = this.#running.get(id);
      if (results === undefined) throw new Error("This query was closed, or belongs to a transaction that has ended");
      const next = results.next();
      if (next.done !== true) return { value: next.value, done: false };
      return { value: null, done: true };
    };
    store.paginate = (request) => {
      const isPlace = request.cursor !== null && request.cursor !== "" && request.cursor !== "_end_cursor";
      this.#resumeAfter = isPlace ? parseCursor(request.cursor) : null;
      try {
        return original.paginate(request);
      } finally {
        this.#resumeAfter = null;
      }
    };
  }

  #countSyscalls(): void {
    const internals = this.#internals;
    const { syscall, asyncSyscall } = internals;
    internals.syscall = (op, jsonArgs) => {
      if (op === "1.0/queryCleanup") this.#running.delete((JSON.parse(jsonArgs) as { queryId: number }).queryId);
      return syscall(op, jsonArgs);
    };
    internals.asyncSyscall = async (op, jsonArgs) => {
      if (COUNTED_AS_INDEX_RANGE.has(op)) internals.transactionManager.getMetricsTracker()?.trackIndexRange();
      return await asyncSyscall(op, jsonArgs);
    };
  }

  // convex-test checks the query and prepares its filters; only that it finds no documents.
  #planWithoutScan(query: SerializedQuery): QueryPlan {
    this.#mute = true;
    try {
      return this.#original._resolveQuerySource(query);
    } finally {
      this.#mute = false;
    }
  }

  #scan(query: SerializedQuery, plan: QueryPlan): Iterator<Document> {
    const { source } = query;
    const range = source.type === "IndexRange" ? keyRange(source.range) : keyRange([]);
    const from = this.#resumeAfter;
    // Several indexes may hold a document at the same place; with the id in the key no two do.
    const fields = plan.fieldPathsToSortBy.includes("_id")
      ? plan.fieldPathsToSortBy
      : [...plan.fieldPathsToSortBy, "_id"];
    const rest = from === null ? range : restOf(range, from, plan.order);
    const table =
      source.type === "FullTableScan" ? source.tableName : source.indexName.slice(0, source.indexName.indexOf("."));
    return this.#index.scan(table, fields, rest, plan.order);
  }

  #results(query: SerializedQuery): Iterator<Document> {
    if (query.source.type === "Search") {
      const { sortedDocs, filterFn, limit } = this.#original._resolveQuerySource(query);
      return Array.from(sortedDocs)
        .filter(filterFn)
        .slice(0, limit ?? undefined)
        .values();
    }
    const plan = this.#planWithoutScan(query);
    return this.#filtered(this.#scan(query, plan), plan);
  }

  *#filtered(documents: Iterator<Document>, plan: QueryPlan): Generator<Document> {
    for (let left = plan.limit ?? Number.POSITIVE_INFINITY; left > 0; ) {
      const next = documents.next();
      if (next.done === true) return;
      if (plan.filterFn(next.value)) {
        left -= 1;
        yield next.value;
      } else {
        // convex-test counts the documents that it returns; a filter reads the others as well.
        this.#internals.transactionManager
          .getMetricsTracker()
          ?.trackRead(getDocumentSize(next.value as Record<string, Value>));
      }
    }
  }
}

function bindMethods(store: Store): Originals {
  return {
    get: store.get.bind(store),
    startTransaction: store.startTransaction.bind(store),
    commit: store.commit.bind(store),
    rollbackWrites: store.rollbackWrites.bind(store),
    stashWrites: store.stashWrites.bind(store),
    restoreWrites: store.restoreWrites.bind(store),
    paginate: store.paginate.bind(store),
    _addWrite: store._addWrite.bind(store),
    _validate: store._validate.bind(store),
    _resolveQuerySource: store._resolveQuerySource.bind(store),
  };
}

// convex-test has checked that it is some `eq`, then at most one lower and one upper bound on the next field.
function keyRange(expressions: readonly RangeExpression[]): KeyRange {
  const prefix: Value[] = [];
  let from: IndexKey | null = null;
  let to: IndexKey | null = null;
  for (const { type, value } of expressions) {
    const bound = boundValue(value) as Value;
    if (type === "Eq") prefix.push(bound);
    else if (type === "Gt") from = [...prefix, bound, AFTER];
    else if (type === "Gte") from = [...prefix, bound];
    else if (type === "Lt") to = [...prefix, bound];
    else to = [...prefix, bound, AFTER];
  }
  return { from: from ?? prefix, to: to ?? [...prefix, AFTER] };
}

function boundValue(value: unknown): Value | undefined {
  const isAbsent = typeof value === "object" && value !== null && "$undefined" in value;
  return isAbsent ? undefined : jsonToConvex(value as JSONValue);
}

// A cursor of convex-test is a JSON list: for each field the JSON of its value, or null if it is absent.
function parseCursor(cursor: string | null): IndexKey {
  const parts = JSON.parse(cursor ?? "[]") as (string | null)[];
  return parts.map((part) => (part === null ? undefined : jsonToConvex(JSON.parse(part) as JSONValue)));
}
