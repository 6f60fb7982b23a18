import type { Handler, Request, Settings } from "./http.js";
import { readJson, requireAdmin } from "./http.js";
import { HttpError } from "./http_error.js";
import { adminIdentity, identityOfHeader } from "./identity.js";
import type { Printable } from "./value_json.js";

/**
 * What `npx convex dev --once` and `npx convex deploy` ask a deployment.
 *
 * A push is taken and not used: what is served is the folder as it was at the start. So it is said, on stderr, that a
 * restart serves the new state. The CLI has bundled the functions by then, checked their types and written `_generated`.
 */
export function deployRoutes(settings: Settings, log: (line: string) => void): Map<string, Handler> {
  const admin = (handle: (request: Request, body: Body) => Printable): Handler => {
    return async (request) => {
      const body = request.message.method === "GET" ? {} : requireObject(await readJson(request));
      requireKey(request, body, settings);
      return handle(request, body);
    };
  };
  return new Map<string, Handler>([
    [
      "POST /api/get_config_hashes",
      admin(() => ({
        config: { functions: "convex/" },
        moduleHashes: [],
        nodeDependencies: [],
        udfServerVersion: null,
      })),
    ],
    [
      "POST /api/deploy2/evaluate_schema",
      admin(() => ({
        componentSchemaEvaluations: { "": { definitionPath: "", schemaValidation: true, tables: [], indexes: [] } },
        newComponentDefinitions: [],
      })),
    ],
    ["POST /api/deploy2/evaluate_push", admin(() => ({ schemaChange: NO_SCHEMA_CHANGE }))],
    ["POST /api/deploy2/start_push", admin((_, body) => startPush(body))],
    ["POST /api/deploy2/wait_for_schema", admin(() => ({ type: "complete" }))],
    [
      "POST /api/deploy2/finish_push",
      admin((_, body) => {
        if (body.dryRun !== true) {
          log(
            "took a push of the CLI, and goes on serving the functions that it started with. Restart it to serve others.",
          );
        }
        return { authDiff: { added: [], removed: [] }, definitionDiffs: {}, componentDiffs: {} };
      }),
    ],
    ["POST /api/deploy2/report_push_completed", admin(() => null)],
    ["GET /api/v1/get_canonical_urls", admin((request) => canonicalUrls(request))],
    [
      "GET /api/stream_function_logs",
      admin((request) => ({ entries: [], newCursor: Number(request.url.searchParams.get("cursor")) })),
    ],
  ]);
}

type Body = Readonly<Record<string, unknown>>;

const NO_SCHEMA_CHANGE = { allocatedComponentIds: {}, schemaIds: {}, indexDiffs: {} };

// The CLI sends its key in the header to some routes, and in the body to others.
function requireKey({ message }: Request, body: Body, { adminKey }: Settings): void {
  const key = body.adminKey;
  const isInBody = message.headers.authorization === undefined && typeof key === "string";
  requireAdmin(
    isInBody ? adminIdentity(key, adminKey, null) : identityOfHeader(message.headers.authorization, adminKey),
  );
}

function requireObject(body: unknown): Body {
  if (typeof body === "object" && body !== null && !Array.isArray(body)) return body as Body;
  throw new HttpError(400, "BadJsonBody", "The body is not an object");
}

function startPush(body: Body): Printable {
  const app = requireObject(body.appDefinition);
  return {
    environmentVariables: {},
    externalDepsId: null,
    componentDefinitionPackages: {},
    appAuth: [],
    analysis: {
      "": {
        definition: {
          path: "",
          definitionType: { type: "app" },
          childComponents: [],
          httpMounts: {},
          exports: { type: "branch", branch: [] },
        },
        schema: null,
        functions: {},
        udfConfig: {
          serverVersion: String(app.udfServerVersion),
          importPhaseRngSeed: null,
          importPhaseUnixTimestamp: null,
        },
      },
    },
    app: {
      definitionPath: "",
      componentPath: "",
      args: {},
      childComponents: {},
      httpRoutes: { httpModuleRoutes: null, mounts: [] },
      exports: {},
    },
    schemaChange: NO_SCHEMA_CHANGE,
  };
}

function canonicalUrls({ message }: Request): Printable {
  const url = `http://${message.headers.host}`;
  return { convexCloudUrl: url, convexSiteUrl: url };
}
