// The same service in Node, with nothing but its own modules: RUNTIME_URL=… node service.mjs PORT
import { readFileSync } from "node:fs";
import { createServer } from "node:http";

const MOST_BYTES = 10_000, MOST_CHARACTERS = 500, SECONDS = 30, NEW_TOKENS = 128;
const schema = JSON.parse(readFileSync(new URL("commands.schema.json", import.meta.url), "utf8"));
const forms = new Map(schema.oneOf.map((form) => [form.properties.intent.const, form]));

class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

function readRequest(body) {
  let text;
  try {
    text = JSON.parse(body.toString("utf8")).text;
  } catch {
    text = undefined;
  }
  if (typeof text !== "string" || !text.isWellFormed?.()) throw new Refused(400, 'Send JSON with a text: {"text": "Turn on the lamp"}.');
  if (!text.trim() || text.includes("<|")) throw new Refused(400, "The text is empty, or holds a control token of the model.");
  if (text.length > MOST_CHARACTERS) throw new Refused(400, `The text has ${text.length} characters; send at most ${MOST_CHARACTERS}.`);
  return text;
}

// Not a whole validator: the intent is known, no key is missing, none is invented. The full schema check is service.py's.
function readAnswer(text) {
  let command;
  try {
    command = JSON.parse(text);
  } catch {
    command = null;
  }
  const form = forms.get(command?.intent);
  const right = form && form.required.every((key) => key in command) && Object.keys(command).every((key) => key in form.properties);
  if (!right) throw new Refused(502, "The model did not answer with a command; say it in other words.");
  return command;
}

async function ask(text) {
  const headers = { "Content-Type": "application/json" };
  if (process.env.RUNTIME_KEY) headers.Authorization = `Bearer ${process.env.RUNTIME_KEY}`;
  const body = { model: process.env.RUNTIME_MODEL ?? "edgehome", messages: [{ role: "user", content: text }], temperature: 0, max_tokens: NEW_TOKENS };
  let reply;
  try {
    const signal = AbortSignal.timeout(1000 * SECONDS);
    reply = await fetch(`${process.env.RUNTIME_URL}/v1/chat/completions`, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (reply.ok) return (await reply.json()).choices[0].message.content;
  } catch {
    // nobody listens, or it took too long: said below
  }
  if (reply?.status === 400) throw new Refused(400, "The model cannot take this text; make it shorter.");
  throw new Refused(503, "The model is busy or away; try again in a moment.");
}

async function body(request) {
  const parts = [];
  let size = 0;
  for await (const part of request) {
    size += part.length;
    if (size > MOST_BYTES) throw new Refused(413, `Send at most ${MOST_BYTES} bytes.`);
    parts.push(part);
  }
  return Buffer.concat(parts);
}

async function answer(request) {
  if (request.method === "GET" && request.url === "/health") return [200, { status: "ok" }];
  if (request.url !== "/command") return [404, { error: "There is nothing at this address." }];
  if (request.method !== "POST") return [405, { error: "Send a POST." }];
  return [200, { command: readAnswer(await ask(readRequest(await body(request)))) }];
}

const server = createServer(async (request, response) => {
  let status, reply;
  try {
    [status, reply] = await answer(request);
  } catch (error) {
    status = error instanceof Refused ? error.status : 500;
    reply = { error: error instanceof Refused ? error.message : "The service met an error it did not expect." };
  }
  const close = status === 413 ? { Connection: "close" } : {};
  response.writeHead(status, { "Content-Type": "application/json", ...(status === 503 ? { "Retry-After": "1" } : {}), ...close });
  response.end(JSON.stringify(reply));
});
server.listen(Number(process.argv[2] ?? 9000), "127.0.0.1");
process.on("SIGTERM", () => server.close(() => process.exit(0)));
