// Get a report in one of the ways that Node programs do. The arguments are the way, the site and the submission's ID.
const [pattern, site, submitID] = process.argv.slice(2);
const get = (query) =>
  fetch(`${site}/task?${new URLSearchParams({ submitID, ...query })}`, { headers: { "X-Api-Key": process.env.FSBROKER_SECRET } });

const patterns = {
  async json() {
    const response = await get();
    if (!response.ok) throw new Error(response.status); // 204 is ok
    return response.json();
  },
  async wait() {
    return (await get({ wait: "30" })).json();
  },
};

try {
  console.log((await patterns[pattern]()).result.taskReference.state);
} catch (error) {
  console.log(`${error.name}: ${error.message}`);
}
