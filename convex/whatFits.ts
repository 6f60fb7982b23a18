import { getConvexSize, type Value } from "convex/values";

// A query may read 16 MiB, and a document may have 1.
const MOST_BYTES = 8 * 1024 * 1024;

/** The first documents of a query: at most `limit`, and fewer where they are so large that more would be too much. */
export async function* whatFits<Document extends Value>(
  query: AsyncIterable<Document>,
  limit: number,
): AsyncGenerator<Document> {
  let [documents, bytes] = [0, 0];
  for await (const document of query) {
    yield document;
    documents += 1;
    bytes += getConvexSize(document);
    if (documents >= limit || bytes > MOST_BYTES) return;
  }
}
