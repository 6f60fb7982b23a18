import type { Backend, Outcome } from "./backend.js";
import { type FunctionPath, parseFunctionPath } from "./functions.js";
import { encodeTimestamp, newRequestId, printFailure, type Settings } from "./http.js";
import { HttpError } from "./http_error.js";
import { adminIdentity, type Identity, NOBODY, userIdentity } from "./identity.js";
import { type Authenticate, type ClientMessage, ProtocolError, parseClientMessage } from "./sync_messages.js";
import { WatchedQueries } from "./sync_queries.js";
import { type Printable, printJson, printValue } from "./value_json.js";

// A busy writer commits many times in a row: those who watch are told of the first at once, and then of the lot.
const COALESCE_MS = 10;
const REMEMBERED_MUTATIONS = 10_000;

/** How a session speaks and hangs up. */
export type Connection = { send(text: string): void; close(code: number, reason: string): void };

type Version = { querySet: number; identity: number; timestamp: bigint };
type FunctionMessage = Extract<ClientMessage, { type: "Mutation" | "Action" }>;
type Done = { readonly outcome: Outcome; readonly timestamp: bigint };

/**
 * The mutations that came over a WebSocket, by session and request: a client that lost its connection sends those again
 * whose answer it has not got.
 */
export class RememberedMutations {
  readonly #done = new Map<string, Promise<Done>>();

  once(sessionId: string, requestId: number, run: () => Promise<Done>): Promise<Done> {
    const key = `${sessionId}/${requestId}`;
    const known = this.#done.get(key);
    if (known !== undefined) return known;
    const done = run();
    this.#done.set(key, done);
    const [oldest] = this.#done.keys();
    if (this.#done.size > REMEMBERED_MUTATIONS && oldest !== undefined) this.#done.delete(oldest);
    return done;
  }
}

/** One client of the sync protocol. Its messages are handled one after the other; actions run beside. */
export class SyncSession {
  readonly #backend: Backend;
  readonly #settings: Settings;
  readonly #mutations: RememberedMutations;
  readonly #connection: Connection;
  readonly #queries = new WatchedQueries();
  readonly #stopListening: () => void;
  #sessionId: string = newRequestId();
  // One for all runs of the queries: with a new one each time, a query that fails as before would look changed.
  readonly #queryRequestId: string = newRequestId();
  #identity: Identity = NOBODY;
  /** What the client has asked for, and what it has been brought to. */
  readonly #wanted: Version = { querySet: 0, identity: 0, timestamp: 0n };
  #told: Version = { querySet: 0, identity: 0, timestamp: 0n };
  #mustTell = false;
  #work: Promise<void> = Promise.resolve();
  #timer: NodeJS.Timeout | null = null;
  // When the session was last told of a commit, by performance.now().
  #toldOfCommit = 0;
  #isOver = false;

  constructor(backend: Backend, settings: Settings, mutations: RememberedMutations, connection: Connection) {
    this.#backend = backend;
    this.#settings = settings;
    this.#mutations = mutations;
    this.#connection = connection;
    this.#stopListening = backend.onCommit((commit) => {
      if (!this.#queries.invalidate(commit)) return;
      this.#timer ??= setTimeout(() => this.#afterCommit(), this.#toldOfCommit + COALESCE_MS - performance.now());
    });
  }

  receive(text: string): void {
    this.#enqueue(async () => {
      await this.#handle(parseClientMessage(text));
      await this.#tell();
    });
  }

  end(): void {
    this.#isOver = true;
    this.#stopListening();
    if (this.#timer !== null) clearTimeout(this.#timer);
  }

  #afterCommit(): void {
    this.#timer = null;
    this.#toldOfCommit = performance.now();
    this.#enqueue(() => this.#tell());
  }

  #enqueue(task: () => Promise<void>): void {
    this.#work = this.#work.then(async () => {
      try {
        if (!this.#isOver) await task();
      } catch (error) {
        this.#hangUp(error);
      }
    });
  }

  async #handle(message: ClientMessage): Promise<void> {
    switch (message.type) {
      case "Connect":
        this.#sessionId = message.sessionId;
        return;
      case "ModifyQuerySet":
        return this.#modify(message);
      case "Authenticate":
        return this.#authenticate(message);
      case "Mutation":
        return await this.#mutate(message);
      case "Action":
        void this.#act(message, requirePath(message.udfPath));
        return;
      case "Event":
        return;
    }
  }

  #modify(message: Extract<ClientMessage, { type: "ModifyQuerySet" }>): void {
    if (message.baseVersion !== this.#wanted.querySet) {
      throw new ProtocolError(
        `Base version ${message.baseVersion} passed up doesn't match the current version ${this.#wanted.querySet}`,
      );
    }
    for (const modification of message.modifications) {
      if (modification.type === "Remove") this.#queries.remove(modification.queryId);
      else this.#queries.add(modification.queryId, requirePath(modification.udfPath), modification.args);
    }
    this.#wanted.querySet = message.newVersion;
    this.#mustTell = true;
  }

  #authenticate(message: Authenticate): void {
    if (message.baseVersion !== this.#wanted.identity) {
      throw new ProtocolError(
        `Base version ${message.baseVersion} passed up doesn't match the current version ${this.#wanted.identity}`,
      );
    }
    try {
      if (message.tokenType === "None") this.#identity = NOBODY;
      else if (message.tokenType === "User") this.#identity = userIdentity(message.value);
      else this.#identity = adminIdentity(message.value, this.#settings.adminKey, message.impersonating ?? null);
    } catch (error) {
      if (!(error instanceof HttpError)) throw error;
      this.#send({
        type: "AuthError",
        error: error.message,
        baseVersion: message.baseVersion,
        authUpdateAttempted: true,
      });
      this.#connection.close(1008, error.code);
      return;
    }
    this.#wanted.identity += 1;
    this.#queries.invalidateAll();
    this.#mustTell = true;
  }

  async #mutate(message: FunctionMessage): Promise<void> {
    const { requestId, args } = message;
    const path = requirePath(message.udfPath);
    const identity = this.#identity;
    const { outcome, timestamp } = await this.#mutations.once(this.#sessionId, requestId, async () => {
      const outcome = await this.#backend.run({ kind: "mutation", path, args, identity });
      return { outcome, timestamp: this.#backend.lastCommit };
    });
    const answer = { type: "MutationResponse", requestId, ...this.#printAnswer(outcome) };
    this.#send(outcome.ok ? { ...answer, ts: encodeTimestamp(timestamp) } : answer);
    this.#mustTell = true;
  }

  async #act(message: FunctionMessage, path: FunctionPath): Promise<void> {
    const { requestId, args } = message;
    const outcome = await this.#backend.run({ kind: "action", path, args, identity: this.#identity });
    this.#send({ type: "ActionResponse", requestId, ...this.#printAnswer(outcome) });
  }

  /** Brings the client to the present, if it has to be told anything. */
  async #tell(): Promise<void> {
    // The versions that this answers; what is asked for while the queries run is for the next time.
    const end: Version = { ...this.#wanted, timestamp: this.#backend.lastCommit };
    const modifications = await this.#queries.refresh(this.#backend, this.#identity, (queryId, outcome) =>
      outcome.ok
        ? { type: "QueryUpdated", queryId, value: printValue(outcome.value), logLines: [], journal: null }
        : {
            type: "QueryFailed",
            queryId,
            errorMessage: printFailure(outcome.message, this.#queryRequestId, this.#settings.redact),
            errorData: outcome.data === undefined ? undefined : printValue(outcome.data),
            logLines: [],
            journal: null,
          },
    );
    if (!this.#mustTell && modifications.length === 0) return;
    this.#mustTell = false;
    this.#send({
      type: "Transition",
      startVersion: printVersion(this.#told),
      endVersion: printVersion(end),
      modifications,
    });
    this.#told = end;
  }

  #printAnswer(outcome: Outcome): { [field: string]: Printable | undefined } {
    if (outcome.ok) return { success: true, result: printValue(outcome.value), logLines: [] };
    const errorData = outcome.data === undefined ? undefined : printValue(outcome.data);
    const message = printFailure(outcome.message, newRequestId(), this.#settings.redact);
    return { success: false, result: message, errorData, logLines: [] };
  }

  #hangUp(error: unknown): void {
    const reason = error instanceof ProtocolError ? error.message : "InternalServerError";
    if (!(error instanceof ProtocolError))
      process.stderr.write(`local convex: unforeseen ${error instanceof Error ? error.stack : error}\n`);
    this.#send({ type: "FatalError", error: reason });
    this.#connection.close(1002, "FatalError");
  }

  #send(message: Printable): void {
    if (!this.#isOver) this.#connection.send(printJson(message));
  }
}

function requirePath(text: string): FunctionPath {
  const path = parseFunctionPath(text);
  if (path === null) throw new ProtocolError(`${text} is not a valid path to a Convex function.`);
  return path;
}

function printVersion({ querySet, identity, timestamp }: Version): Printable {
  return { querySet, identity, ts: encodeTimestamp(timestamp) };
}
