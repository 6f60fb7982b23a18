import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ConvexHttpClient } from "convex/browser";
import { afterEach, expect, test } from "vitest";
import { api as project } from "../../convex/_generated/api.js";
import { PROJECT_FUNCTIONS, type Running, startLocalConvex, TEST_FUNCTIONS } from "./running.js";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop();
});

async function start(functions: string, ...flags: string[]): Promise<Running> {
  const started = await startLocalConvex(functions, ...flags);
  running.push(started);
  return started;
}

test("it serves this project's functions", async () => {
  const convex = await start(PROJECT_FUNCTIONS, "--env", "ALLOW_PUBLIC_READS=true");
  const client = new ConvexHttpClient(convex.url);
  expect(await client.query(project.activities.getRecentActivities, { userId: "u" })).toEqual([]);
});

test.each(["SIGTERM", "SIGINT"] as const)("%s ends it with 0", async (signal) => {
  const convex = await start(TEST_FUNCTIONS);
  const exited = once(convex.process, "exit");
  convex.process.kill(signal);
  expect(await exited).toEqual([0, null]);
});

test("it ends when its parent closes stdin, if asked to", async () => {
  const convex = await start(TEST_FUNCTIONS, "--parent-stdin");
  const exited = once(convex.process, "exit");
  convex.process.stdin?.end();
  expect(await exited).toEqual([0, null]);
});

test("it takes the key that it is given", async () => {
  const convex = await start(TEST_FUNCTIONS, "--admin-key", "given|0123");
  expect(convex.adminKey).toBe("given|0123");
});

test("a key of its own has the form of a real one, and is another each time", async () => {
  const [one, other] = await Promise.all([start(TEST_FUNCTIONS), start(TEST_FUNCTIONS)]);
  expect(one.adminKey).toMatch(/^[a-z-]+\|[0-9a-f]{64}$/);
  expect(other.adminKey).not.toBe(one.adminKey);
});

test("a folder that is not there is named", async () => {
  await expect(startLocalConvex("/nowhere/at/all")).rejects.toThrow("/nowhere/at/all");
});

test("functions that cannot be imported are refused at the start", async () => {
  const folder = await mkdtemp(join(tmpdir(), "local-convex-"));
  try {
    await writeFile(join(folder, "broken.ts"), 'throw new Error("broken while it is imported");\n');
    await expect(startLocalConvex(folder)).rejects.toThrow("broken while it is imported");
  } finally {
    await rm(folder, { recursive: true });
  }
});

test("a port that is taken is refused", async () => {
  const { port } = new URL((await start(TEST_FUNCTIONS)).url);
  await expect(startLocalConvex(TEST_FUNCTIONS, "--port", port)).rejects.toThrow("EADDRINUSE");
});
