/**
 * A list that is read from an iterator as far as somebody looks.
 *
 * convex-test's pagination walks a sorted list from its start, by position and length, and stops after a page. Its
 * length is therefore what has been read, and one more if there is one: enough to tell "this is the last".
 */
export class LazyList<T> {
  readonly #source: Iterator<T>;
  readonly #read: T[] = [];
  #asked = -1;

  private constructor(source: Iterator<T>) {
    this.#source = source;
  }

  static over<T>(source: Iterator<T>): { readonly length: number; readonly [position: number]: T } {
    const list = new LazyList(source);
    return new Proxy<{ readonly length: number; readonly [position: number]: T }>([], {
      get: (_, name) => {
        if (name === "length") return list.#length();
        if (typeof name === "string" && /^[0-9]+$/.test(name)) return list.#at(Number(name));
        throw new Error(`A LazyList has positions and a length, but no ${String(name)}`);
      },
    });
  }

  #at(position: number): T | undefined {
    this.#asked = Math.max(this.#asked, position);
    this.#readTo(position);
    return this.#read[position];
  }

  #length(): number {
    this.#readTo(this.#asked + 1);
    return this.#read.length;
  }

  #readTo(position: number): void {
    while (this.#read.length <= position) {
      const next = this.#source.next();
      if (next.done === true) return;
      this.#read.push(next.value);
    }
  }
}
