// ollama for Node.js.

import { Ollama } from "ollama";
import { MODEL, QUESTION, TOOL, URL, getWeather, main } from "./harness.mjs";

const client = new Ollama({ host: URL });
const user = [{ role: "user", content: QUESTION }];

const chat = async () => (await client.chat({ model: MODEL, messages: user })).message.content;

async function* stream() {
  for await (const part of await client.chat({ model: MODEL, messages: user, stream: true }))
    if (part.message.content) yield part.message.content;
}

async function tools() {
  const messages = [...user];
  for (;;) {
    const { message } = await client.chat({
      model: MODEL,
      messages,
      tools: [{ type: "function", function: TOOL }],
    });
    if (!message.tool_calls) return message.content;
    messages.push(message);
    for (const call of message.tool_calls)
      messages.push({
        role: "tool",
        tool_name: call.function.name,
        content: getWeather(call.function.arguments),
      });
  }
}

main(chat, stream, tools);
