// Keeps an open page up to date: it is fetched again while somebody looks at it, and only what differs is
// changed in place, so that focus, selection and scrolling stay.
"use strict";

const PAUSE = 1500;
const state = document.getElementById("state");
let version = "";
let timer = 0;

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null;
}

function sameKind(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);
}

function update(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.data = fresh.data;
    return;
  }
  for (const name of old.getAttributeNames()) {
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const name of fresh.getAttributeNames()) {
    if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name));
  }
  // What somebody is about to choose is theirs.
  if (old.nodeName !== "SELECT" || document.activeElement !== old) updateChildren(old, fresh);
}

function updateChildren(old, fresh) {
  const wanted = new Set();
  const there = new Map();
  for (const child of fresh.childNodes) if (keyOf(child)) wanted.add(keyOf(child));
  for (const child of [...old.childNodes]) {
    const key = keyOf(child);
    if (key && wanted.has(key)) there.set(key, child);
    else if (key) child.remove();
  }
  let next = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const key = keyOf(child);
    const match = key ? there.get(key) : next && sameKind(next, child) ? next : null;
    if (!match) {
      old.insertBefore(document.importNode(child, true), next);
    } else if (match === next) {
      next = next.nextSibling;
      update(match, child);
    } else {
      old.insertBefore(match, next);
      update(match, child);
    }
  }
  while (next) {
    const after = next.nextSibling;
    next.remove();
    next = after;
  }
}

function say(text) {
  if (state.textContent !== text) state.textContent = text;
}

async function look() {
  const began = performance.now();
  try {
    const answer = await fetch(location.href, {
      headers: version ? { "If-None-Match": version } : {},
      cache: "no-store",
      credentials: "same-origin",
    });
    if (answer.status === 200) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      update(document.getElementById("main"), fresh.getElementById("main"));
      document.title = fresh.title;
      version = answer.headers.get("ETag") || "";
      say("");
    } else if (answer.status === 304) {
      say("");
    } else if (answer.status === 401) {
      say("The platform does not know this browser any more: get a new link. What is shown is old.");
    } else {
      say("The platform does not show this page any more. What is shown is old.");
    }
  } catch {
    say("The platform does not answer: it may have been stopped. What is shown is old.");
  }
  // A page that takes long to make is asked for less often.
  plan(Math.max(PAUSE, 20 * (performance.now() - began)));
}

function plan(pause) {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(look, pause);
}

try {
  // For the links of yellowdog-cli, which lead to the API's address (lead.js).
  localStorage.setItem("raydog", /^\/web\/[^/]+/.exec(location.pathname)[0]);
} catch {
  // A browser may keep nothing.
}

document.addEventListener("visibilitychange", () => plan(0));
plan(PAUSE);
