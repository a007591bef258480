// The Vercel AI SDK: with the provider for servers that speak OpenAI's API, and with the one for OpenAI itself.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, embedMany, generateText, streamText } from "ai";
import {
  KEY, LIMITED_KEY, URL, WRONG_KEY, answer, assertVectors, assertWait, check, image, max_tokens, question, raised,
  report, runSnippet, texts, usage,
} from "./contract.mjs";

const compatible = (apiKey = KEY) =>
  createOpenAICompatible({ name: "ratchet", baseURL: URL, apiKey, includeUsage: true });
const server = compatible();
const openai = createOpenAI({ baseURL: URL, apiKey: KEY });
const models = [server.chatModel("vlm"), openai.chat("vlm")];
const messages = [{ role: "user", content: [{ type: "image", image }, { type: "text", text: question }] }];
const how = { messages, maxOutputTokens: max_tokens, temperature: 0, maxRetries: 0 };
const ask = { model: models[0], ...how };

function assertUsage(found) {
  assert.deepEqual([found.inputTokens, found.outputTokens], [usage.prompt_tokens, usage.completion_tokens]);
}

await check("run_snippet", runSnippet);

await check("embeddings", async () => {
  for (const model of [server.embeddingModel("clip"), openai.embedding("clip")]) {
    const found = await embedMany({ model, values: texts, maxRetries: 0 });
    assertVectors(found.embeddings);
    assert.ok(found.usage.tokens > 0);
  }
});

await check("embeddings_with_nulls", async () => {
  const providerOptions = { ratchet: { user: undefined, dimensions: undefined } };
  const found = await embed({ model: server.embeddingModel("clip"), value: texts[0], maxRetries: 0, providerOptions });
  assert.ok(found.embedding.length > 0);
});

await check("chat_with_an_image", async () => {
  for (const model of models) {
    const found = await generateText({ ...how, model });
    assert.equal(found.text, answer);
    assertUsage(found.usage);
  }
});

await check("stream_with_usage", async () => {
  for (const model of models) {
    const stream = streamText({ ...how, model });
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert.equal(text, answer);
    assertUsage(await stream.usage);
  }
});

await check("chat_with_nulls_and_defaults", async () => {
  const found = await generateText({
    ...ask, seed: undefined, topP: 1, presencePenalty: 0, frequencyPenalty: 0, stopSequences: [],
    providerOptions: { ratchet: { user: "ann", reasoningEffort: "none" } },
  });
  assert.equal(found.text, answer);
  const other = await generateText({
    ...how, model: models[1],
    providerOptions: { openai: { user: "ann", parallelToolCalls: true, store: false, logitBias: {}, metadata: {} } },
  });
  assert.equal(other.text, answer);
});

await check("conversation", async () => {
  for (const model of models) {
    const first = await generateText({ ...how, model, system: "be short" });
    const turns = [...messages, ...first.response.messages, { role: "user", content: "and now?" }];
    assert.ok(await generateText({ ...how, model, messages: turns }));
  }
});

await check("error_401", async () => {
  const error = await raised(() => generateText({ ...ask, model: compatible(WRONG_KEY).chatModel("vlm") }));
  assert.ok(APICallError.isInstance(error), error);
  assert.equal(error.statusCode, 401);
  assert.match(error.message, /not valid/);
});

await check("error_404", async () => {
  const error = await raised(() => generateText({ ...ask, model: server.chatModel("gpt") }));
  assert.equal(error.statusCode, 404);
  assert.match(error.message, /not resident/);
});

await check("error_400", async () => {
  const error = await raised(() => generateText({ ...ask, presencePenalty: 0.5 }));
  assert.equal(error.statusCode, 400);
  assert.equal(error.data.error.param, "presence_penalty");
});

await check("error_429", async () => {
  const model = compatible(LIMITED_KEY).embeddingModel("clip");
  await embed({ model, value: "x", maxRetries: 0 });
  const error = await raised(() => embed({ model, value: "x", maxRetries: 0 }));
  assert.equal(error.statusCode, 429);
  assertWait(error.responseHeaders["retry-after"]);
});

report();
