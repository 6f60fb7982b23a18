import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import type { UserIdentity } from "convex/server";
import { HttpError } from "./http_error.js";

/** Who calls: nobody known, a user, or an admin (who may act as a user). */
export type Identity =
  | { readonly kind: "none" }
  | { readonly kind: "user"; readonly user: Partial<UserIdentity> }
  | { readonly kind: "admin"; readonly user: Partial<UserIdentity> | null };

export const NOBODY: Identity = { kind: "none" };

export const INSTANCE_NAME = "local-convex";

/** A key of the form that real ones have: the name of the deployment, a bar, and a secret in hex. */
export function newAdminKey(): string {
  return `${INSTANCE_NAME}|${randomBytes(32).toString("hex")}`;
}

/**
 * Reads the header `Authorization`.
 *
 * @throws HttpError 400 for a header that is none, 401 for a wrong key or an unreadable token.
 */
export function identityOfHeader(header: string | undefined, adminKey: string): Identity {
  if (header === undefined) return NOBODY;
  const [scheme = "", credentials = ""] = splitOnce(header, " ");
  if (/^convex$/i.test(scheme)) {
    // `prod:name|secret` is a deploy key with the type of its deployment; `name|secret:base64` acts as a user.
    const [key = "", actingAs] = splitOnce(withoutDeploymentType(credentials.trim()), ":");
    return adminIdentity(key, adminKey, actingAs === undefined ? null : parseActingUser(actingAs));
  }
  if (/^bearer$/i.test(scheme) && credentials !== "") return userIdentity(credentials);
  throw new HttpError(
    400,
    header.length < 7 ? "InvalidHeaderFailure" : "InvalidAdminKey",
    "Invalid authentication header",
  );
}

/** @throws HttpError 401 if `key` is not the admin key of this deployment. */
export function adminIdentity(key: string, adminKey: string, user: Partial<UserIdentity> | null): Identity {
  if (!isSame(withoutDeploymentType(key), withoutDeploymentType(adminKey))) {
    throw new HttpError(401, "BadAdminKey", "The provided admin key was invalid for this instance");
  }
  return { kind: "admin", user };
}

/**
 * The user that a JSON web token names. Nothing is verified but its form and its expiry.
 *
 * @throws HttpError 401 if it is no token, or has expired.
 */
export function userIdentity(token: string): Identity {
  const claims = parseClaims(token);
  if (claims === null)
    throw new HttpError(401, "InvalidAuthHeader", "Could not parse as a JSON web token with a subject");
  const expiry = claims.exp;
  if (typeof expiry === "number" && expiry * 1000 <= Date.now()) {
    throw new HttpError(401, "InvalidAuthHeader", "Could not validate token: it has expired");
  }
  const user: Record<string, unknown> = {};
  for (const [claim, value] of Object.entries(claims)) user[ATTRIBUTE_OF_CLAIM[claim] ?? claim] = value;
  return { kind: "user", user: user as Partial<UserIdentity> };
}

// The standard claims of OpenID Connect, by the names that ctx.auth.getUserIdentity() has for them. All others keep theirs.
const ATTRIBUTE_OF_CLAIM: Readonly<Record<string, string>> = {
  sub: "subject",
  iss: "issuer",
  given_name: "givenName",
  family_name: "familyName",
  preferred_username: "preferredUsername",
  profile: "profileUrl",
  picture: "pictureUrl",
  email_verified: "emailVerified",
  birthdate: "birthday",
  zoneinfo: "timezone",
  locale: "language",
  phone_number: "phoneNumber",
  phone_number_verified: "phoneNumberVerified",
  updated_at: "updatedAt",
};

function parseClaims(token: string): Record<string, unknown> | null {
  const parts = token.split(".");
  if (parts.length !== 3) return null;
  try {
    const claims: unknown = JSON.parse(Buffer.from(parts[1] ?? "", "base64url").toString("utf8"));
    const isObject = typeof claims === "object" && claims !== null;
    return isObject && "sub" in claims && typeof claims.sub === "string" ? (claims as Record<string, unknown>) : null;
  } catch {
    return null;
  }
}

function parseActingUser(encoded: string): Partial<UserIdentity> {
  try {
    const attributes: unknown = JSON.parse(Buffer.from(encoded, "base64").toString("utf8"));
    if (typeof attributes === "object" && attributes !== null) return attributes;
  } catch {
    // Falls through to the refusal.
  }
  throw new HttpError(400, "HeaderParseFailure", "Malformed Authorization header.");
}

function withoutDeploymentType(key: string): string {
  return key.replace(/^[a-z]+:(?=[^:|]*\|)/, "");
}

// Digests have one length, so that the time says nothing, not even how long the key is.
function isSame(left: string, right: string): boolean {
  const digest = (text: string) => createHash("sha256").update(text).digest();
  return timingSafeEqual(digest(left), digest(right));
}

function splitOnce(text: string, separator: string): [string, string?] {
  const at = text.indexOf(separator);
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + separator.length)];
}
