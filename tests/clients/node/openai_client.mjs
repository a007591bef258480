// The `openai` client of Node.
import assert from "node:assert/strict";
import OpenAI from "openai";
import {
  KEY, LIMITED_KEY, URL, WRONG_KEY, answer, assertShort, assertVectors, assertWait, check, image, max_tokens, question,
  raised, report, runSnippet, short, texts, usage,
} from "./contract.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const messages = [
  { role: "user", content: [{ type: "image_url", image_url: { url: image } }, { type: "text", text: question }] },
];
const ask = { model: "vlm", messages, max_tokens, temperature: 0 };
const vectors = (found) => found.data.map((row) => row.embedding);

await check("run_snippet", runSnippet);

await check("embeddings", async () => {
  const found = await client.embeddings.create({ model: "clip", input: texts });
  assertVectors(vectors(found));
  assert.ok(found.usage.prompt_tokens > 0);
});

await check("embeddings_as_float_and_base64", async () => {
  for (const encoding_format of ["float", "base64"]) {
    assertVectors(vectors(await client.embeddings.create({ model: "clip", input: texts, encoding_format })));
  }
});

await check("embeddings_with_nulls", async () => {
  const nulls = { encoding_format: null, dimensions: null, user: null };
  const found = await client.post("/embeddings", { body: { model: "clip", input: texts, ...nulls } });
  assertVectors(vectors(found));
});

await check("embeddings_cut_short", async () => {
  assertShort(vectors(await client.embeddings.create({ model: "clip", input: texts, dimensions: short })));
});

await check("chat_with_an_image", async () => {
  const found = await client.chat.completions.create(ask);
  assert.equal(found.choices[0].message.content, answer);
  assert.deepEqual(found.usage, usage);
});

await check("stream_with_usage", async () => {
  const stream = await client.chat.completions.create({
    ...ask, stream: true, stream_options: { include_usage: true },
  });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), answer);
  assert.deepEqual(chunks.at(-1).usage, usage);
  assert.equal(await client.chat.completions.stream(ask).finalContent(), answer);
});

await check("chat_with_nulls_and_defaults", async () => {
  const nulls = Object.fromEntries([
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty", "reasoning_effort",
    "response_format", "seed", "service_tier", "stop", "store", "stream", "stream_options", "tool_choice", "tools",
    "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
  ].map((name) => [name, null]));
  assert.equal((await client.chat.completions.create({ ...ask, ...nulls })).choices[0].message.content, answer);
  const found = await client.chat.completions.create({
    model: "vlm", messages, temperature: 0, max_completion_tokens: max_tokens, n: 1, presence_penalty: 0, tools: [],
    tool_choice: "none", response_format: { type: "text" }, parallel_tool_calls: true, store: false, metadata: {},
    reasoning_effort: "none", verbosity: "medium", service_tier: "auto", modalities: ["text"],
  });
  assert.equal(found.choices[0].message.content, answer);
});

await check("conversation", async () => {
  const first = (await client.chat.completions.create(ask)).choices[0].message;
  const turns = [
    { role: "developer", content: "be short" }, ...messages, first, { role: "user", content: "and now?" },
  ];
  const found = await client.chat.completions.create({ ...ask, messages: turns });
  assert.equal(found.choices[0].message.role, "assistant");
});

await check("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes("clip") && names.includes("vlm"));
  assert.equal((await client.models.retrieve("vlm")).object, "model");
});

await check("error_401", async () => {
  const error = await raised(() => client.withOptions({ apiKey: WRONG_KEY }).models.list());
  assert.ok(error instanceof OpenAI.AuthenticationError, error);
  assert.equal(error.code, "invalid_api_key");
});

await check("error_404", async () => {
  const error = await raised(() => client.chat.completions.create({ ...ask, model: "gpt" }));
  assert.ok(error instanceof OpenAI.NotFoundError, error);
  assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
});

await check("error_400", async () => {
  const error = await raised(() => client.chat.completions.create({ ...ask, n: 2 }));
  assert.ok(error instanceof OpenAI.BadRequestError, error);
  assert.equal(error.param, "n");
});

await check("error_429", async () => {
  const limited = client.withOptions({ apiKey: LIMITED_KEY });
  await limited.models.list();
  const error = await raised(() => limited.models.list());
  assert.ok(error instanceof OpenAI.RateLimitError, error);
  assertWait(error.headers.get("retry-after"));
});

report();
