// What to paste into each client: see docs/clients.md, whose clients these are.

/** Return the lines for each client: its name, where they go, and the lines. */
export const clients = ({ url, key, model }) => [
  { name: "Terminal", where: "With mlxproxy installed there", lines: `export MLXPROXY_URL=${url}${key === "none" ? "" : ` MLXPROXY_API_KEY=${key}`}\nmlxproxy chat ${model}` },
  { name: "openai for Python", where: "Python", lines: `from openai import OpenAI

client = OpenAI(base_url="${url}/v1", api_key="${key}")
answer = client.chat.completions.create(
    model="${model}",
    messages=[{"role": "user", "content": "Hello!"}],
)
print(answer.choices[0].message.content)` },
  { name: "curl", where: "Terminal", lines: `curl ${url}/v1/chat/completions${key === "none" ? "" : ` -H "Authorization: Bearer ${key}"`} -d '{
  "model": "${model}",
  "messages": [{"role": "user", "content": "Hello!"}]}'` },
  { name: "Open WebUI", where: "Environment of Open WebUI", lines: `OPENAI_API_BASE_URL=${url}/v1\nOPENAI_API_KEY=${key}` },
  { name: "aider", where: "Terminal", lines: `export OPENAI_API_BASE=${url}/v1 OPENAI_API_KEY=${key}\naider --model openai/${model}` },
  { name: "opencode", where: "opencode.json", lines: JSON.stringify({ provider: { mlxproxy: { npm: "@ai-sdk/openai-compatible", options: { baseURL: `${url}/v1`, apiKey: key }, models: { [model]: {} } } } }, null, 2) },
  { name: "Qwen Code", where: "Terminal", lines: `export OPENAI_BASE_URL=${url}/v1 OPENAI_API_KEY=${key}\nexport OPENAI_MODEL=${model}\nqwen --auth-type openai` },
  { name: "LangChain", where: "Python", lines: `ChatOpenAI(base_url="${url}/v1", api_key="${key}", model="${model}")` },
  { name: "LlamaIndex", where: "Python", lines: `OpenAILike(api_base="${url}/v1", api_key="${key}", model="${model}", is_chat_model=True)` },
  { name: "pydantic-ai", where: "Python", lines: `OpenAIChatModel("${model}", provider=OpenAIProvider(base_url="${url}/v1", api_key="${key}"))` },
  { name: "LiteLLM", where: "Python", lines: `completion("openai/${model}", api_base="${url}/v1", api_key="${key}", messages=messages)` },
  { name: "openai-agents", where: "Python", lines: `set_default_openai_api("chat_completions")\nset_default_openai_client(AsyncOpenAI(base_url="${url}/v1", api_key="${key}"))` },
  { name: "AI SDK (Node.js)", where: "JavaScript", lines: `createOpenAICompatible({ name: "mlxproxy", baseURL: "${url}/v1", apiKey: "${key}" })` },
  { name: "llm", where: "extra-openai-models.yaml", lines: `- model_id: ${model}\n  model_name: ${model}\n  api_base: "${url}/v1"` },
  { name: "Claude Code", where: "Terminal", lines: `export ANTHROPIC_BASE_URL=${url} ANTHROPIC_AUTH_TOKEN=${key}\nexport ANTHROPIC_MODEL=${model} ANTHROPIC_SMALL_FAST_MODEL=${model}\nclaude` },
  { name: "Codex", where: "~/.codex/config.toml", lines: `model = "${model}"\nmodel_provider = "mlxproxy"\n\n[model_providers.mlxproxy]\nname = "mlxproxy"\nbase_url = "${url}/v1"\nwire_api = "responses"` },
  { name: "anthropic", where: "Python", lines: `Anthropic(base_url="${url}", api_key="${key}")` },
  { name: "ollama", where: "Python", lines: `Client(host="${url}"${key === "none" ? "" : `, headers={"Authorization": "Bearer ${key}"}`})` },
];
