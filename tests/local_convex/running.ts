import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const dev = fileURLToPath(new URL("../../dev", import.meta.url));
export const TEST_FUNCTIONS: string = fileURLToPath(new URL("functions", import.meta.url));
export const PROJECT_FUNCTIONS: string = fileURLToPath(new URL("../../convex", import.meta.url));

export type Running = {
  readonly url: string;
  readonly adminKey: string;
  readonly process: ChildProcess;
  /** All that it has written to stderr. */
  said(): string;
  stop(): Promise<void>;
};

/** Starts the program as a developer does, and waits for the line that says where it listens. */
export async function startLocalConvex(functions: string, ...flags: string[]): Promise<Running> {
  const program = ["--import", "tsx", "local_convex/main.ts", "--functions", functions, "--port", "0", ...flags];
  const child = spawn(process.execPath, program, { cwd: dev, stdio: ["pipe", "pipe", "pipe"] });
  let said = "";
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    said += text;
  });
  const exited = once(child, "exit");
  const first = await Promise.race([once(createInterface(child.stdout), "line"), exited.then(() => null)]);
  if (first === null) throw new Error(`The local Convex ended before it listened:\n${said}`);
  const { url, adminKey } = JSON.parse(String(first[0])) as { url: string; adminKey: string };
  const stop = async () => {
    child.kill("SIGTERM");
    await exited;
  };
  return { url, adminKey, process: child, said: () => said, stop };
}

export type Answer = { readonly status: number; readonly text: string; readonly json: Record<string, unknown> };

/** Posts a call as it stands, to see the answer as it stands. */
export async function post(url: string, body: unknown, headers: Record<string, string> = {}): Promise<Answer> {
  const response = await fetch(url, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: typeof body === "string" ? body : JSON.stringify(body),
  });
  const text = await response.text();
  return { status: response.status, text, json: JSON.parse(text) as Record<string, unknown> };
}
