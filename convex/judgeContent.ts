import type { GenericValidator, ObjectType, PropertyValidators } from "convex/values";

export type Judgement<Content> = { content: Content } | { rejected: string };

/**
 * Says whether a table could hold these fields, by the table's own validators.
 *
 * Convex checks arguments and writes by itself, but a failed check fails the whole mutation. Here a wrong document
 * gets a reason of its own and the rest of its batch stands. It is stricter in one thing: a number must be finite,
 * since NaN and infinity are floats to Convex but no time to anybody. The reason names fields and never quotes content.
 */
export function judgeContent<Fields extends PropertyValidators>(
  fields: Fields,
  document: unknown,
): Judgement<ObjectType<Fields>> {
  if (typeof document !== "object" || document === null || Array.isArray(document)) {
    return { rejected: "the document must be an object" };
  }
  // The name of an unknown field is not quoted: it may have come from a row.
  if (Object.keys(document).some((name) => !Object.hasOwn(fields, name))) {
    return { rejected: `the document may have these fields only: ${Object.keys(fields).join(", ")}` };
  }
  const values = new Map<string, unknown>(Object.entries(document));
  for (const [name, validator] of Object.entries(fields)) {
    const value = values.get(name);
    if (value === undefined) {
      if (validator.isOptional === "required") return { rejected: `${name} is missing` };
    } else if (!fits(validator, value)) {
      return { rejected: `${name} must be ${describe(validator)}` };
    }
  }
  return { content: document as ObjectType<Fields> };
}

function fits(validator: GenericValidator, value: unknown): boolean {
  switch (validator.kind) {
    case "any":
      return true;
    case "null":
      return value === null;
    case "string":
      return typeof value === "string";
    case "float64":
      return Number.isFinite(value);
    case "literal":
      return value === validator.value;
    case "union":
      return validator.members.some((member) => fits(member, value));
    default:
      throw unknownKind(validator);
  }
}

function describe(validator: GenericValidator): string {
  switch (validator.kind) {
    case "null":
      return "null";
    case "string":
      return "a string";
    case "float64":
      return "a finite number";
    case "literal":
      return JSON.stringify(validator.value);
    case "union":
      return `one of ${validator.members.map(describe).join(", ")}`;
    default:
      throw unknownKind(validator);
  }
}

function unknownKind(validator: GenericValidator): Error {
  return new Error(`The schema has a field of kind ${validator.kind}: teach judgeContent.ts about it.`);
}
