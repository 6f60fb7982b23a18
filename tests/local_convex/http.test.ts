import { ConvexHttpClient } from "convex/browser";
import { ConvexError } from "convex/values";
import { afterAll, beforeAll, expect, test } from "vitest";
import { api } from "./api.js";
import { post, type Running, startLocalConvex, TEST_FUNCTIONS } from "./running.js";

const { notes } = api;
let convex: Running;
let client: ConvexHttpClient;

beforeAll(async () => {
  convex = await startLocalConvex(TEST_FUNCTIONS, "--env", "ONE=1", "--env", "TWO=a=b");
  client = new ConvexHttpClient(convex.url, { logger: false });
});
afterAll(() => convex.stop());

const call = (kind: string, path: string, args: unknown = {}, headers: Record<string, string> = {}) =>
  post(`${convex.url}/api/${kind}`, { path, args, format: "convex_encoded_json" }, headers);
const asAdmin = () => ({ Authorization: `Convex ${convex.adminKey}` });

test("it says that it is a stand-in", async () => {
  await expect.poll(() => convex.said()).toContain("local stand-in for Convex");
  expect(await (await fetch(convex.url)).text()).toContain("local stand-in for Convex");
  expect((await fetch(`${convex.url}/version`)).status).toBe(200);
  expect(await (await fetch(`${convex.url}/instance_name`)).text()).toBe(convex.adminKey.split("|")[0]);
});

test("the official client calls queries, mutations and actions", async () => {
  expect(await client.mutation(notes.add, { author: "kinds" })).toMatch(/notes$/);
  expect(await client.query(notes.count, { author: "kinds" })).toBe(1);
  expect(await client.action(notes.addByAction, { author: "kinds" })).toBe(2);
  expect(await client.query(api.deep.inner.default)).toBe("the default export");
});

test("values come back as they were sent", async () => {
  const bytes = new Uint8Array([1, 2, 3]).buffer;
  const value = {
    text: "Grüße 🙂",
    whole: 5,
    part: 0.1,
    big: 12n,
    bytes,
    none: null,
    list: [-0, Infinity, NaN],
    "a b": {},
  };
  expect(await client.query(notes.echo, { value })).toEqual(value);
});

test("a Float64 is never printed as a JSON integer", async () => {
  const { text } = await call("query", "notes:echo", {
    value: { n: 5, big: 1e21, list: [0, -3, 2.5, 9007199254740991] },
  });
  expect(text).toContain('"n":5.0');
  expect(text).toContain("[0.0,-3.0,2.5,9007199254740991.0]");
  expect(text).toContain('"big":1e+21');
});

test("the format json is plain", async () => {
  const body = { path: "notes:echo", args: { value: { big: { $integer: "DAAAAAAAAAA=" }, n: 5 } }, format: "json" };
  expect((await post(`${convex.url}/api/query`, body)).text).toContain('{"big":"12","n":5.0}');
});

test("a function that fails is answered with 200 and leaves nothing behind", async () => {
  const { status, json } = await call(
    "mutation",
    "notes:addAndFail",
    { author: "fails" },
    { "Convex-Request-Id": "abc" },
  );
  expect(status).toBe(200);
  expect(json.status).toBe("error");
  expect(json.errorMessage).toBe("[Request ID: abc] Server Error\nUncaught Error: on purpose\n");
  expect(json).not.toHaveProperty("errorData");
  expect(await client.query(notes.count, { author: "fails" })).toBe(0);
});

test("the data of a ConvexError reaches the client", async () => {
  const failing = client.mutation(notes.addAndFail, { author: "fails", data: { code: 7n, why: ["x"] } });
  await expect(failing).rejects.toThrow(ConvexError);
  await expect(failing).rejects.toMatchObject({ data: { code: 7n, why: ["x"] } });
  expect(await client.query(notes.count, { author: "fails" })).toBe(0);
});

test("a result that the function did not promise undoes the mutation", async () => {
  const { status, json } = await call("mutation", "notes:wrongResult", { author: "results" });
  expect([status, json.status]).toEqual([200, "error"]);
  expect(await client.query(notes.count, { author: "results" })).toBe(0);
});

test("a mutation that fails within another undoes only itself", async () => {
  await client.mutation(notes.addInspiteOf, { author: "nested" });
  expect(await client.query(notes.ranks, { author: "nested" })).toEqual([1, 2]);
});

test("wrong arguments are a failure of the function", async () => {
  const { status, json } = await call("mutation", "notes:add", { author: 5 });
  expect([status, json.status]).toEqual([200, "error"]);
  const dollar = await call("mutation", "notes:add", { author: "dollar", extra: { $x: 1 } });
  expect(dollar.json.errorMessage).toContain("Invalid arguments");
});

test("an internal function is there for admins only, and does not show to others", async () => {
  const args = { author: "internal", from: 0, count: 1 };
  const internal = await call("mutation", "notes:addMany", args);
  const missing = await call("mutation", "notes:nothing", args);
  const said = (path: string) =>
    `Could not find public function for '${path}'. Did you forget to run \`npx convex dev\` or \`npx convex deploy\`?`;
  expect(internal.status).toBe(200);
  expect(internal.json.errorMessage).toContain(said("notes:addMany"));
  expect(missing.json.errorMessage).toContain(said("notes:nothing"));
  const user = await call("mutation", "notes:addMany", args, { Authorization: `Bearer ${token({ sub: "u" })}` });
  expect(user.json.errorMessage).toContain(said("notes:addMany"));
  expect(await client.query(notes.count, { author: "internal" })).toBe(0);
  expect((await call("mutation", "notes:addMany", args, asAdmin())).json.status).toBe("success");
  expect(await client.query(notes.count, { author: "internal" })).toBe(1);
});

test("a deploy key may carry the type of its deployment", async () => {
  const prefixed = { Authorization: `Convex prod:${convex.adminKey}` };
  expect((await call("query", "deep/inner:hidden", {}, prefixed)).json.value).toBe("hidden");
  expect((await call("query", "deep/inner.js:hidden", {}, prefixed)).json.value).toBe("hidden");
});

test("/api/function runs a function of any kind, for admins only", async () => {
  const refused = await call("function", "notes:count", { author: "any" });
  expect([refused.status, refused.json.code]).toEqual([403, "BadDeployKey"]);
  expect((await call("function", "notes:count", { author: "any" }, asAdmin())).text).toContain('"value":0.0');
  expect((await call("function", "notes:add", { author: "any" }, asAdmin())).json.status).toBe("success");
});

test("a function is called as what it is", async () => {
  const { status, json } = await call("query", "notes:add", { author: "x" });
  expect(status).toBe(200);
  expect(json.errorMessage).toContain("Trying to execute notes.js:add as Query, but it is defined as Mutation.");
});

test.each([
  ["a wrong key", { Authorization: "Convex local-convex|00" }, 401, "BadAdminKey"],
  ["no key at all", { Authorization: "Convex x" }, 401, "BadAdminKey"],
  ["an unknown scheme", { Authorization: "Basic abcdef" }, 400, "InvalidAdminKey"],
  ["a token that is none", { Authorization: "Bearer abc" }, 401, "InvalidAuthHeader"],
  ["a token that has expired", { Authorization: `Bearer ${token({ sub: "u", exp: 1 })}` }, 401, "InvalidAuthHeader"],
  ["a malformed client version", { "Convex-Client": "python-" }, 400, "InvalidClientVersion"],
])("%s is refused before anything runs", async (_, headers, status, code) => {
  const answer = await call("mutation", "notes:add", { author: "refused" }, headers);
  expect([answer.status, answer.json.code]).toEqual([status, code]);
  expect(typeof answer.json.message).toBe("string");
  expect(await client.query(notes.count, { author: "refused" })).toBe(0);
});

test.each([
  ["no JSON", "{", "BadJsonBody"],
  ["no path", { args: {} }, "BadJsonBody"],
  ["no arguments", { path: "notes:add" }, "BadJsonBody"],
  ["an impossible path", { path: "notes:add:x", args: {} }, "BadConvexFunctionIdentifier"],
  ["a lone surrogate", '{"path":"notes:add","args":{"author":"\\ud800"}}', "BadJsonBody"],
])("a body with %s is 400", async (_, body, code) => {
  const answer = await post(`${convex.url}/api/mutation`, body);
  expect([answer.status, answer.json.code]).toEqual([400, code]);
});

test("a body of more than 16 MiB is 400, and the connection goes on", async () => {
  const body = { path: "notes:echo", args: { value: "x".repeat(17 << 20) } };
  const { status, json } = await post(`${convex.url}/api/query`, body);
  expect([status, json.code]).toEqual([400, "BadJsonBody"]);
  expect(json.message).toContain("length limit");
  expect((await call("query", "notes:echo", { value: 1 })).status).toBe(200);
});

test("a whole pair of surrogates is text", async () => {
  const { text } = await post(`${convex.url}/api/query`, '{"path":"notes:echo","args":{"value":"\\ud83d\\ude42"}}');
  expect(text).toContain('"value":"🙂"');
});

test("a route that there is not is 404", async () => {
  expect((await post(`${convex.url}/api/nothing`, {})).status).toBe(404);
});

test("a user is who the token says", async () => {
  const user = new ConvexHttpClient(convex.url, { auth: token({ sub: "u1", iss: "https://a.b", given_name: "Ann" }) });
  const expected = { subject: "u1", issuer: "https://a.b", tokenIdentifier: "https://a.b|u1", givenName: "Ann" };
  expect(await user.query(notes.whoAmI)).toMatchObject(expected);
  expect(await client.query(notes.whoAmI)).toBeNull();
});

test("an admin may act as a user", async () => {
  const acting = Buffer.from(JSON.stringify({ subject: "u2", issuer: "https://a.b" })).toString("base64");
  const { json } = await call("query", "notes:whoAmI", {}, { Authorization: `Convex ${convex.adminKey}:${acting}` });
  expect(json.value).toMatchObject({ subject: "u2" });
});

test("functions see the variables of the deployment and no others", async () => {
  expect(await client.query(notes.variables)).toEqual(["ONE", "TWO"]);
});

test("scheduled functions run", async () => {
  await client.mutation(notes.addLater, { author: "later" });
  await expect.poll(() => client.query(notes.count, { author: "later" })).toBe(1);
});

test("calls that arrive together run one after the other", async () => {
  const added = Array.from({ length: 50 }, () => call("mutation", "notes:add", { author: "together" }));
  const ids = (await Promise.all(added)).map((answer) => answer.json.value);
  expect(new Set(ids).size).toBe(50);
});

test("production's silence on request", async () => {
  const redacting = await startLocalConvex(TEST_FUNCTIONS, "--redact");
  try {
    const plain = await post(`${redacting.url}/api/mutation`, { path: "notes:addAndFail", args: { author: "x" } });
    expect(plain.json.errorMessage).toMatch(/^\[Request ID: \w+\] Server Error$/);
    const data = await post(`${redacting.url}/api/mutation`, {
      path: "notes:addAndFail",
      args: { author: "x", data: "d" },
    });
    expect(data.json.errorData).toBe("d");
  } finally {
    await redacting.stop();
  }
});

function token(claims: Record<string, unknown>): string {
  const part = (content: unknown) => Buffer.from(JSON.stringify(content)).toString("base64url");
  return `${part({ alg: "none", typ: "JWT" })}.${part(claims)}.`;
}
