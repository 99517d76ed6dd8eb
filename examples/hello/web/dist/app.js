const element = (id) => document.getElementById(id);

function show(health) {
  const { status, checks, memory } = health;
  element("summary").textContent = status === "unhealthy" ? "The database does not answer." : "Everything answers.";
  element("summary").dataset.status = status;
  element("database").textContent = checks.database.name ?? checks.database.status;
  element("latency").textContent = `${checks.database.latency_ms} ms`;
  element("memory").textContent = `${(memory.resident_bytes / 1024 / 1024).toFixed(1)} MiB`;
  element("facts").hidden = false;
  element("raw").textContent = JSON.stringify(health, null, 2);
}

try {
  const answer = await fetch("/api/v1/health", { headers: { accept: "application/json" } });
  show(await answer.json());
} catch (error) {
  element("summary").textContent = "The health page cannot be reached.";
  element("summary").dataset.status = "unhealthy";
  element("raw").textContent = String(error);
}
