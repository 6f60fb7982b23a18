import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

export default defineConfig({
  // The root of the repository, since the tests and the functions they test lie beside dev/.
  root: fileURLToPath(new URL("..", import.meta.url)),
  test: {
    include: ["tests/**/*.test.ts"],
    // One core less is the default, which on two of them is one.
    maxWorkers: "100%",
  },
});
