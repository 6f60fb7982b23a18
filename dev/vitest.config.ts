import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

export default defineConfig({
  // The root of the repository, since the tests and the functions they test lie beside dev/.
  root: fileURLToPath(new URL("..", import.meta.url)),
  test: {
    include: ["tests/**/*.test.ts"],
    // One core less is the default, which on two of them is one.
    maxWorkers: "100%",
    // A local Convex takes a second to start, and far longer beside other things.
    testTimeout: 60_000,
    hookTimeout: 60_000,
    expect: { poll: { timeout: 30_000 } },
  },
});
