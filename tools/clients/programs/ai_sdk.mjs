// Vercel's AI SDK, with the provider that the environment names.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { MODEL, QUESTION, TOOL, URL, getWeather, main } from "./harness.mjs";

const baseURL = `${URL}/v1`;
const model = {
  openai: () => createOpenAICompatible({ name: "mlxproxy", baseURL })(MODEL),
  responses: () => createOpenAI({ baseURL, apiKey: "none" }).responses(MODEL),
  anthropic: () => createAnthropic({ baseURL, apiKey: "none" })(MODEL),
}[process.env.PROVIDER]();

const chat = async () => (await generateText({ model, prompt: QUESTION })).text;

async function* stream() {
  let failure;
  const controller = new AbortController();
  const answer = streamText({
    model,
    prompt: QUESTION,
    abortSignal: controller.signal,
    onError: ({ error }) => {
      failure = error;
    },
  });
  try {
    for await (const piece of answer.textStream) if (piece) yield piece;
  } finally {
    controller.abort();
  }
  if (failure) throw failure;
}

async function tools() {
  const answer = streamText({
    model,
    prompt: QUESTION,
    stopWhen: stepCountIs(3),
    tools: {
      get_weather: tool({
        description: TOOL.description,
        inputSchema: jsonSchema(TOOL.parameters),
        execute: getWeather,
      }),
    },
  });
  let text = "";
  for await (const piece of answer.textStream) text += piece;
  return text;
}

main(chat, stream, tools);
