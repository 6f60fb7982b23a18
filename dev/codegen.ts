/**
 * Writes convex/_generated as a deploy would, byte for byte, without a deployment: asks the local Convex.
 *
 * `convex codegen --system-udfs` needs no server at all, but writes less, and the first deploy from a checkout would
 * then change committed files.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { startLocalConvex } from "./local_convex/server.js";

const convex = await startLocalConvex({
  functions: fileURLToPath(new URL("../convex", import.meta.url)),
  host: "127.0.0.1",
  port: 0,
  redact: false,
  log: () => undefined,
});
const command = ["codegen", "--url", convex.url, "--admin-key", convex.adminKey];
const [exitCode] = await once(spawn("convex", command, { stdio: "inherit", cwd: import.meta.dirname }), "exit");
await convex.close();
process.exit(typeof exitCode === "number" ? exitCode : 1);
