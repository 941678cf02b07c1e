// What the programs share: see harness.py.

export const URL = process.env.URL;
export const MODEL = process.env.MODEL;
export const QUESTION = "How is the weather in Paris and in London?";
export const TOOL = {
  name: "get_weather",
  description: "Return the weather in a city.",
  parameters: {
    type: "object",
    properties: { city: { type: "string", description: "The city's name" } },
    required: ["city"],
  },
};
export const getWeather = ({ city }) => `sunny in ${city}`;

export async function main(chat, stream, tools) {
  const check = process.argv[2];
  let told;
  try {
    if (check === "tools") told = { text: await tools() };
    else if (check === "chat") told = { text: await chat() };
    else {
      const pieces = [];
      for await (const piece of stream()) {
        pieces.push(piece);
        if (check === "leave") break;
      }
      told = { text: pieces.join(""), pieces: pieces.length };
    }
  } catch (error) {
    told = { error: `${error.name}: ${error.message}` };
  }
  console.log(JSON.stringify(told));
  process.exit(0);
}
