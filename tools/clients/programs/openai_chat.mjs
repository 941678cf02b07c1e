// openai for Node.js: chat completions, or Responses.

import OpenAI from "openai";
import { MODEL, QUESTION, TOOL, URL, getWeather, main } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none" });
const user = [{ role: "user", content: QUESTION }];
const responses = process.env.PROVIDER === "responses";

async function chat() {
  if (responses) return (await client.responses.create({ model: MODEL, input: QUESTION })).output_text;
  const answer = await client.chat.completions.create({ model: MODEL, messages: user });
  return answer.choices[0].message.content;
}

async function* stream() {
  if (responses) {
    for await (const event of client.responses.stream({ model: MODEL, input: QUESTION }))
      if (event.type === "response.output_text.delta") yield event.delta;
    return;
  }
  const chunks = await client.chat.completions.create({ model: MODEL, messages: user, stream: true });
  for await (const chunk of chunks) {
    const piece = chunk.choices[0]?.delta?.content;
    if (piece) yield piece;
  }
}

async function tools() {
  if (responses) {
    const input = [...user];
    for (;;) {
      const response = await client.responses
        .stream({ model: MODEL, input, tools: [{ type: "function", strict: false, ...TOOL }] })
        .finalResponse();
      const calls = response.output.filter((item) => item.type === "function_call");
      if (!calls.length) return response.output_text;
      input.push(...response.output);
      for (const { call_id, arguments: given } of calls)
        input.push({ type: "function_call_output", call_id, output: getWeather(JSON.parse(given)) });
    }
  }
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages: user,
    stream: true,
    tools: [{ type: "function", function: { ...TOOL, parse: JSON.parse, function: getWeather } }],
  });
  return await runner.finalContent();
}

main(chat, stream, tools);
