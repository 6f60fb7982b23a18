import { ConvexClient, ConvexHttpClient } from "convex/browser";
import type { FunctionReference } from "convex/server";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import { WebSocket } from "ws";
import { api } from "./api.js";
import { type Running, startLocalConvex, TEST_FUNCTIONS } from "./running.js";

const { notes } = api;
let convex: Running;
const opened: (() => unknown)[] = [];

beforeAll(async () => {
  convex = await startLocalConvex(TEST_FUNCTIONS);
});
afterEach(async () => {
  for (const close of opened.splice(0)) await close();
});
afterAll(() => convex.stop());

function connect(url = convex.url): ConvexClient {
  const client = new ConvexClient(url, {
    logger: false,
    webSocketConstructor: WebSocket as unknown as typeof globalThis.WebSocket,
  });
  opened.push(() => client.close());
  return client;
}

/** Everything that a query has been seen to be, or to fail with. */
function watch(client: ConvexClient, query: FunctionReference<"query">, args: Record<string, unknown>): unknown[] {
  const seen: unknown[] = [];
  client.onUpdate(
    query,
    args,
    (value) => seen.push(value),
    (error) => seen.push(error),
  );
  return seen;
}

test("a query is told, and told again when another client changes it", async () => {
  const seen = watch(connect(), notes.count, { author: "live" });
  await expect.poll(() => seen).toEqual([0]);
  await new ConvexHttpClient(convex.url).mutation(notes.add, { author: "live" });
  await expect.poll(() => seen).toEqual([0, 1]);
});

test("a change that does not concern a query is not sent", async () => {
  const client = connect();
  const seen = watch(client, notes.count, { author: "quiet" });
  const names = watch(client, notes.names, {});
  await expect.poll(() => [seen.length, names.length]).toEqual([1, 1]);
  await client.mutation(notes.add, { author: "somebody else" });
  await client.mutation(notes.addName, { name: "n" });
  await expect.poll(() => names.length).toBe(2);
  expect(seen).toEqual([0]);
});

test("mutations and actions answer, and the client has seen what they did", async () => {
  const client = connect();
  const seen = watch(client, notes.count, { author: "own" });
  await client.mutation(notes.add, { author: "own" });
  expect(seen.at(-1)).toBe(1);
  expect(await client.action(notes.addByAction, { author: "own" })).toBe(2);
  await expect.poll(() => seen.at(-1)).toBe(2);
  await expect(client.mutation(notes.addAndFail, { author: "own" })).rejects.toThrow("on purpose");
  await expect(client.mutation(notes.addAndFail, { author: "own", data: { a: 1n } })).rejects.toMatchObject({
    data: { a: 1n },
  });
  // A failed mutation is followed by a Transition too, or the next one would never be answered.
  await client.mutation(notes.add, { author: "own" });
  expect(seen.at(-1)).toBe(3);
});

test("a query that fails tells why", async () => {
  const seen = watch(connect(), notes.count, { author: 5 });
  await expect.poll(() => seen.length).toBe(1);
  expect(String(seen[0])).toContain("Validator error");
});

test("internal functions are guarded here too", async () => {
  const client = connect();
  const args = { author: "guard", from: 0, count: 1 };
  // A client in TypeScript refuses to name it; one in JavaScript does not.
  const addMany = notes.addMany as unknown as FunctionReference<"mutation">;
  await expect(client.mutation(addMany, args)).rejects.toThrow("Could not find public function");
  // Not in the client's types, but it is how the dashboard and the CLI do it.
  (client.client as unknown as { setAdminAuth(key: string): void }).setAdminAuth(convex.adminKey);
  await client.mutation(addMany, args);
  expect(await client.query(notes.count, { author: "guard" })).toBe(1);
});

test("a query runs again when the user changes", async () => {
  const client = connect();
  const seen = watch(client, notes.whoAmI, {});
  await expect.poll(() => seen).toEqual([null]);
  const part = (content: unknown) => Buffer.from(JSON.stringify(content)).toString("base64url");
  const now = Math.floor(Date.now() / 1000);
  const jwt = `${part({ alg: "none" })}.${part({ sub: "u1", iss: "https://a.b", iat: now, exp: now + 3600 })}.`;
  let isAuthenticated: boolean | null = null;
  client.setAuth(
    async () => jwt,
    (known) => {
      isAuthenticated = known;
    },
  );
  await expect.poll(() => seen.at(-1)).toMatchObject({ subject: "u1" });
  await expect.poll(() => isAuthenticated).toBe(true);
});

test("a client whose token is refused is told that nobody is logged in, and goes on", async () => {
  const client = connect();
  const seen = watch(client, notes.whoAmI, {});
  const part = (content: unknown) => Buffer.from(JSON.stringify(content)).toString("base64url");
  const now = Math.floor(Date.now() / 1000);
  const known: boolean[] = [];
  const withoutSubject = `${part({ alg: "none" })}.${part({ iat: now, exp: now + 3600 })}.`;
  client.setAuth(
    async () => withoutSubject,
    (isAuthenticated) => known.push(isAuthenticated),
  );
  await expect.poll(() => known).toContain(false);
  await expect.poll(() => seen.at(-1)).toBeNull();
});

test("scheduled functions reach those who watch", async () => {
  const client = connect();
  const seen = watch(client, notes.count, { author: "scheduled" });
  await client.mutation(notes.addLater, { author: "scheduled" });
  await expect.poll(() => seen.at(-1)).toBe(1);
});

/** A client that speaks the protocol itself, to be able to break it. */
async function speak(
  path: string,
): Promise<{ send(message: unknown): void; heard: Record<string, unknown>[]; closed(): boolean }> {
  const socket = new WebSocket(`${convex.url.replace("http", "ws")}${path}`);
  opened.push(() => socket.terminate());
  const heard: Record<string, unknown>[] = [];
  socket.on("message", (data) => heard.push(JSON.parse(String(data)) as Record<string, unknown>));
  await new Promise((resolve, reject) => socket.once("open", resolve).once("error", reject));
  return {
    send: (message) => socket.send(JSON.stringify(message)),
    heard,
    closed: () => socket.readyState === WebSocket.CLOSED,
  };
}

test.each(["/api/sync", "/api/1.48.0/sync"])("%s speaks the protocol: versions follow one another", async (path) => {
  const { send, heard } = await speak(path);
  const add = { type: "Add", queryId: 0, udfPath: "notes:count", args: [{ author: path }] };
  send({ type: "Connect", sessionId: "s", connectionCount: 0, lastCloseReason: null, clientTs: 0 });
  send({ type: "ModifyQuerySet", baseVersion: 0, newVersion: 1, modifications: [add] });
  send({ type: "Mutation", requestId: 0, udfPath: "notes:add", args: [{ author: path }] });
  send({ type: "Mutation", requestId: 1, udfPath: "notes:addAndFail", args: [{ author: path }] });
  send({ type: "ModifyQuerySet", baseVersion: 1, newVersion: 2, modifications: [{ type: "Remove", queryId: 0 }] });
  send({ type: "Authenticate", tokenType: "None", baseVersion: 0 });
  const kinds = [
    "Transition",
    "MutationResponse",
    "Transition",
    "MutationResponse",
    "Transition",
    "Transition",
    "Transition",
  ];
  await expect.poll(() => heard.map((message) => message.type)).toEqual(kinds);
  const transitions = heard.filter((message) => message.type === "Transition");
  expect(transitions[0]?.startVersion).toEqual({ querySet: 0, identity: 0, ts: "AAAAAAAAAAA=" });
  for (const [place, transition] of transitions.slice(1).entries()) {
    expect(transition.startVersion).toEqual(transitions[place]?.endVersion);
  }
  expect(transitions.at(-1)?.endVersion).toMatchObject({ querySet: 2, identity: 1 });
  expect(transitions[3]?.modifications).toEqual([{ type: "QueryRemoved", queryId: 0 }]);
  expect(heard[1]).toMatchObject({
    requestId: 0,
    success: true,
    ts: (transitions[1] as { endVersion: { ts: string } }).endVersion.ts,
  });
});

test("a mutation that is sent again after a reconnect runs once", async () => {
  const mutation = { type: "Mutation", requestId: 7, udfPath: "notes:add", args: [{ author: "again" }] };
  const connect = { type: "Connect", sessionId: "one-session", connectionCount: 0, lastCloseReason: null, clientTs: 0 };
  const results: unknown[] = [];
  for (let attempt = 0; attempt < 2; attempt += 1) {
    const { send, heard } = await speak("/api/sync");
    send(connect);
    send(mutation);
    await expect.poll(() => heard.length).toBe(2);
    results.push(heard[0]?.result);
  }
  expect(results[0]).toEqual(results[1]);
  expect(await new ConvexHttpClient(convex.url).query(notes.count, { author: "again" })).toBe(1);
});

test.each([
  ["a wrong base version", { type: "ModifyQuerySet", baseVersion: 3, newVersion: 4, modifications: [] }],
  ["a wrong base version of the identity", { type: "Authenticate", tokenType: "None", baseVersion: 2 }],
  ["an unknown message", { type: "Nonsense" }],
  ["a message without its fields", { type: "Mutation" }],
  ["an impossible path", { type: "Mutation", requestId: 0, udfPath: "a:b:c", args: [{}] }],
  ["an impossible path of an action", { type: "Action", requestId: 0, udfPath: "a:b:c", args: [{}] }],
])("%s is fatal for the connection", async (_, message) => {
  const { send, heard, closed } = await speak("/api/sync");
  send(message);
  await expect.poll(() => heard.map((each) => each.type)).toEqual(["FatalError"]);
  await expect.poll(closed).toBe(true);
});

test("a wrong admin key is an AuthError", async () => {
  const { send, heard } = await speak("/api/sync");
  send({ type: "Authenticate", tokenType: "Admin", value: "local-convex|00", baseVersion: 0 });
  await expect
    .poll(() => heard)
    .toEqual([expect.objectContaining({ type: "AuthError", baseVersion: 0, authUpdateAttempted: true })]);
});

test("a client that was there before a restart goes on", async () => {
  const first = await startLocalConvex(TEST_FUNCTIONS);
  const { port } = new URL(first.url);
  const seen = watch(connect(first.url), notes.count, { author: "restart" });
  await expect.poll(() => seen).toEqual([0]);
  await first.stop();
  const second = await startLocalConvex(TEST_FUNCTIONS, "--port", port);
  opened.push(() => second.stop());
  await new ConvexHttpClient(second.url).mutation(notes.add, { author: "restart" });
  await expect.poll(() => seen.at(-1)).toBe(1);
});
