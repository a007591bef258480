// Embed texts, classify a picture and search, from Node 20 or later, without a package: `node client.mjs bus.png`.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";

const url = process.env.RATCHET_CLIENT_URL ?? "http://127.0.0.1:8000";
const key = process.env.RATCHET_CLIENT_KEY ?? "none"; // a server on another machine wants a key: ratchet keys create
const picture = process.argv[2];

async function call(path, body, headers = { "content-type": "application/json" }) {
  const answer = await fetch(url + path, { method: "POST", headers: { authorization: `Bearer ${key}`, ...headers }, body });
  const content = await answer.json();
  if (!answer.ok) throw new Error(`${answer.status} ${content.error.code}: ${content.error.message}`);
  return { ...content, release: answer.headers.get("x-ratchet-release") };
}

const texts = ["a photo of a bus", "a red dragon"];
const [one, other] = (await call("/v1/embeddings", JSON.stringify({ model: "clip", input: texts }))).data;
const similarity = one.embedding.reduce((sum, value, index) => sum + value * other.embedding[index], 0);
console.log(`${one.embedding.length} dimensions, similarity ${similarity.toFixed(2)}`);

const form = new FormData();
form.append("images", new Blob([await readFile(picture)]), basename(picture));
for (const label of ["bus", "dragon", "red circle"]) form.append("labels", label);
form.append("templates", "a photo of a {}.");
const { data: [best], release } = await call("/v1/classify", form, {});
console.log(`${basename(picture)}: ${best.label} (${Math.round(100 * best.probabilities[best.label])}%), release ${release}`);

for (const hit of (await call("/v1/search", JSON.stringify({ text: "a red circle", k: 3 }))).data) {
  console.log(`${hit.score.toFixed(2)} ${hit.text}`);
}
