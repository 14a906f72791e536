// Requests to the server that the page came from, with the API key if it asks for one.
import { byId } from "./elements.js";
import { EventParser } from "./event_parser.js";

const KEY = "flyray.api_key";
let asking = null;
let declined = false; // who said "not now" is not asked again, but for what he does himself

/**
 * fetch, with the key; a 401 asks for one and tries again, until there is an answer or the user gives up.
 * insist: the user did something that needs a key, so ask even if he gave up before.
 */
async function request(path, options, insist) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    const error = await errorOf(response);
    // Several requests may be refused at once: they wait for one dialog.
    if (sessionStorage.getItem(KEY) === key) {
      if (declined && !insist) throw error;
      asking ??= askForKey(key ? error.message : "").finally(() => (asking = null));
      declined = !(await asking);
      if (declined) throw error;
    }
  }
}

/** The JSON of an answer to a GET. Throws an Error with the server's own words. */
export async function json(path, insist = false) {
  const response = await request(path, {}, insist);
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/** Posts a streaming request and gives its chunks as they come. Throws an Error with the server's own words. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal }, true);
  if (!response.ok) throw await errorOf(response);
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server's answer broke off");
    for (const data of parser.feed(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function errorOf(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`the server answered with status ${response.status}`);
  }
}

/** Shows the dialog; whether a key was given. */
function askForKey(reason) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-reason").textContent = reason;
  input.value = "";
  dialog.returnValue = "cancel"; // Escape leaves it so
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      const given = dialog.returnValue === "use" && input.value.trim();
      if (given) sessionStorage.setItem(KEY, given);
      input.value = "";
      resolve(Boolean(given));
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}
