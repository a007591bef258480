// What the scripts of the Node clients share: what to ask, what to expect, and a report of the checks as JSON. See
// ../python/contract.py, which says the same for Python.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const contract = JSON.parse(readFileSync(process.env.RATCHET_CONTRACT, "utf8"));
export const URL = `${process.env.RATCHET_CLIENT_URL}/v1`;
export const KEY = "none";
export const WRONG_KEY = contract.wrong_key;
export const LIMITED_KEY = process.env.RATCHET_LIMITED_KEY;
export const { texts, image, question, answer, usage, max_tokens, short } = contract;
const results = {};

export async function check(name, body) {
  try {
    await body();
    results[name] = "passed";
  } catch (error) {
    results[name] = `${error?.stack ?? error}\n${error?.responseBody ?? ""}`;
  }
}

export function report() {
  console.log(`\n${JSON.stringify(results)}`);
}

export async function runSnippet() {
  await import(pathToFileURL(process.env.RATCHET_SNIPPET));
}

export function assertVectors(rows) {
  assert.equal(rows.length, texts.length);
  rows.map((row) => (typeof row === "string" ? decoded(row) : row)).forEach((row, index) => {
    const expected = contract.vectors[index];
    assert.equal(row.length, expected.length);
    row.forEach((value, place) => assert.ok(Math.abs(value - expected[place]) < 1e-4, `${value} ${expected[place]}`));
  });
}

// Vectors of `short` numbers: the beginnings of plain HTTP's, scaled to unit length.
export function assertShort(rows) {
  assert.equal(rows.length, texts.length);
  rows.forEach((row, index) => {
    const expected = contract.vectors[index].slice(0, short);
    assert.equal(row.length, short);
    const norm = Math.hypot(...expected);
    row.forEach((value, place) => assert.ok(Math.abs(value - expected[place] / norm) < 1e-4));
  });
}

function decoded(text) {
  const raw = Buffer.from(text, "base64");
  return Array.from({ length: raw.length / 4 }, (_, place) => raw.readFloatLE(4 * place));
}

export function assertWait(seconds) {
  assert.ok(Number(seconds) >= 1 && Number(seconds) <= 60, `Retry-After: ${seconds}`);
}

export async function raised(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: "nothing was raised" });
}
