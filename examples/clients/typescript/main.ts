// Print the finished report of a submission. The arguments are the site and the submission's ID.
import { setTimeout as sleep } from "node:timers/promises";
import { client } from "./client/client.gen.js";
import { getTask, type Report } from "./client/index.js";

const [baseUrl, submitID] = process.argv.slice(2);
client.setConfig({
  baseUrl,
  // Choose one scheme. If auth is a string, the client sends the secret in all of them, also in the query.
  auth: ({ scheme }) => (scheme === "bearer" ? process.env.FSBROKER_SECRET : undefined),
});

async function finished(submitID: string): Promise<Report> {
  const deadline = Date.now() + 600_000;
  for (;;) {
    const { data, error, response } = await getTask({ query: { submitID, wait: 30 } });
    if (!response) throw error; // there is no connection
    // For 204, data is an empty object.
    if (data && response.status === 200 && response.headers.get("Cache-Control") !== "no-store") return data;
    const again = [200, 204, 502, 503, 504].includes(response.status) && Date.now() < deadline;
    if (!again) throw new Error(`${response.status}: ${JSON.stringify(error)}`);
    await sleep(1000 * Number(response.headers.get("Retry-After") ?? 2));
  }
}

console.log(JSON.stringify(await finished(submitID)));
