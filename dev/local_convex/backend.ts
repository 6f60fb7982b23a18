import { AsyncResource } from "node:async_hooks";
import {
  type DataModelFromSchemaDefinition,
  type GenericSchema,
  makeFunctionReference,
  type SchemaDefinition,
  type UserIdentity,
} from "convex/server";
import { type ConvexError, getConvexSize, type JSONValue, jsonToConvex, type Value } from "convex/values";
import { convexTest, type TestConvexForDataModel } from "convex-test";
import { internalsOf } from "./convex_test_seam.js";
import { type FunctionKind, type FunctionPath, type Functions, printFunctionPath } from "./functions.js";
import type { Identity } from "./identity.js";
import { type Commit, IndexedStore } from "./indexed_store.js";
import { checkValue } from "./limits.js";

const MAX_TRANSFER_BYTES = 16 << 20;

export type Call = {
  /** "any" is what an admin may ask for: whatever kind the function is of. */
  readonly kind: FunctionKind | "any";
  readonly path: FunctionPath;
  /** As the client sent them: an object, or a list that holds one. */
  readonly args: JSONValue;
  readonly identity: Identity;
};

/** What a function did. A failure has committed nothing, unless the function was an action. */
export type Outcome =
  | { readonly ok: true; readonly value: Value }
  /** `data` is what a ConvexError carried; without it, the failure is of any other kind. */
  | { readonly ok: false; readonly message: string; readonly data?: Value };

type Schema = SchemaDefinition<GenericSchema, boolean>;
type Test = TestConvexForDataModel<DataModelFromSchemaDefinition<Schema>>;
type Args = Record<string, Value>;

/** Runs the project's functions: one transaction at a time, in the order of the calls. */
export class Backend {
  readonly functions: Functions;
  readonly #test: Test;
  readonly #store: IndexedStore;
  readonly #listeners = new Set<(commit: Commit) => void>();
  // Timestamps must rise across a restart too: a client that reconnects has seen the ones before it.
  #lastCommit = BigInt(Date.now()) * 1_000_000n;
  #turn: Promise<unknown> = Promise.resolve();

  constructor(functions: Functions) {
    this.functions = functions;
    const { schema, modules } = functions;
    const test = convexTest<GenericSchema>({
      modules,
      transactionLimits: true,
      ...(schema === undefined ? {} : { schema }),
    });
    this.#test = test;
    this.#store = new IndexedStore(internalsOf(test), (commit) => {
      this.#lastCommit = commit.timestamp;
      for (const listener of this.#listeners) listener(commit);
    });
  }

  /** When the last transaction committed, in ns since 1970; before the first, when this started. */
  get lastCommit(): bigint {
    return this.#lastCommit;
  }

  /** Calls `listener` inside each commit of a mutation; it must only take note. Returns how to stop that. */
  onCommit(listener: (commit: Commit) => void): () => void {
    // convex-test tells by context which function runs. What a listener starts is not part of the one that committed.
    const bound = AsyncResource.bind(listener);
    this.#listeners.add(bound);
    return () => void this.#listeners.delete(bound);
  }

  async run(call: Call): Promise<Outcome> {
    try {
      return { ok: true, value: await this.#dispatch(call) };
    } catch (error) {
      return failure(error);
    }
  }

  /** Runs a query, and says which tables it read: while none of them is written, it would answer the same. */
  async runQuery(call: Omit<Call, "kind">): Promise<{ outcome: Outcome; tables: ReadonlySet<string> }> {
    const tables = new Set<string>();
    const outcome = await this.#store.watchReads(tables, () => this.run({ ...call, kind: "query" }));
    return { outcome, tables };
  }

  async #dispatch({ kind: expected, path, args: sent, identity }: Call): Promise<Value> {
    const found = this.functions.find(path);
    const name = printFunctionPath(path);
    if (found === null || !(found.isPublic || identity.kind === "admin")) {
      // The same words for both, so that nobody learns which internal functions there are.
      throw new RefusedCall(
        `Could not find public function for '${name}'. Did you forget to run \`npx convex dev\` or \`npx convex deploy\`?`,
      );
    }
    if (expected !== "any" && expected !== found.kind) {
      const defined = `${path.module}.js:${path.name}`;
      throw new RefusedCall(
        `Trying to execute ${defined} as ${title(expected)}, but it is defined as ${title(found.kind)}.`,
      );
    }
    const args = parseArgs(name, sent);
    const user = identity.kind === "none" ? null : identity.user;
    const test = user === null ? this.#test : this.#test.withIdentity(user as UserIdentity);
    switch (found.kind) {
      case "query":
        return await this.#inTurn(() => test.query(makeFunctionReference<"query">(name), args).then(checkResult));
      case "mutation":
        return await this.#inTurn(() => runMutation(test, name, args));
      case "action":
        // Not in turn: the queries and mutations of an action wait for theirs.
        return await test.action(makeFunctionReference<"action">(name), args).then(checkResult);
    }
  }

  // convex-test lets one transaction run at a time but wakes all that wait whenever one ends, and the first to wake
  // wins. Here they stand in line.
  #inTurn<T>(run: () => Promise<T>): Promise<T> {
    const turn = this.#turn.then(run, run);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }
}

/** The call itself is refused; said without "Uncaught Error", since no function threw it. */
class RefusedCall extends Error {}

// convex-test commits a mutation before it looks at what it returned. A mutation inside another commits only when the
// outer one does, so that here an unfit result takes everything back.
function runMutation(test: Test, name: string, args: Args): Promise<Value> {
  return test.mutation(async () => checkResult(await test.mutation(makeFunctionReference<"mutation">(name), args)));
}

function checkResult(result: Value): Value {
  checkValue(result);
  const bytes = getConvexSize(result);
  if (bytes > MAX_TRANSFER_BYTES) {
    throw new Error(`Function return value is too large (actual: ${bytes} bytes, limit: 16 MiB)`);
  }
  return result;
}

function parseArgs(name: string, sent: JSONValue): Args {
  let args: Value;
  try {
    args = jsonToConvex(Array.isArray(sent) ? (sent[0] ?? {}) : sent);
    checkValue(args);
  } catch (error) {
    throw new RefusedCall(`Invalid arguments for ${name}: ${error instanceof Error ? error.message : String(error)}`);
  }
  const bytes = getConvexSize(args);
  if (bytes > MAX_TRANSFER_BYTES) {
    throw new RefusedCall(`Arguments for ${name} are too large (actual: ${bytes} bytes, limit: 16 MiB)`);
  }
  return args as Args;
}

function failure(error: unknown): Outcome {
  if (error instanceof RefusedCall) return { ok: false, message: error.message };
  if (isConvexError(error)) {
    const { data } = error;
    const text = typeof data === "string" ? data : JSON.stringify(data, printBigInt);
    return { ok: false, message: `Uncaught ConvexError: ${text}`, data };
  }
  const { name, message } = error instanceof Error ? error : { name: "Error", message: String(error) };
  return { ok: false, message: `Uncaught ${name}: ${message}` };
}

// The functions may have loaded another copy of the package, so that instanceof would not know its errors.
function isConvexError(error: unknown): error is ConvexError<Value> {
  return typeof error === "object" && error !== null && Symbol.for("ConvexError") in error;
}

function printBigInt(_: string, value: unknown): unknown {
  return typeof value === "bigint" ? value.toString() : value;
}

function title(kind: string): string {
  return kind.charAt(0).toUpperCase() + kind.slice(1);
}
