// Use the generated client. The Go test of the parent folder runs this, with a site and a queued submission.
import assert from "node:assert/strict";
import { createClient } from "./client/client/index.js";
import { getTask, headTask, optionsTask, type GetTaskError } from "./client/index.js";

function env(name: string): string {
  const value = process.env[name];
  assert(value, name);
  return value;
}
const baseUrl = env("FSBROKER_SITE");
const secret = env("FSBROKER_SECRET");
const submitID = env("FSBROKER_SUBMIT_ID");

type Scheme = { in?: string; name?: string; scheme?: string };
const presenting = (secret: string, wanted: (scheme: Scheme) => boolean) =>
  createClient({ baseUrl, auth: (scheme) => (wanted(scheme) ? secret : undefined) });
const client = presenting(secret, ({ scheme }) => scheme === "bearer");

// Nothing yet. The broker hands the file to the node when it has answered this.
const nothing = await getTask({ client, query: { submitID } });
assert.equal(nothing.response?.status, 204);
assert(Number(nothing.response.headers.get("Retry-After")) >= 1);
assert(!nothing.request.url.includes(secret));

// Waiting, as both the header and the parameter. The first wait is too short for the analysis.
const short = await getTask({ client, query: { submitID }, headers: { Prefer: "wait=1" } });
assert(short.response?.status === 204 || short.response?.status === 200);
assert.equal(short.response.headers.get("Cache-Control"), "no-store");
assert.equal(short.response.headers.get("Preference-Applied"), "wait=1");
const report = await getTask({ client, query: { submitID, wait: 50 } });
assert.equal(report.response?.status, 200);
assert.equal(report.data?.result.taskReference?.state, "SUCCESS");
assert.equal(report.data.result.overallState, "success");
const etag = report.response.headers.get("ETag");
assert(etag);

// The caller has the report already. The client treats 304 like an error.
const known = await getTask({ client, query: { submitID }, headers: { "If-None-Match": etag } });
assert.equal(known.response?.status, 304);
assert.equal(known.data, undefined);

const methods = await optionsTask({ client: createClient({ baseUrl }) });
assert.equal(methods.response?.status, 204);
assert.equal(methods.response.headers.get("Allow"), "GET, HEAD, OPTIONS");

const head = await headTask({ client, query: { submitID } });
assert.equal(head.response?.status, 200);

// Each way to present the secret.
for (const { place, name } of [
  { place: "header", name: "secret" },
  { place: "header", name: "X-Api-Key" },
  { place: "query", name: "secret" },
  { place: "query", name: "serect" },
]) {
  const presenter = presenting(secret, (scheme) => (scheme.in ?? "header") === place && scheme.name === name);
  const got = await getTask({ client: presenter, query: { submitID } });
  assert.equal(got.response?.status, 200, `${name} in the ${place}`);
  assert.equal(got.request.url.includes(secret), place === "query");
}

// With a string instead of a function, the secret is in all places, and in the caller's own object.
const careless = createClient({ baseUrl, auth: secret });
const query = { submitID };
const everywhere = await getTask({ client: careless, query });
assert(everywhere.request.url.includes(secret) && JSON.stringify(query).includes(secret));

// Problems.
function check(got: { response?: Response; error?: GetTaskError }, status: number, code: GetTaskError["code"]) {
  assert.equal(got.response?.status, status);
  assert.equal(got.error?.code, code);
  assert(got.error.detail);
}
const stranger = presenting("wrong", ({ scheme }) => scheme === "bearer");
check(await getTask({ client: stranger, query: { submitID } }), 401, "unauthorized");
check(await getTask({ client, query: { submitID: "no such submission" } }), 404, "unknown_submission");
check(await getTask({ client, query: { taskID: "1" } }), 400, "missing_parameter");
check(await getTask({ client, query: { submitID }, headers: { "If-Match": '"another"' } }), 412, "precondition_failed");
const kept = { "Cache-Control": "only-if-cached" };
check(await getTask({ client, query: { submitID: "another" }, headers: kept }), 504, "not_cached");
