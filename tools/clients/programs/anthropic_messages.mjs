// @anthropic-ai/sdk.

import Anthropic from "@anthropic-ai/sdk";
import { MODEL, QUESTION, TOOL, URL, getWeather, main } from "./harness.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none" });
const user = [{ role: "user", content: QUESTION }];
const common = { model: MODEL, max_tokens: 1000 };
const textOf = (message) =>
  message.content.filter((block) => block.type === "text").map((block) => block.text).join("");

const chat = async () => textOf(await client.messages.create({ ...common, messages: user }));

async function* stream() {
  for await (const event of client.messages.stream({ ...common, messages: user }))
    if (event.type === "content_block_delta" && event.delta.type === "text_delta")
      yield event.delta.text;
}

async function tools() {
  const { name, description, parameters } = TOOL;
  const offered = [{ name, description, input_schema: parameters }];
  const messages = [...user];
  for (;;) {
    const message = await client.messages
      .stream({ ...common, messages, tools: offered })
      .finalMessage();
    if (message.stop_reason !== "tool_use") return textOf(message);
    const results = message.content
      .filter((block) => block.type === "tool_use")
      .map(({ id, input }) => ({ type: "tool_result", tool_use_id: id, content: getWeather(input) }));
    messages.push({ role: "assistant", content: message.content }, { role: "user", content: results });
  }
}

main(chat, stream, tools);
