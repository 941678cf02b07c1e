// One answer: asked for, and read as it comes.

import { api, ApiError } from "./api.js";

const ROLES = ["user", "assistant"];

/** Return the messages in the API's form. */
export function wire(conversation, messages) {
  const told = messages.filter(({ role, content, images }) => ROLES.includes(role) && (content || images?.length))
    .map(({ role, content, images }) => ({
      role,
      content: images?.length
        ? [...images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: content }]
        : content,
    }));
  return conversation.system ? [{ role: "system", content: conversation.system }, ...told] : told;
}

/**
 * Fill `message` with the answer to `messages` as it arrives, and call `changed` each time.
 * Throw an ApiError if it fails; what has arrived stays.
 */
export async function ask(conversation, messages, message, changed, signal) {
  const { thinking, ...sampling } = conversation.sampling;
  const body = { messages: wire(conversation, messages), stream: true, stream_options: { include_usage: true }, ...sampling };
  if (conversation.model) body.model = conversation.model;
  if (thinking !== undefined) body.chat_template_kwargs = { enable_thinking: thinking };
  const began = performance.now();
  let first = null;
  let usage = null;
  let pieces = 0;
  let isComplete = false;
  const onResponse = (response) => { message.warning = response.headers.get("X-Mlxproxy-Warning"); };
  try {
    for await (const { comment, data } of api.stream("/v1/chat/completions", { method: "POST", body, signal, onResponse })) {
      if (comment !== undefined) {
        message.status = waiting(comment) ?? message.status;
      } else if (data === "[DONE]") {
        isComplete = true;
        break;
      } else {
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, chunk.error);
        const choice = chunk.choices?.[0];
        const text = choice?.delta?.content ?? "";
        const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
        if (text || thought) {
          pieces += 1;
          first ??= performance.now();
          message.status = null;
        }
        if (thought && !message.thinkingBegan) message.thinkingBegan = performance.now();
        if (text && message.thinkingBegan && !message.thinkingSeconds) {
          message.thinkingSeconds = (performance.now() - message.thinkingBegan) / 1000;
        }
        message.thinking = (message.thinking ?? "") + thought;
        message.content += text;
        if (chunk.model) message.model = chunk.model;
        if (chunk.usage) usage = chunk.usage;
        if (choice?.finish_reason) message.finish = choice.finish_reason;
      }
      changed();
    }
    if (!isComplete) throw new ApiError("The connection ended before the answer was complete.");
  } finally {
    message.status = null;
    if (first !== null) {
      const seconds = (performance.now() - first) / 1000;
      const tokens = usage?.completion_tokens ?? pieces;
      message.stats = { tokens, seconds: (performance.now() - began) / 1000, first: (first - began) / 1000,
        rate: seconds > 0.05 ? tokens / seconds : null, prompt: usage?.prompt_tokens ?? null };
    }
  }
}

/** Return what a comment of the proxy says about the wait, in words for the user. */
export function waiting(comment) {
  const load = /^(loading|draining for) (.+) (\d+)s$/.exec(comment);
  if (load) {
    return load[1] === "loading" ? `Loading ${load[2]} · ${load[3]} s`
      : `${load[2]} is next: other answers are being finished · ${load[3]} s`;
  }
  const queue = /^waiting for a place, number (\d+) in the queue (\d+)s$/.exec(comment);
  if (queue) return `Waiting for a place, number ${queue[1]} in the queue · ${queue[2]} s`;
  const prompt = /^keepalive (\d+)\/(\d+)$/.exec(comment);
  return prompt ? `Reading the prompt · ${Math.round((prompt[1] / Math.max(1, prompt[2])) * 100)} %` : null;
}
