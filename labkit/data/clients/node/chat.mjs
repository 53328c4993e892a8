// One question to an OpenAI-style server: node chat.mjs URL QUESTION. Needs Node 18 or newer, no packages.
const [url, question] = process.argv.slice(2);
const body = { model: "edgehome", messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 64 };

const reply = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal: AbortSignal.timeout(60_000),
});
if (!reply.ok) {
  console.error(`${reply.status}: ${await reply.text()}`);
  process.exit(1);
}
console.log((await reply.json()).choices[0].message.content);
