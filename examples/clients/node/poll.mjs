// Submit a file, and print its finished report. The arguments are the site and the file.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const [site, name] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${process.env.FSBROKER_SECRET}` };

const form = new FormData();
form.set("file", new Blob([await readFile(name)]), basename(name));
const submitted = await fetch(`${site}/submit`, { method: "POST", headers, body: form });
if (submitted.status !== 200) throw new Error(`${submitted.status}: ${await submitted.text()}`);
const submitID = (await submitted.json()).acceptedFiles[0].ID;

const query = new URLSearchParams({ submitID, wait: "30" });
const deadline = Date.now() + 600_000;
for (;;) {
  // The timeout must be longer than the wait.
  const response = await fetch(`${site}/task?${query}`, { headers, signal: AbortSignal.timeout(60_000) });
  const body = await response.text(); // not json(): 204 has no body
  const seconds = response.headers.get("Retry-After");
  if (seconds === null && response.status === 200) {
    console.log(body); // the report is finished
    break;
  }
  if (seconds === null || Date.now() > deadline) throw new Error(`${response.status}: ${body}`);
  await sleep(1000 * seconds);
}
