import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { Backend } from "./backend.js";
import { deployRoutes } from "./deploy.js";
import { loadFunctions } from "./functions.js";
import { answer, functionRoutes } from "./http.js";
import { newAdminKey } from "./identity.js";
import { serveSync } from "./sockets.js";

const FINISH_MS = 1000;

export type Options = {
  /** The folder of the Convex functions. */
  readonly functions: string;
  readonly host?: string;
  /** 0 takes any free port. */
  readonly port?: number;
  readonly adminKey?: string;
  readonly redact?: boolean;
  /** Is told what an operator may want to know. */
  readonly log?: (line: string) => void;
};

export type LocalConvex = {
  readonly url: string;
  readonly adminKey: string;
  readonly functions: readonly string[];
  close(): Promise<void>;
};

/** Starts a local Convex; it answers when the promise resolves. */
export async function startLocalConvex(options: Options): Promise<LocalConvex> {
  const { host = "127.0.0.1", port = 0, adminKey = newAdminKey(), redact = false, log = () => undefined } = options;
  const backend = new Backend(await loadFunctions(options.functions));
  const settings = { adminKey, redact };
  const routes = new Map([...functionRoutes(backend, settings), ...deployRoutes(settings, log)]);
  const server = createServer((message, response) => void answer(routes, message, response));
  // Node closes an idle connection after 5 s by default, right when a kept-alive client may send its next request.
  server.keepAliveTimeout = 65_000;
  const endSync = serveSync(server, backend, settings);
  await listen(server, port, host);
  const address = server.address() as AddressInfo;
  const shown = address.family === "IPv6" ? `[${address.address}]` : address.address;
  return {
    url: `http://${shown}:${address.port}`,
    adminKey,
    functions: backend.functions.list(),
    close: async () => {
      endSync();
      // What is being answered may still be; a client that just keeps its connection is not waited for.
      const patience = setTimeout(() => server.closeAllConnections(), FINISH_MS);
      await new Promise<void>((resolve) => void server.close(() => resolve()));
      clearTimeout(patience);
    },
  };
}

function listen(server: Server, port: number, host: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, host, () => {
      server.off("error", reject);
      resolve();
    });
  });
}
