import { convexToJson, type JSONValue, type Value } from "convex/values";

/**
 * JSON text that is put into an answer as it stands.
 *
 * A Float64 has to be printed as `5.0`: the Python client takes a JSON integer for a fault of the server and raises.
 * The numbers of an envelope (versions, request ids) on the other hand must be integers, so that the two cannot be told
 * apart once they are in one tree. Values are therefore printed first, and embedded as text.
 */
export class JsonText {
  readonly text: string;

  constructor(text: string) {
    this.text = text;
  }
}

/** What `printJson` prints: JSON, with printed values in it. `undefined` fields are left out. */
export type Printable =
  | JsonText
  | null
  | boolean
  | number
  | string
  | readonly Printable[]
  | { readonly [field: string]: Printable | undefined };

/** Prints an envelope: numbers as JavaScript prints them. */
export function printJson(value: Printable): string {
  if (value instanceof JsonText) return value.text;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (isList(value)) return `[${value.map(printJson).join(",")}]`;
  const fields = Object.entries(value).filter((entry): entry is [string, Printable] => entry[1] !== undefined);
  return `{${fields.map(([name, field]) => `${JSON.stringify(name)}:${printJson(field)}`).join(",")}}`;
}

// Array.isArray does not narrow a readonly array.
function isList(value: object): value is readonly Printable[] {
  return Array.isArray(value);
}

/** Prints a Convex value in the encoding `convex_encoded_json`. */
export function printValue(value: Value): JsonText {
  return new JsonText(printFloats(convexToJson(value)));
}

/** Prints a Convex value in the format `json`: bytes as base64, Int64 as text of its digits. */
export function printCleanValue(value: Value): JsonText {
  return new JsonText(printFloats(cleanJson(value)));
}

function printFloats(json: JSONValue): string {
  if (typeof json === "number") return printFloat(json);
  if (json === null || typeof json !== "object") return JSON.stringify(json);
  if (Array.isArray(json)) return `[${json.map(printFloats).join(",")}]`;
  const fields: string[] = [];
  for (const name of Object.keys(json)) {
    const field = json[name];
    if (field !== undefined) fields.push(`${JSON.stringify(name)}:${printFloats(field)}`);
  }
  return `{${fields.join(",")}}`;
}

function printFloat(number: number): string {
  const text = JSON.stringify(number);
  // From 1e21 on the text has an exponent, which every JSON reader takes for a float.
  return Number.isInteger(number) && !text.includes("e") ? `${text}.0` : text;
}

function cleanJson(value: Value): JSONValue {
  if (typeof value === "bigint") return value.toString();
  if (typeof value === "number") return Number.isFinite(value) ? value : String(value);
  if (value instanceof ArrayBuffer) return Buffer.from(value).toString("base64");
  if (Array.isArray(value)) return value.map(cleanJson);
  if (value === null || typeof value !== "object") return value;
  const fields = Object.entries(value).filter((entry): entry is [string, Value] => entry[1] !== undefined);
  return Object.fromEntries(fields.map(([name, field]) => [name, cleanJson(field)]));
}
