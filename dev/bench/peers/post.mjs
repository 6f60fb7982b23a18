// One POST for each job, over kept-alive connections: node's own agent costs less than fetch.
import { Agent, request } from "node:http";

const agent = new Agent({ keepAlive: true, maxSockets: 64 });

export function post(url, event) {
  const args = { shard: "0", epoch: 1.0, events: [event] };
  const body = JSON.stringify({ path: "cdc:apply", format: "convex_encoded_json", args });
  const headers = {
    "Content-Type": "application/json",
    "Content-Length": Buffer.byteLength(body),
    Authorization: "Convex bench|0123456789abcdef",
  };
  return new Promise((resolve, reject) => {
    const sent = request(`${url}/api/mutation`, { method: "POST", agent, headers }, (response) => {
      response.resume();
      response.on("end", resolve);
    });
    sent.on("error", reject);
    sent.end(body);
  });
}
