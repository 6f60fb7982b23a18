import type { Server } from "node:http";
import { type WebSocket, WebSocketServer } from "ws";
import type { Backend } from "./backend.js";
import type { Settings } from "./http.js";
import { RememberedMutations, SyncSession } from "./sync.js";

// Clients give up a connection that is silent for 30 s (Rust) or 60 s (JavaScript); the real server pings at 15 s.
const PING_MS = 15_000;
const MAX_MESSAGE_BYTES = (16 << 20) + 2000;

/** `/api/sync` is what the Rust client asks for, `/api/1.2.3/sync` the JavaScript one. */
const SYNC_PATH = /^\/api\/([^/]+\/)?sync$/;

/** Serves the sync protocol on `server`. Returns how to end it, with all its connections. */
export function serveSync(server: Server, backend: Backend, settings: Settings): () => void {
  const sockets = new WebSocketServer({ noServer: true, maxPayload: MAX_MESSAGE_BYTES });
  const mutations = new RememberedMutations();
  sockets.on("connection", (socket: WebSocket) => serve(socket, backend, settings, mutations));
  server.on("upgrade", (request, socket, head) => {
    const { pathname } = new URL(request.url ?? "/", "http://local");
    if (SYNC_PATH.test(pathname))
      sockets.handleUpgrade(request, socket, head, (opened) => sockets.emit("connection", opened, request));
    else socket.end("HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n");
  });
  return () => {
    for (const socket of sockets.clients) socket.terminate();
    sockets.close();
  };
}

function serve(socket: WebSocket, backend: Backend, settings: Settings, mutations: RememberedMutations): void {
  const session = new SyncSession(backend, settings, mutations, {
    send: (text) => socket.send(text),
    close: (code, reason) => socket.close(code, reason),
  });
  const ping = setInterval(() => socket.send('{"type":"Ping"}'), PING_MS);
  socket.on("message", (data) => session.receive(String(data)));
  // What goes wrong with a connection ends it, and then "close" follows.
  socket.on("error", () => undefined);
  socket.on("close", () => {
    clearInterval(ping);
    session.end();
  });
}
