import type { UserIdentity } from "convex/server";
import type { JSONValue } from "convex/values";

/** What a client asks for over the WebSocket. Only the fields that are used here. */
export type ClientMessage =
  | { readonly type: "Connect"; readonly sessionId: string }
  | {
      readonly type: "ModifyQuerySet";
      readonly baseVersion: number;
      readonly newVersion: number;
      readonly modifications: readonly Modification[];
    }
  | {
      readonly type: "Mutation" | "Action";
      readonly requestId: number;
      readonly udfPath: string;
      readonly args: JSONValue;
    }
  | Authenticate
  | { readonly type: "Event" };

export type Modification =
  | { readonly type: "Add"; readonly queryId: number; readonly udfPath: string; readonly args: JSONValue }
  | { readonly type: "Remove"; readonly queryId: number };

export type Authenticate = { readonly type: "Authenticate"; readonly baseVersion: number } & (
  | { readonly tokenType: "None" }
  | { readonly tokenType: "User"; readonly value: string }
  | { readonly tokenType: "Admin"; readonly value: string; readonly impersonating?: Partial<UserIdentity> | null }
);

/** The client broke the protocol: it is told why, and the connection ends. */
export class ProtocolError extends Error {}

/** @throws ProtocolError for anything but a message that is understood. */
export function parseClientMessage(text: string): ClientMessage {
  let message: unknown;
  try {
    message = JSON.parse(text);
  } catch {
    throw new ProtocolError("Received a message that is no JSON");
  }
  if (!isRecord(message)) throw new ProtocolError("Received a message that is no object");
  const fields = FIELDS[String(message.type)];
  if (fields === undefined)
    throw new ProtocolError(`Received a message of unknown type ${JSON.stringify(message.type)}`);
  for (const [name, type] of Object.entries(fields)) {
    const field = message[name];
    const isThere = type === "list" ? Array.isArray(field) : typeof field === type;
    if (!isThere) throw new ProtocolError(`Received a ${message.type} whose ${name} is no ${type}`);
  }
  return message as ClientMessage;
}

// The fields that a message must have. Those of a modification and of a token are looked at where they are used.
const FIELDS: Readonly<Record<string, Readonly<Record<string, "string" | "number" | "list">>>> = {
  Connect: { sessionId: "string" },
  ModifyQuerySet: { baseVersion: "number", newVersion: "number", modifications: "list" },
  Mutation: { requestId: "number", udfPath: "string", args: "list" },
  Action: { requestId: "number", udfPath: "string", args: "list" },
  Authenticate: { baseVersion: "number", tokenType: "string" },
  Event: {},
};

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
