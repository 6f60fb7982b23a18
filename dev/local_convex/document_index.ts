import { createRequire } from "node:module";
import type { Value } from "convex/values";
import type BTree from "sorted-btree";
import { AFTER, compareKeys, type IndexKey } from "./value_order.js";

export type Document = {
  readonly _id: string;
  readonly _creationTime: number;
  readonly [field: string]: Value | undefined;
};

/** A half-open interval of index keys: `from` belongs to it, `to` does not. */
export type KeyRange = { readonly from: IndexKey; readonly to: IndexKey };

// The package is CommonJS with a default export, which Node, tsx and vitest each interpret in their own way.
const { default: SortedMap } = createRequire(import.meta.url)("sorted-btree") as { default: typeof BTree };

type Tree = BTree<IndexKey, Document>;
type Index = { readonly paths: readonly (readonly string[])[]; readonly tree: Tree };
type Table = { readonly documents: Map<string, Document>; readonly indexes: Map<string, Index> };

// Most reads want one document, a few want all: the first pull is small, the next ones grow.
const FIRST_PULL = 4;
const LARGEST_PULL = 256;

/**
 * The documents as the running transaction sees them, sorted by every index that was asked for.
 *
 * It knows nothing of transactions: whoever writes, commits or rolls back says what a document is now.
 */
export class DocumentIndex {
  readonly #tables = new Map<string, Table>();

  /** Makes sure that documents of `table` are sorted by `fields` (which end in a field that is unique). */
  ensure(table: string, fields: readonly string[]): void {
    this.#index(this.#table(table), fields);
  }

  /** Notes what the document `id` is now; null if it is no more. */
  set(id: string, document: Document | null): void {
    const table = this.#table(tableOfId(id));
    const known = table.documents.get(id);
    if (known === document || (known === undefined && document === null)) return;
    for (const index of table.indexes.values()) {
      if (known !== undefined) index.tree.delete(keyOf(known, index.paths));
      if (document !== null) index.tree.set(keyOf(document, index.paths), document);
    }
    if (document === null) table.documents.delete(id);
    else table.documents.set(id, document);
  }

  all(table: string): Iterable<Document> {
    return this.#table(table).documents.values();
  }

  /** The documents of a range, in the order of `fields`, read as they are pulled. */
  *scan(table: string, fields: readonly string[], range: KeyRange, order: "asc" | "desc"): Generator<Document> {
    const { tree } = this.#index(this.#table(table), fields);
    let rest: KeyRange | null = range;
    // The caller may write between two pulls, which an iterator of the tree does not survive. So every pull
    // looks its place up again.
    for (let size = FIRST_PULL; rest !== null; size = Math.min(size * 2, LARGEST_PULL)) {
      const pulled: [IndexKey, Document][] =
        order === "asc" ? ascending(tree, rest, size) : descending(tree, rest, size);
      for (const [, document] of pulled) yield document;
      const last: IndexKey | undefined = pulled.at(-1)?.[0];
      if (last === undefined || pulled.length < size) rest = null;
      else rest = restOf(rest, last, order);
    }
  }

  #table(name: string): Table {
    let table = this.#tables.get(name);
    if (table === undefined) {
      table = { documents: new Map(), indexes: new Map() };
      this.#tables.set(name, table);
    }
    return table;
  }

  #index(table: Table, fields: readonly string[]): Index {
    const name = fields.join();
    let index = table.indexes.get(name);
    if (index === undefined) {
      const paths = fields.map((field) => field.split("."));
      index = { paths, tree: new SortedMap<IndexKey, Document>(undefined, compareKeys) };
      for (const document of table.documents.values()) index.tree.set(keyOf(document, paths), document);
      table.indexes.set(name, index);
    }
    return index;
  }
}

/** What of a range lies behind the key `last`, in the given order. */
export function restOf(range: KeyRange, last: IndexKey, order: "asc" | "desc"): KeyRange {
  return order === "asc" ? { ...range, from: [...last, AFTER] } : { ...range, to: last };
}

/** Ids of convex-test are a number and the name of the table. */
export function tableOfId(id: string): string {
  return id.replace(/^[0-9]+/, "");
}

function ascending(tree: Tree, range: KeyRange, size: number): [IndexKey, Document][] {
  const pulled: [IndexKey, Document][] = [];
  for (const pair of tree.entries(range.from)) {
    if (compareKeys(pair[0], range.to) >= 0 || pulled.push(pair) === size) break;
  }
  return pulled;
}

function descending(tree: Tree, range: KeyRange, size: number): [IndexKey, Document][] {
  const pulled: [IndexKey, Document][] = [];
  const excludeHighest = true;
  for (const pair of tree.entriesReversed(range.to, undefined, excludeHighest)) {
    if (compareKeys(pair[0], range.from) < 0 || pulled.push(pair) === size) break;
  }
  return pulled;
}

function keyOf(document: Document, paths: readonly (readonly string[])[]): IndexKey {
  return paths.map((path) => {
    let value: Value | undefined = document as Value;
    for (const field of path) {
      const isObject: boolean =
        typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof ArrayBuffer);
      value = isObject ? (value as Record<string, Value | undefined>)[field] : undefined;
    }
    return value;
  });
}
