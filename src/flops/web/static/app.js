// What pages do besides being pages: they stay true, tick, and answer to keys. Everything works without it,
// except that a page then has to be reloaded to see what is new.

const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// --- times that tick -------------------------------------------------------------------------------------

function duration(s) {
  if (s < 0.9995) return `${Math.max(0, Math.round(s * 1000))} ms`;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 119.5) return `${Math.round(s)} s`;
  const minutes = Math.floor(Math.round(s) / 60);
  const two = (n) => String(n).padStart(2, "0");
  if (minutes < 120) return `${minutes} min ${two(Math.round(s) % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${two(minutes % 60)} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function ago(s) {
  if (s < 5) return "just now";
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (s >= length) return `${Math.floor(s / length)} ${unit} ago`;
  return `${Math.floor(s)} s ago`;
}

function tick(within = document) {
  const now = Date.now() / 1000;
  for (const e of all("[data-ago]", within)) set(e, ago(now - e.dataset.ago));
  for (const e of all("[data-since]", within)) set(e, duration(Math.max(0, now - e.dataset.since)));
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

setInterval(tick, 1000);

// What was said is said once: not again after a reload.
if (one(".said")) {
  const here = new URL(location);
  here.searchParams.delete("said");
  history.replaceState(null, "", here);
}

// --- changing a page in place: what is the same stays, with its focus, scroll and open menus ---------------

function morph(from, to) {
  if (from.nodeType !== to.nodeType || from.nodeName !== to.nodeName) {
    from.replaceWith(document.importNode(to, true));
    return;
  }
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.nodeValue !== to.nodeValue) from.nodeValue = to.nodeValue;
    return;
  }
  if (from.isEqualNode(to)) return;
  const mine = from.matches("input, textarea, select") && from !== to;
  for (const { name } of [...from.attributes])
    if (!to.hasAttribute(name) && name !== "open" && name !== "hidden") from.removeAttribute(name);
  for (const { name, value } of [...to.attributes])
    if (from.getAttribute(name) !== value && !(mine && name === "value")) from.setAttribute(name, value);
  if (!mine || from.matches("select") === false) children(from, to);
}

const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.id || node.dataset?.key : undefined);

function children(from, to) {
  const keyed = new Map([...from.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
  const wanted = new Set([...to.childNodes].map(keyOf).filter(Boolean));
  let at = from.firstChild;
  for (const next of [...to.childNodes]) {
    const key = keyOf(next);
    while (at && keyOf(at) && !wanted.has(keyOf(at))) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
    if (key && keyed.has(key)) {
      const found = keyed.get(key);
      if (found !== at) from.insertBefore(found, at);
      else at = at.nextSibling;
      morph(found, next);
    } else if (!key && at && !keyOf(at) && at.nodeName === next.nodeName) {
      const old = at;
      at = at.nextSibling;
      morph(old, next);
    } else {
      from.insertBefore(document.importNode(next, true), at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function put(id, html) {
  const region = document.getElementById(`region-${id}`);
  if (!region) return;
  const parsed = new DOMParser().parseFromString(`<div>${html}</div>`, "text/html").body.firstChild;
  const log = one("pre.log", region);
  const atEnd = log && log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  children(region, parsed);
  if (atEnd) log.scrollTop = log.scrollHeight;
  tick(region);
  refilter(region);
}

// --- live pages ------------------------------------------------------------------------------------------

const page = one("[data-live]");
let source;
let lost;

function connect() {
  if (!page || source || document.hidden) return;
  source = new EventSource(page.dataset.live);
  source.onmessage = (message) => {
    away(false);
    const before = one("h1 .chip")?.textContent.trim();
    for (const [id, html] of Object.entries(JSON.parse(message.data).regions)) put(id, html);
    const state = one("h1 .chip")?.textContent.trim();
    if (before && state && before !== state) set(one("#announce"), `The project is now ${state}`);
    document.documentElement.dataset.updated = String(Date.now());
  };
  source.onopen = () => away(false);
  source.addEventListener("reload", () => location.reload());
  source.onerror = () => {
    away(true);
    if (source?.readyState === EventSource.CLOSED) {
      source = undefined;
      setTimeout(connect, 2000);
    }
  };
}

function disconnect() {
  source?.close();
  source = undefined;
}

function away(is) {
  const told = one(".away");
  if (!is) {
    clearTimeout(lost);
    lost = undefined;
    told?.remove();
  } else if (!told)
    lost ??= setTimeout(() => {
      const note = document.createElement("p");
      note.className = "away";
      note.setAttribute("role", "status");
      note.textContent = "The manager is away; this page goes on when it is back.";
      document.body.append(note);
    }, 1500);
}

// A hidden page keeps no connection: browsers allow six to one host.
document.addEventListener("visibilitychange", () => (document.hidden ? setTimeout(() => document.hidden && disconnect(), 5000) : connect()));
addEventListener("pagehide", disconnect);
addEventListener("pageshow", connect);
connect();

// --- tables ----------------------------------------------------------------------------------------------

function refilter(within = document) {
  for (const field of all("[data-filter]", within)) {
    const wanted = field.value.trim().toLowerCase();
    for (const row of all(`#${field.dataset.filter} tbody tr`))
      row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
  }
}
document.addEventListener("input", (event) => event.target.matches("[data-filter]") && refilter());

// --- forms -----------------------------------------------------------------------------------------------

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.busy) {
    const button = event.submitter ?? one("button", form);
    button.disabled = true;
    button.textContent = `${form.dataset.busy} …`;
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    set(one("#announce"), "Copied");
    const icon = one("use", button);
    icon.setAttribute("href", "#i-check");
    setTimeout(() => icon.setAttribute("href", "#i-copy"), 1500);
  } catch {
    set(one("#announce"), "The browser does not let this page copy");
  }
});

const checked = one("form[data-check]");
if (checked) {
  let timer;
  let asked = 0;
  const touched = new Set();
  const check = async () => {
    const mine = ++asked;
    const answer = await fetch(checked.dataset.check, {
      method: "POST",
      body: new URLSearchParams(new FormData(checked)),
      headers: { "X-CSRF": document.body.dataset.csrf },
    });
    if (!answer.ok || mine !== asked) return;
    const { problems, regions } = await answer.json();
    for (const [id, html] of Object.entries(regions)) put(id, html);
    for (const text of all(".field-problem")) {
      const name = text.dataset.of;
      const field = one(`[name="${name}"]`, checked);
      const wrong = touched.has(name) || touched.has("*") ? (problems[name] ?? "") : "";
      set(text, wrong);
      if (wrong) field?.setAttribute("aria-invalid", "true");
      else field?.removeAttribute("aria-invalid");
    }
  };
  checked.addEventListener("input", (event) => {
    touched.add(event.target.name);
    clearTimeout(timer);
    timer = setTimeout(check, 200);
  });
  check();
  if (all(".field-problem").some((text) => text.textContent)) touched.add("*");
}

for (const part of all("[data-load]"))
  fetch(part.dataset.load)
    .then((answer) => (answer.ok ? answer.json() : { regions: {} }))
    .then(({ regions }) => Object.entries(regions).forEach(([id, html]) => put(id, html)));

for (const source_ of all("[data-shows]")) {
  const show = () => {
    for (const part of all(`[data-shown-by="${source_.name}"]`)) {
      const picked = source_.type === "radio" ? one(`[name="${source_.name}"]:checked`)?.value : source_.value;
      part.hidden = !part.dataset.when.split(" ").includes(picked);
    }
  };
  source_.addEventListener("change", show);
  show();
}

const login = one("form[data-login]");
const within = location.hash.startsWith("#/") ? location.hash : "";  // a place in MLflow's page
if (login && within) login.action += within;
if (login && location.hash.length > 1 && !within) {
  login.elements.code.value = decodeURIComponent(location.hash.slice(1));
  history.replaceState(null, "", location.pathname + location.search);
  one("#token").required = false;
  login.submit();
} else if (login && !one("[role=alert]", login.parentElement)) {
  // Who follows a link from elsewhere comes without the cookie, although they are signed in.
  fetch("/login/state")
    .then((answer) => answer.json())
    .then((state) => state.signed_in && location.replace(login.elements.next.value + within));
}

// --- keys ------------------------------------------------------------------------------------------------

const places = { p: "/", m: "/models", d: "/data", n: "/nodes", c: "/compare", u: "/users", a: "/audit" };
let going = false;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
  if (!one("nav")) return;
  if (going && places[event.key]) location.assign(places[event.key]);
  else if (event.key === "c" && !going) location.assign("/new");
  else if (event.key === "?") one("#keys").showModal();
  else if (event.key === "/" && one("[data-filter]")) {
    event.preventDefault();
    one("[data-filter]").focus();
  }
  going = event.key === "g";
  if (going) setTimeout(() => (going = false), 1500);
});
