"use strict";

// One record is here at a time. A decision is sent with the version of the record that was seen;
// the page moves on only after the server has it on its disk.

const WORDS = {
  open: "Open", kept: "Kept", edited: "Edited", dropped: "Dropped", rule: "Dropped by rules", all: "All",
};
const KINDS = { generated: "As generated", refined: "Refined", edited: "Edited" };
const DONE = { keep: "Kept", edit: "Saved", drop: "Dropped" };

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat();

let filter = location.hash.slice(1) in WORDS ? location.hash.slice(1) : "open";
let shown = null; // the record on the page; null where there is none to show
let trail = []; // ids in the order in which this tab came to them
let at = -1; // where in the trail we are
let busy = false;
const made = []; // this tab's decisions, {id, version}: what `undo` takes back, newest last
const drafts = new Map(); // texts begun and left, by id
let ahead = []; // pictures loaded before they are needed

// Talking to the server

async function call(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Start `latentmodal curate review` again.");
  }
  const text = await response.text();
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    data = { error: `The server answered ${response.status}; its terminal says more.` };
  }
  if (!response.ok && response.status !== 409) throw new Error(data.error);
  return { stale: response.status === 409, ...data };
}

async function ask(step, id) {
  const query = new URLSearchParams({ state: filter, step });
  if (id !== undefined) query.set("id", id);
  const answer = await call(`api/show?${query}`);
  showCounts(answer);
  ahead = answer.upcoming.map((other) => Object.assign(new Image(), { src: picturePath(other) }));
  return answer.record;
}

const picturePath = (id) => `picture?${new URLSearchParams({ id })}`;

/** Run one thing at a time; what a key asks for meanwhile is not done later, unseen. */
async function alone(work, failed = "") {
  if (busy) return;
  busy = true;
  $("main").setAttribute("aria-busy", "true");
  $("problem").hidden = true;
  try {
    await work();
  } catch (error) {
    problem(`${failed}${error.message}`);
  } finally {
    busy = false;
    $("main").setAttribute("aria-busy", "false");
  }
}

// Going from record to record

const first = () => alone(async () => {
  trail = [];
  at = -1;
  arrive(await ask("here"));
});

const go = (step) => alone(async () => {
  say("");
  const known = trail[at + (step === "next" ? 1 : -1)];
  if (known !== undefined) return arrive(await ask("here", known));
  const record = shown && (await ask(step, shown.id));
  if (record) return arrive(record, step === "previous");
  say(step === "next" ? "This is the last one here." : "This is the first one here.");
});

function arrive(record, before = false) {
  if (record === null) {
    at = trail.length;
  } else if (trail.includes(record.id)) {
    at = trail.lastIndexOf(record.id);
  } else if (before) {
    trail.unshift(record.id);
    at = 0;
  } else {
    at = trail.push(record.id) - 1;
  }
  show(record);
}

async function goOn(record) {
  const latest = trail.at(-1);
  if (record.id !== latest) return arrive(await ask("here", latest)); // back to where we were
  const next = await ask("next", record.id);
  if (next || filter === "open") return arrive(next);
  show(await ask("here", record.id));
  say("That was the last one here.");
}

// Deciding

const decide = (decision, text) => shown && $("picture").complete && alone(async () => {
  const { id, version } = shown;
  const answer = await call("api/decide", { id, version, decision, text });
  if (answer.stale) return changedMeanwhile(answer.record);
  made.push({ id, version: answer.record.version });
  drafts.delete(id);
  leaveEditor();
  show({ ...shown, ...answer.record });
  say(`${DONE[decision]}: ${id}`);
  await goOn(answer.record);
}, "Not saved. ");

function changedMeanwhile(record) {
  shown = { ...shown, ...record };
  showRecord(shown);
  problem(`Not saved: meanwhile this is ${standing(shown)}. Decide again to change that.`);
}

const undo = () => alone(async () => {
  const decided = shown && !["open", "rule"].includes(shown.state);
  const last = made.at(-1) ?? (decided ? shown : null);
  if (!last) return say("This tab has decided nothing yet.");
  const { id, version } = last;
  const answer = await call("api/undo", { id, version });
  made.pop();
  const earlier = made.findLast((other) => other.id === id);
  if (earlier && !answer.stale) earlier.version = answer.record.version;
  arrive(await ask("here", id));
  if (answer.stale) problem(`Not undone: meanwhile this is ${standing(shown)}.`);
  else say(`Taken back: ${id} is ${standing(shown)} again.`);
}, "Not undone. ");

// Editing

const editing = () => !$("editor").hidden;

function enterEditor() {
  if (!shown || busy || editing()) return;
  const draft = drafts.get(shown.id);
  $("text").value = draft ?? shown.text;
  $("draft").hidden = draft === undefined;
  $("editor").hidden = false;
  $("text-side").classList.add("editing");
  $("text-side").scrollTop = 0;
  enableButtons();
  countWords();
  $("text").focus();
  $("text").setSelectionRange(0, 0);
}

function leaveEditor() {
  $("editor").hidden = true;
  $("text-side").classList.remove("editing");
  $("text").blur();
  enableButtons();
}

function noteDraft() {
  if ($("text").value.trim() === shown.text) drafts.delete(shown.id);
  else drafts.set(shown.id, $("text").value);
  countWords();
}

const wordsOf = (text) => text.split(/\s+/).filter(Boolean).length;
const countWords = () => { $("words").textContent = `${number.format(wordsOf($("text").value))} words`; };

// Drawing

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function say(text) {
  $("message").textContent = text;
}

function problem(text) {
  say("");
  $("problem").textContent = text;
  $("problem").hidden = false;
}

function standing(record) {
  const by = record.reviewed_by ? ` by ${record.reviewed_by}` : "";
  return `${WORDS[record.state].toLowerCase()}${by}`;
}

function show(record) {
  if (editing()) leaveEditor();
  shown = record;
  $("picture-side").hidden = $("text-side").hidden = record === null;
  $("summary").hidden = record !== null;
  enableButtons();
  if (record) {
    showPicture(record);
    showRecord(record);
  }
  $("text-side").scrollTop = 0;
}

function enableButtons() {
  for (const id of ["keep", "edit", "drop"]) $(id).disabled = shown === null || editing();
  for (const id of ["previous", "next", "undo", "choose"]) $(id).disabled = editing();
}

function showPicture(record) {
  const picture = $("picture");
  const path = picturePath(record.id);
  if (picture.getAttribute("src") === path) return;
  picture.src = path;
  picture.alt = `picture ${record.id}`;
  // Never the picture before beside this text.
  picture.hidden = !(picture.complete && picture.naturalWidth);
  $("no-picture").hidden = true;
}

function showRecord(record) {
  $("state").textContent = standing(record);
  $("state").className = `badge ${record.state}`;
  $("name").textContent = $("name").title = record.id;
  $("place").textContent = `${number.format(record.number)} of ${number.format(total)}`;
  const notes = [];
  if (record.rule) {
    const overruled = record.state === "kept" || record.state === "edited";
    notes.push(`${overruled ? "The rules would drop it" : "Dropped by the rules"}: ${record.rule}`);
  }
  if (record.refused) notes.push(`Not refined: ${record.refused}`);
  $("notes").replaceChildren(...notes.map((note) => element("p", { textContent: note })));
  $("versions").replaceChildren(...record.texts.map(drawVersion).reverse());
}

function drawVersion({ kind, pieces }) {
  const words = wordsOf(pieces.map(([text]) => text).join(""));
  const heading = element("h2", {}, `${KINDS[kind]} `, element("small", { textContent: `${number.format(words)} words` }));
  const paragraph = element("p", {}, ...pieces.map(([text, isNew, isGone]) => {
    let piece = document.createTextNode(text);
    if (isGone) piece = element("del", {}, piece);
    if (isNew) piece = element("ins", {}, piece);
    return piece;
  }));
  return element("div", { className: `version ${kind}` }, heading, paragraph);
}

let total = 0;

function showCounts(answer) {
  const { counts } = answer;
  total = answer.total;
  for (const state in WORDS) $(`count-${state}`).textContent = number.format(counts[state] ?? total);
  const reviewed = counts.kept + counts.edited + counts.dropped;
  const wanted = total - counts.rule;
  $("reviewer").textContent = `${number.format(reviewed)} of ${number.format(wanted)} reviewed · ${answer.by}`;
  for (const part of $("progress").children) part.style.flexGrow = counts[part.className];
  $("progress").setAttribute("aria-valuemax", wanted);
  $("progress").setAttribute("aria-valuenow", reviewed);
  document.title = counts.open ? `${number.format(counts.open)} open · Review` : "Reviewed";
  const all = filter === "open";
  $("summary-title").textContent = all ? "Every picture is reviewed" : "Nothing here";
  $("summary-text").textContent = all
    ? "Each decision is in the ledger. Press u to take the last one back, / to look at them again."
    : `No picture is ${WORDS[filter].toLowerCase()}. Press / to look at others.`;
  $("summary-counts").replaceChildren(...Object.keys(counts).filter((state) => state !== "open").map(
    (state) => element("div", {},
      element("dt", { textContent: WORDS[state] }),
      element("dd", { textContent: number.format(counts[state]) }),
      element("i", { className: state })),
  ));
  $("summary-next").replaceChildren(...(all
    ? ["Next: ", element("code", { textContent: `latentmodal curate export ${answer.ledger} --to shards --out FOLDER` })]
    : []));
}

function drawFilter() {
  const order = ["kept", "edited", "dropped", "open"]; // what the rules dropped waits for nobody
  $("progress").append(...order.map((state) => element("i", { className: state })));
  for (const state in WORDS) {
    const input = element("input", { type: "radio", name: "filter", value: state, checked: state === filter });
    const count = element("b", { id: `count-${state}` });
    $("filter").append(element("label", {}, input, WORDS[state], count));
  }
}

// Keys and buttons

const KEYS = {
  k: () => decide("keep"),
  e: () => enterEditor(),
  d: () => decide("drop"),
  u: undo,
  "/": () => document.querySelector("#filter :checked").focus(),
  ArrowLeft: () => go("previous"),
  ArrowRight: () => go("next"),
};
const save = () => decide("edit", $("text").value);

function onKey(event) {
  const target = event.target;
  if (target === $("text")) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    else if (event.key === "Escape") leaveEditor();
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.closest("#filter")) {
    if (event.key === "Enter" || event.key === "Escape") target.blur();
    return; // the arrows choose
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = KEYS[key];
  // A key held down decides once, not on every picture that follows.
  if (!act || editing() || (event.repeat && !key.startsWith("Arrow"))) return;
  event.preventDefault();
  act();
}

function listen() {
  document.addEventListener("keydown", onKey);
  const clicks = {
    keep: KEYS.k, edit: KEYS.e, drop: KEYS.d, undo: KEYS.u, choose: KEYS["/"],
    previous: KEYS.ArrowLeft, next: KEYS.ArrowRight, save, leave: leaveEditor,
  };
  for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", act);
  $("text").addEventListener("input", noteDraft);
  $("filter").addEventListener("change", (event) => {
    filter = event.target.value;
    history.replaceState(null, "", `#${filter}`);
    say("");
    first();
  });
  $("filter").addEventListener("click", (event) => {
    if (event.pointerType) setTimeout(() => document.activeElement.blur()); // arrows are for pictures
  });
  $("picture").addEventListener("load", () => { $("picture").hidden = false; });
  $("picture").addEventListener("error", () => {
    $("picture").hidden = true;
    $("no-picture").textContent = `The picture cannot be shown: ${shown.image}`;
    $("no-picture").hidden = false;
  });
  // Another tab may have decided meanwhile.
  window.addEventListener("focus", () => {
    if (!editing() && shown) alone(async () => show(await ask("here", shown.id)));
  });
  window.addEventListener("beforeunload", (event) => {
    if (drafts.size) event.preventDefault();
  });
}

drawFilter();
listen();
first();
