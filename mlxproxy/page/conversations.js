// Conversations, kept in this browser only (IndexedDB: images are too large for localStorage).

const STORE = "conversations";

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("mlxproxy", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let database = null;

async function within(mode, work) {
  database ??= opened();
  const transaction = (await database).transaction(STORE, mode);
  const request = work(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** Return all conversations, the last used first; none if this browser keeps nothing. */
export async function all() {
  try {
    const found = await within("readonly", (store) => store.getAll());
    return found.sort((a, b) => b.used - a.used);
  } catch {
    return [];
  }
}

/** Keep a conversation; return whether the browser did. */
export async function keep(conversation) {
  try {
    await within("readwrite", (store) => store.put(conversation));
    return true;
  } catch {
    return false;
  }
}

export const forget = (id) => within("readwrite", (store) => store.delete(id)).catch(() => {});

export function fresh(settings = {}) {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", used: Date.now(), model: null, system: "", sampling: {}, messages: [], ...settings };
}
