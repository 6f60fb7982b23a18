import { getDocumentSize, type Value } from "convex/values";

// The limits of the real backend: docs.convex.dev/production/state/limits.
const MAX_DOCUMENT_BYTES = 1 << 20;
const MAX_DOCUMENT_NESTING = 16;
const MAX_VALUE_NESTING = 64;
const MAX_ARRAY_ITEMS = 8192;
const MAX_OBJECT_FIELDS = 1024;
const MAX_FIELD_NAME_LENGTH = 1024;

/** A value that no document, argument or result may have. Its message quotes names of fields, never contents. */
export class LimitExceeded extends Error {
  override readonly name = "Error";
}

/** Checks the fields of a document that is about to be written, without `_id` and `_creationTime`. */
export function checkDocument(table: string, fields: Record<string, Value | undefined>): void {
  const reserved = Object.keys(fields).find(
    (name) => name.startsWith("_") && name !== "_id" && name !== "_creationTime",
  );
  if (reserved !== undefined) {
    throw new LimitExceeded(
      `Field '${reserved}' starts with an underscore, which is only allowed for system fields like '_id'`,
    );
  }
  checkShape(fields as Value, MAX_DOCUMENT_NESTING);
  const bytes = getDocumentSize(fields as Record<string, Value>);
  if (bytes > MAX_DOCUMENT_BYTES) {
    throw new LimitExceeded(`Value is too large (${bytes} bytes > maximum size 1 MiB) in table "${table}"`);
  }
}

/** Checks a value that is an argument or a result. */
export function checkValue(value: Value): void {
  checkShape(value, MAX_VALUE_NESTING);
}

function checkShape(value: Value, deeper: number): void {
  if (value === null || typeof value !== "object" || value instanceof ArrayBuffer) return;
  if (deeper === 0) throw new LimitExceeded("Value is too nested (the maximum is 64 levels, for a document 16)");
  if (Array.isArray(value)) {
    if (value.length > MAX_ARRAY_ITEMS) {
      throw new LimitExceeded(`Array length is too long (${value.length} > maximum length ${MAX_ARRAY_ITEMS})`);
    }
    for (const item of value) checkShape(item, deeper - 1);
    return;
  }
  const names = Object.keys(value);
  if (names.length > MAX_OBJECT_FIELDS) {
    throw new LimitExceeded(`Object has too many fields (${names.length} > maximum number ${MAX_OBJECT_FIELDS})`);
  }
  for (const name of names) {
    checkFieldName(name);
    const field = (value as Record<string, Value | undefined>)[name];
    if (field !== undefined) checkShape(field, deeper - 1);
  }
}

function checkFieldName(name: string): void {
  if (name.length > MAX_FIELD_NAME_LENGTH) {
    throw new LimitExceeded(`Field name is too long (${name.length} > maximum ${MAX_FIELD_NAME_LENGTH})`);
  }
  if (name.startsWith("$")) throw new LimitExceeded(`Field name '${name}' starts with '$', which is reserved`);
  // Convex takes printable ASCII, that is space to tilde.
  if (name === "" || !/^[ -~]*$/.test(name)) {
    throw new LimitExceeded("Field names must not be empty, and can only contain printable ASCII characters");
  }
}
