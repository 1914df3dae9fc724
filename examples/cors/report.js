// fetchReport gets a report from a site of another origin. A page whose origin the site allows can read every response,
// problems included. For other pages, fetch throws a TypeError that does not tell why.
export async function fetchReport(url, { secret, wait, etag }) {
	const headers = {};
	if (secret) headers["Authorization"] = `Bearer ${secret}`;
	if (wait) headers["Prefer"] = `wait=${wait}`;
	if (etag) headers["If-None-Match"] = etag;
	const response = await fetch(url, { headers });
	const text = await response.text();
	return {
		status: response.status, // 200: a report, 204: nothing to report yet, 304: it is the one of etag
		header: Object.fromEntries(response.headers), // only the fields that the site exposes
		body: text ? JSON.parse(text) : null,
	};
}
