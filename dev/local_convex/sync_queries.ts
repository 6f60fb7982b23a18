import type { JSONValue } from "convex/values";
import type { Backend } from "./backend.js";
import type { FunctionPath } from "./functions.js";
import type { Identity } from "./identity.js";
import type { Commit } from "./indexed_store.js";
import { type Printable, printJson } from "./value_json.js";

type Subscription = {
  readonly path: FunctionPath;
  readonly args: JSONValue;
  /** What the query read when it last ran; null as long as it has not. */
  tables: ReadonlySet<string> | null;
  /** What the client was last told, as text. */
  told: string | null;
  isStale: boolean;
};

/** Prints what a query gave, as the client wants it for one of its queries. */
export type PrintResult = (queryId: number, outcome: Awaited<ReturnType<Backend["runQuery"]>>["outcome"]) => Printable;

/** The queries that one client watches, and which of them have to run again. */
export class WatchedQueries {
  readonly #queries = new Map<number, Subscription>();
  readonly #removed = new Set<number>();

  add(queryId: number, path: FunctionPath, args: JSONValue): void {
    this.#queries.set(queryId, { path, args, tables: null, told: null, isStale: true });
    this.#removed.delete(queryId);
  }

  remove(queryId: number): void {
    if (this.#queries.delete(queryId)) this.#removed.add(queryId);
  }

  /** Another identity may see something else in every query. */
  invalidateAll(): void {
    for (const query of this.#queries.values()) query.isStale = true;
  }

  /** Returns whether a query read what was written. A query that runs right now has not said yet what it reads. */
  invalidate({ tables }: Commit): boolean {
    let isAny = false;
    for (const query of this.#queries.values()) {
      const isHit = query.tables === null || [...tables].some((table) => query.tables?.has(table));
      query.isStale ||= isHit;
      isAny ||= isHit;
    }
    return isAny;
  }

  /** Runs what is stale, and returns the modifications of a Transition: only what is new to the client. */
  async refresh(backend: Backend, identity: Identity, print: PrintResult): Promise<Printable[]> {
    const modifications: Printable[] = [...this.#removed].map((queryId) => ({ type: "QueryRemoved", queryId }));
    this.#removed.clear();
    for (const [queryId, query] of [...this.#queries]) {
      if (!query.isStale) continue;
      // Before it runs: what is committed meanwhile makes it stale again.
      query.isStale = false;
      query.tables = null;
      const { outcome, tables } = await backend.runQuery({ path: query.path, args: query.args, identity });
      query.tables = tables;
      const modification = print(queryId, outcome);
      const text = printJson(modification);
      if (text !== query.told) modifications.push(modification);
      query.told = text;
    }
    return modifications;
  }
}
