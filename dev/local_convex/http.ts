import { randomBytes } from "node:crypto";
import type { IncomingMessage, ServerResponse } from "node:http";
import { promisify } from "node:util";
import { brotliDecompress } from "node:zlib";
import type { JSONValue } from "convex/values";
import type { Backend, Call, Outcome } from "./backend.js";
import { type FunctionPath, parseFunctionPath } from "./functions.js";
import { HttpError } from "./http_error.js";
import { type Identity, INSTANCE_NAME, identityOfHeader } from "./identity.js";
import { JsonText, type Printable, printCleanValue, printJson, printValue } from "./value_json.js";

// The arguments may have 16 MiB, and there is something around them.
const MAX_BODY_BYTES = (16 << 20) + 2000;
const MAX_PUSH_BYTES = 100 << 20;

export const STAND_IN = "This is a local stand-in for Convex, for development and tests only. Nothing is kept.";

export type Settings = {
  readonly adminKey: string;
  /** Production says nothing of a failure but its request id, and what a ConvexError carries. */
  readonly redact: boolean;
};

export type Request = {
  readonly message: IncomingMessage;
  readonly url: URL;
  readonly requestId: string;
};

export type Handler = (request: Request) => Promise<Printable>;

/** The routes under which functions are called, and the few that say what this is. */
export function functionRoutes(backend: Backend, settings: Settings): Map<string, Handler> {
  const call = (kind: Call["kind"], mayCall: (identity: Identity) => void = () => undefined): Handler => {
    return async (request) => {
      const authorization = request.message.headers.authorization;
      checkClientVersion(request.message.headers["convex-client"]);
      const body = await readCall(request);
      const path = functionPath(body.path);
      const identity = identityOfHeader(authorization, settings.adminKey);
      mayCall(identity);
      const outcome = await backend.run({ kind, path, args: body.args, identity });
      return printOutcome(outcome, body.format, request.requestId, settings.redact);
    };
  };
  return new Map<string, Handler>([
    ["POST /api/query", call("query")],
    ["POST /api/mutation", call("mutation")],
    ["POST /api/action", call("action")],
    ["POST /api/function", call("any", requireAdmin)],
    ["POST /api/query_ts", async () => ({ ts: encodeTimestamp(backend.lastCommit) })],
    // There is no past here: the time that is asked for is taken for now.
    ["POST /api/query_at_ts", call("query")],
    ["GET /", async () => new JsonText(`${STAND_IN}\n`)],
    ["GET /version", async () => new JsonText("unknown")],
    ["GET /instance_name", async () => new JsonText(INSTANCE_NAME)],
  ]);
}

/** Answers one request, whatever happens. */
export async function answer(
  routes: Map<string, Handler>,
  message: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const url = new URL(message.url ?? "/", "http://local");
  const requestId = headerText(message.headers["convex-request-id"]) ?? newRequestId();
  allowBrowsers(message, response);
  if (message.method === "OPTIONS") return void response.writeHead(204).end();
  const handler = routes.get(`${message.method} ${url.pathname}`);
  try {
    if (handler === undefined)
      throw new HttpError(404, "NotFound", `No route for ${message.method} ${url.pathname}. ${STAND_IN}`);
    const printed = await handler({ message, url, requestId });
    const type = url.pathname.startsWith("/api/") ? "application/json" : "text/plain";
    send(response, 200, type, printJson(printed));
  } catch (error) {
    const known = error instanceof HttpError ? error : unforeseen(error);
    // The rest of a body that was not read is let go, so that the client gets to read the answer.
    message.resume();
    send(response, known.status, "application/json", printJson({ code: known.code, message: known.message }));
  }
}

/** @throws HttpError 403 for anyone else: what the real backend says to a request without a key. */
export function requireAdmin(identity: Identity): void {
  if (identity.kind !== "admin") {
    throw new HttpError(
      403,
      "BadDeployKey",
      `The provided deploy key was invalid for deployment '${INSTANCE_NAME}'. ` +
        "Double check that the environment this key was generated for matches the desired deployment.",
    );
  }
}

/**
 * Reads a body of JSON, which the CLI compresses.
 *
 * @throws HttpError 400 if it is none, is too large, or holds text that is no Unicode.
 */
export async function readJson({ message }: Request, limit = MAX_PUSH_BYTES): Promise<unknown> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  // What is too long is read to its end and dropped: a connection left in the middle of a body serves nothing more.
  for await (const chunk of message as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes <= limit) chunks.push(chunk);
  }
  if (bytes > limit) {
    throw new HttpError(
      400,
      "BadJsonBody",
      `Failed to buffer the request body: length limit exceeded (${limit} bytes)`,
    );
  }
  const raw = Buffer.concat(chunks);
  try {
    const plain = message.headers["content-encoding"] === "br" ? await promisify(brotliDecompress)(raw) : raw;
    const text = new TextDecoder("utf-8", { fatal: true }).decode(plain);
    return JSON.parse(text, /\\u[dD][89a-fA-F]/.test(text) ? refuseLoneSurrogates : undefined);
  } catch (error) {
    throw new HttpError(
      400,
      "BadJsonBody",
      `Failed to parse the request body as JSON: ${error instanceof Error ? error.message : error}`,
    );
  }
}

/** A timestamp as the protocols carry it: base64 of an unsigned 64 bit integer, lowest byte first. */
export function encodeTimestamp(timestamp: bigint): string {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(timestamp);
  return bytes.toString("base64");
}

/** Of the form that the real server gives to requests that name none of their own. */
export function newRequestId(): string {
  return randomBytes(8).toString("hex");
}

/** What a client is told of a failure. */
export function printFailure(message: string, requestId: string, redact: boolean): string {
  const start = `[Request ID: ${requestId}] Server Error`;
  return redact ? start : `${start}\n${message}\n`;
}

type CallBody = { readonly path: string; readonly args: JSONValue; readonly format: string | undefined };

async function readCall(request: Request): Promise<CallBody> {
  const type = headerText(request.message.headers["content-type"]) ?? "";
  if (!/^application\/(.+\+)?json\b/i.test(type)) {
    throw new HttpError(400, "BadJsonBody", "Expected request with `Content-Type: application/json`");
  }
  const body = await readJson(request, MAX_BODY_BYTES);
  if (typeof body !== "object" || body === null) throw new HttpError(400, "BadJsonBody", "The body is not an object");
  const { path, args, format } = body as Record<string, unknown>;
  if (typeof path !== "string") throw new HttpError(400, "BadJsonBody", "The body has no text `path`");
  if (typeof args !== "object" || args === null)
    throw new HttpError(400, "BadJsonBody", "The body has no object or array `args`");
  if (format !== undefined && format !== null && format !== "json" && format !== "convex_encoded_json") {
    throw new HttpError(400, "BadFormat", `Unrecognized value format: ${JSON.stringify(format)}`);
  }
  return { path, args: args as JSONValue, format: format ?? undefined };
}

function functionPath(text: string): FunctionPath {
  const path = parseFunctionPath(text);
  if (path !== null) return path;
  throw new HttpError(400, "BadConvexFunctionIdentifier", `${text} is not a valid path to a Convex function.`);
}

function printOutcome(outcome: Outcome, format: string | undefined, requestId: string, redact: boolean): Printable {
  const print = format === "json" ? printCleanValue : printValue;
  if (outcome.ok) return { status: "success", value: print(outcome.value), logLines: [] };
  return {
    status: "error",
    errorMessage: printFailure(outcome.message, requestId, redact),
    errorData: outcome.data === undefined ? undefined : print(outcome.data),
    logLines: [],
  };
}

// `npm-1.48.0`, `python-0.8.1`: the name of a client and its version.
function checkClientVersion(header: string | string[] | undefined): void {
  const text = headerText(header);
  if (text !== undefined && !/^[a-z-]+-(\d+\.\d+\.\d+\S*|unknown|[0-9a-f]{7,})$/i.test(text)) {
    throw new HttpError(400, "InvalidClientVersion", `Failed to parse client version: ${text}`);
  }
}

const LONE_SURROGATE = /\p{Surrogate}/u;

function refuseLoneSurrogates(name: string, value: unknown): unknown {
  if (LONE_SURROGATE.test(name) || (typeof value === "string" && LONE_SURROGATE.test(value))) {
    throw new SyntaxError("lone leading surrogate in hex escape");
  }
  return value;
}

function unforeseen(error: unknown): HttpError {
  process.stderr.write(`local convex: unforeseen ${error instanceof Error ? error.stack : String(error)}\n`);
  return new HttpError(500, "InternalServerError", "Your request couldn't be completed. Try again later.");
}

// A dashboard is served from another origin than Convex.
function allowBrowsers(message: IncomingMessage, response: ServerResponse): void {
  const { origin } = message.headers;
  if (origin === undefined) return;
  response.setHeader("Access-Control-Allow-Origin", origin);
  response.setHeader("Access-Control-Allow-Credentials", "true");
  response.setHeader("Access-Control-Allow-Methods", "GET, POST, OPTIONS");
  response.setHeader("Access-Control-Allow-Headers", message.headers["access-control-request-headers"] ?? "*");
  response.setHeader("Vary", "Origin");
}

function send(response: ServerResponse, status: number, type: string, text: string): void {
  response.writeHead(status, { "Content-Type": type, "Content-Length": Buffer.byteLength(text) });
  response.end(text);
}

function headerText(header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header;
}
