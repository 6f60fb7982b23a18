import { spawn } from "node:child_process";
import { once } from "node:events";
import { cp, mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, expect, test } from "vitest";
import { PROJECT_FUNCTIONS, type Running, startLocalConvex } from "./running.js";

const dev = fileURLToPath(new URL("../../dev", import.meta.url));
let convex: Running;
let project: string;

beforeAll(async () => {
  convex = await startLocalConvex(PROJECT_FUNCTIONS);
  // The CLI writes `_generated` and a .env.local: into a copy, as the project lies here.
  project = await mkdtemp(join(tmpdir(), "local-convex-"));
  await mkdir(join(project, "dev"));
  await cp(PROJECT_FUNCTIONS, join(project, "convex"), { recursive: true });
  for (const file of ["convex.json", "package.json"]) await cp(join(dev, file), join(project, "dev", file));
  await symlink(join(dev, "node_modules"), join(project, "dev", "node_modules"), "junction");
  await symlink(join("dev", "node_modules"), join(project, "node_modules"), "junction");
});
afterAll(async () => {
  await convex.stop();
  await rm(project, { recursive: true });
});

async function cli(...words: string[]): Promise<{ code: number; said: string }> {
  const program = join(dev, "node_modules", "convex", "bin", "main.js");
  // Only what a program needs to start: a deployment that the developer uses elsewhere must not be the one that is meant.
  const env = { PATH: process.env.PATH ?? "", HOME: project, CI: "true" };
  const child = spawn(process.execPath, [program, ...words], {
    cwd: join(project, "dev"),
    env,
    stdio: ["ignore", "pipe", "pipe"],
  });
  let said = "";
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding("utf8").on("data", (text: string) => (said += text));
  const [code] = (await once(child, "close")) as [number];
  return { code, said };
}

test.each([["dev", "--once"], ["deploy"]])(
  "npx convex %s %s succeeds",
  async (...command) => {
    const { code, said } = await cli(...command, "--url", convex.url, "--admin-key", convex.adminKey);
    expect(said).toMatch(command[0] === "dev" ? /Convex functions ready/ : /Deployed Convex functions/);
    expect(code).toBe(0);
    await expect.poll(() => convex.said()).toContain("goes on serving the functions that it started with");
  },
  60_000,
);

test("npx convex deploy with a wrong key fails", async () => {
  const { code, said } = await cli("deploy", "--url", convex.url, "--admin-key", "local-convex|00");
  expect(code).not.toBe(0);
  expect(said).toContain("BadAdminKey");
}, 60_000);

test("npx convex run calls an internal function", async () => {
  const args = JSON.stringify({ shard: "s", shards: 1, reader: "d", atLeast: 0, saves: 0 });
  const { code, said } = await cli("run", "cdc:open", args, "--url", convex.url, "--admin-key", convex.adminKey);
  expect(said).toMatch(/"epoch": \d+/);
  expect(code).toBe(0);
}, 60_000);
