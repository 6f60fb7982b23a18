/** The command: starts a local Convex and says where it is. `--help` tells the rest. */
import { Console } from "node:console";
import { flushCompileCache } from "node:module";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { STAND_IN } from "./http.js";
import { startLocalConvex } from "./server.js";

const HELP = `A local stand-in for Convex, for development and tests only: it runs the functions of a folder
with the official convex-test, for the official clients. Nothing is kept when it ends.

  tsx dev/local_convex/main.ts --functions convex [options]

  --functions FOLDER   the Convex functions to serve (default: convex)
  --host HOST          address to listen on (default: 127.0.0.1)
  --port PORT          port to listen on, 0 for any free one (default: 3210)
  --admin-key KEY      deploy key to accept, "name|secret" (default: CONVEX_ADMIN_KEY, or a fresh one)
  --env NAME=VALUE     a variable of the deployment, seen by the functions as process.env; may be repeated
  --redact             hide the texts of failures from clients, as production does
  --parent-stdin       end when stdin closes, so that it does not outlive who started it
  --quiet              do not print what the functions log
  --help               this text

Prints one line of JSON to stdout when it listens: {"url": ..., "adminKey": ...}. All else goes to stderr.
Users: "Authorization: Bearer <JWT>" is taken at its word; its signature is not verified, only its expiry.
`;

const { values: flags } = parseArgs({
  options: {
    functions: { type: "string", default: "convex" },
    host: { type: "string", default: "127.0.0.1" },
    port: { type: "string", default: "3210" },
    "admin-key": { type: "string" },
    env: { type: "string", multiple: true, default: [] },
    redact: { type: "boolean", default: false },
    "parent-stdin": { type: "boolean", default: false },
    quiet: { type: "boolean", default: false },
    help: { type: "boolean", default: false },
  },
});

if (flags.help) {
  process.stdout.write(HELP);
} else {
  await main().catch((error: unknown) => {
    // A fault in the functions shows where it is; for the rest, the message says it.
    const isInFunctions = error instanceof Error && !("syscall" in error);
    process.stderr.write(`local convex: could not start: ${isInFunctions ? error.stack : String(error)}\n`);
    process.exitCode = 1;
  });
}

async function main(): Promise<void> {
  const log = (line: string) => void process.stderr.write(`local convex: ${line}\n`);
  const adminKey = flags["admin-key"] ?? process.env.CONVEX_ADMIN_KEY;
  separateFunctions();
  const convex = await startLocalConvex({
    functions: resolve(flags.functions),
    host: flags.host,
    port: parsePort(flags.port),
    redact: flags.redact,
    log,
    ...(adminKey === undefined ? {} : { adminKey }),
  });
  const stop = once(() => void convex.close().then(() => process.exit(0)));
  process.on("SIGTERM", stop);
  process.on("SIGINT", stop);
  if (flags["parent-stdin"]) process.stdin.on("end", stop).on("error", stop).resume();
  log(`${STAND_IN} ${convex.functions.length} functions at ${convex.url}`);
  process.stdout.write(`${JSON.stringify({ url: convex.url, adminKey: convex.adminKey })}\n`);
  // By itself Node keeps what it has compiled when it ends, which others that start meanwhile would have to wait for.
  flushCompileCache();
}

// The functions run in this process, but see a deployment: its variables and nothing of ours, and a console that does
// not write where the parent reads.
function separateFunctions(): void {
  for (const name of Object.keys(process.env)) delete process.env[name];
  for (const setting of flags.env) {
    const at = setting.indexOf("=");
    if (at < 1) throw new Error(`--env wants NAME=VALUE, and got "${setting}"`);
    process.env[setting.slice(0, at)] = setting.slice(at + 1);
  }
  globalThis.console = new Console(process.stderr, process.stderr);
  if (flags.quiet)
    for (const level of ["debug", "error", "info", "log", "warn"] as const) console[level] = () => undefined;
}

function parsePort(text: string): number {
  const port = Number(text);
  if (!Number.isInteger(port) || port < 0 || port > 65535)
    throw new Error(`--port wants 0 to 65535, and got "${text}"`);
  return port;
}

function once(run: () => void): () => void {
  let hasRun = false;
  return () => {
    if (!hasRun) run();
    hasRun = true;
  };
}
