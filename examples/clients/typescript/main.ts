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
    const seconds = response.headers.get("Retry-After");
    if (seconds === null && response.status === 200 && data) return data;
    if (seconds === null || Date.now() > deadline) throw new Error(`${response.status}: ${JSON.stringify(error ?? data)}`);
    await sleep(1000 * Number(seconds));
  }
}

console.log(JSON.stringify(await finished(submitID)));
