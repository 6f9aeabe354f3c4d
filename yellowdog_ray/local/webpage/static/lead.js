// Leads from the address of the API to the page that is meant: what is after the # is as yellowdog-cli writes it.
// Only this browser knows where the pages are, if it has used a link.
"use strict";

const PAGES = { work: "work", workers: "pools", compute: "compute" };

function meant() {
  const [, kind, id] = /^#\/(work|workers|compute)(?:\/([\w:-]+))?\/?$/.exec(location.hash) || [];
  if (!kind) return "";
  return id ? `${PAGES[kind]}/${id}` : PAGES[kind];
}

async function lead() {
  try {
    const base = localStorage.getItem("raydog");
    if (!/^\/web\/[0-9a-f]{32}$/.test(base)) return;
    const answer = await fetch(`${base}/`, { method: "HEAD", cache: "no-store", credentials: "same-origin" });
    // A session may have ended, or the platform may be another one by now.
    if (answer.ok) location.replace(`${base}/${meant()}`);
  } catch {
    // What the page says is all that there is to say.
  }
}

// A link may be used in another tab.
addEventListener("storage", lead);
addEventListener("hashchange", lead);
document.addEventListener("visibilitychange", lead);
lead();
