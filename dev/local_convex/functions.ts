import { readdir } from "node:fs/promises";
import { join, relative, sep } from "node:path";
import { pathToFileURL } from "node:url";
import type { GenericSchema, SchemaDefinition } from "convex/server";

export type FunctionKind = "query" | "mutation" | "action";

/** A function as it is called from outside: `folder/module:export`. */
export type FunctionPath = { readonly module: string; readonly name: string };

export type FoundFunction = { readonly kind: FunctionKind; readonly isPublic: boolean };

type Module = Readonly<Record<string, unknown>>;

/** The project's functions and schema, imported once. */
export type Functions = {
  /** As convexTest() wants them: file name to a function that imports it. */
  readonly modules: Record<string, () => Promise<Module>>;
  readonly schema: SchemaDefinition<GenericSchema, boolean> | undefined;
  find(path: FunctionPath): FoundFunction | null;
  list(): string[];
};

/** Written by the CLI, or read by it: no functions in them. */
const NOT_FUNCTIONS = /(^|\/)(_generated\/|node_modules\/|\.)|(\.config|\.test|\.d)\.[cm]?[jt]sx?$/;

/**
 * Imports every module below `folder`.
 *
 * @throws whatever a module throws: what cannot be imported here could not be deployed either.
 */
export async function loadFunctions(folder: string): Promise<Functions> {
  const modules: Record<string, () => Promise<Module>> = {
    // convex-test finds the root of the functions by the place of this folder, and wants nothing of it.
    "./_generated/api.js": () => Promise.resolve({}),
  };
  const loaded = new Map<string, Module>();
  let schema: Functions["schema"];
  for (const file of await functionFiles(folder)) {
    const imported = unwrap((await import(pathToFileURL(join(folder, file)).href)) as Module);
    if (/^schema\.[cm]?[jt]s$/.test(file)) {
      schema = imported.default as SchemaDefinition<GenericSchema, boolean>;
      continue;
    }
    modules[`./${file}`] = () => Promise.resolve(imported);
    loaded.set(file.replace(/\.[^.]+$/, ""), imported);
  }
  const find = ({ module, name }: FunctionPath) => describe(loaded.get(module)?.[name]);
  const list = () =>
    [...loaded].flatMap(([module, exports]) =>
      Object.keys(exports).flatMap((name) => (describe(exports[name]) === null ? [] : [`${module}:${name}`])),
    );
  return { modules, schema, find, list };
}

/**
 * Parses `folder/module:name`; a `.js` behind the module and a missing name (`default`) are allowed.
 *
 * @returns null if that cannot be the path of a function.
 */
export function parseFunctionPath(text: string): FunctionPath | null {
  const [module = "", name = "default", ...rest] = text.split(":");
  const isIdentifier = /^[A-Za-z_][A-Za-z0-9_]*$/.test(name);
  const parts = module.replace(/\.js$/, "").split("/");
  if (rest.length > 0 || !isIdentifier || !parts.every((part) => /^[A-Za-z0-9_.]+$/.test(part))) return null;
  return { module: parts.join("/"), name };
}

export function printFunctionPath({ module, name }: FunctionPath): string {
  return name === "default" ? module : `${module}:${name}`;
}

async function functionFiles(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  return entries
    .filter((entry) => entry.isFile() && /\.[cm]?[jt]sx?$/.test(entry.name))
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)).split(sep).join("/"))
    .filter((file) => !NOT_FUNCTIONS.test(file))
    .sort();
}

// A folder without a package.json holds CommonJS as far as Node is concerned: what tsx makes of an ES module there
// comes back as the default export.
function unwrap(imported: Module): Module {
  const inner = imported.default;
  const isInterop = typeof inner === "object" && inner !== null && "__esModule" in inner;
  return isInterop ? (inner as Module) : imported;
}

function describe(exported: unknown): FoundFunction | null {
  if (typeof exported !== "function") return null;
  const marks = exported as { isQuery?: true; isMutation?: true; isAction?: true; isPublic?: true };
  const isPublic = marks.isPublic === true;
  if (marks.isQuery === true) return { kind: "query", isPublic };
  if (marks.isMutation === true) return { kind: "mutation", isPublic };
  if (marks.isAction === true) return { kind: "action", isPublic };
  return null;
}
