// Verifies a manifest in a container registry with Sigstore's own packages and without a transparency log: its bytes, its
// signature, and what else is attached. It knows OCI, Sigstore and in-toto, and nothing of Slipway but its predicate.
//
// node verify.mjs HOST/REPOSITORY@sha256:DIGEST TRUST.json
// TRUST.json: {"keys": [PEM…], "authorities": [PEM…], "required": [TYPE…], "maximumScanAgeDays": N}
// Prints the verified predicates by type as JSON, or ends with a line for each problem.
import { createHash, createPublicKey, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { bundleFromJSON } from "@sigstore/bundle";
import { toSignedEntity, toTrustMaterial, Verifier } from "@sigstore/verify";

const VERDICTS = "urn:slipway:verdicts:v1";
const ACCEPT = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
const [, host, repository, digest] = /^([^/]+)\/(.+)@(sha256:[0-9a-f]{64})$/.exec(process.argv[2]);
const trust = JSON.parse(readFileSync(process.argv[3], "utf8"));
const problems = [];

async function get(path) {
  const answer = await fetch(`http://${host}/v2/${repository}/${path}`, { headers: { accept: ACCEPT } });
  return answer.ok ? Buffer.from(await answer.arrayBuffer()) : null;
}

async function blobDigest(descriptor) {
  const answer = await fetch(`http://${host}/v2/${repository}/blobs/${descriptor.digest}`);
  const hash = createHash("sha256");
  for await (const chunk of answer.body) hash.update(chunk);
  return `sha256:${hash.digest("hex")}`;
}

// The keys that may have signed: those that are trusted, or that of a certificate that a trusted authority issued.
function candidates(material) {
  if (material.$case === "publicKey") return trust.keys.map((pem) => createPublicKey(pem));
  const certificate = new X509Certificate(material.certificate.rawBytes);
  const issued = trust.authorities.some((pem) => certificate.verify(new X509Certificate(pem).publicKey));
  if (!issued) throw new Error("CERTIFICATE_ERROR: not issued by a trusted authority");
  if (new Date(certificate.validTo) < new Date()) throw new Error(`CERTIFICATE_ERROR: expired ${certificate.validTo}`);
  return [certificate.publicKey];
}

// Sigstore's verifier takes a certificate only with a timestamp, so it is given the key of a certificate that was checked.
function statementOf(json) {
  const bundle = bundleFromJSON(json);
  const keys = candidates(bundle.verificationMaterial.content);
  bundle.verificationMaterial.content = { $case: "publicKey", publicKey: { hint: "" } };
  const nothing = { certificateAuthorities: [], timestampAuthorities: [], tlogs: [], ctlogs: [] };
  let last = new Error("PUBLIC_KEY_ERROR: no key is trusted");
  for (const key of keys) {
    const rawBytes = key.export({ type: "spki", format: "der" });
    const options = { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0 };
    try {
      new Verifier(toTrustMaterial(nothing, { "": { rawBytes } }), options).verify(toSignedEntity(bundle));
      return JSON.parse(bundle.content.dsseEnvelope.payload);
    } catch (error) {
      last = new Error(`${error.code ?? error.name}: ${error.message}`);
    }
  }
  throw last;
}

const raw = await get(`manifests/${digest}`);
const manifest = JSON.parse(raw);
for (const descriptor of [manifest.config, ...manifest.layers]) {
  const found = await blobDigest(descriptor);
  if (found !== descriptor.digest) problems.push(`${descriptor.digest}: has the digest ${found}`);
}
// The pages of the referrers API, or else the specification's fallback, a tag.
async function attached() {
  const entries = [];
  let where = new URL(`http://${host}/v2/${repository}/referrers/${digest}`);
  for (;;) {
    const answer = await fetch(where);
    if (!answer.ok) break;
    entries.push(...(await answer.json()).manifests);
    const next = /<([^>]+)>; rel="next"/.exec(answer.headers.get("link") ?? "");
    if (next === null) return entries;
    where = new URL(next[1], where);
  }
  const index = await get(`manifests/${digest.replace(":", "-")}`);
  return index === null ? [] : JSON.parse(index).manifests;
}

const verified = {};
for (const entry of await attached()) {
  if (!entry.artifactType.startsWith("application/vnd.dev.sigstore.bundle")) continue;
  const announced = entry.annotations["dev.sigstore.bundle.predicateType"];
  try {
    const [layer] = JSON.parse(await get(`manifests/${entry.digest}`)).layers;
    const statement = statementOf(JSON.parse(await get(`blobs/${layer.digest}`)));
    if (statement.predicateType !== announced) throw new Error(`is a ${statement.predicateType}`);
    const subjects = statement.subject.map((each) => `sha256:${each.digest.sha256}`);
    if (!subjects.includes(digest)) throw new Error(`is of ${subjects}`);
    (verified[announced] ??= []).push(statement.predicate);
  } catch (error) {
    problems.push(`${announced}: ${error.message}`);
  }
}
const missing = trust.required.filter((type) => !(type in verified)).map((type) => `${type}: none that verifies`);
const [latest] = (verified[VERDICTS] ?? []).sort((a, b) => b.scan.at.localeCompare(a.scan.at));
if (latest && !latest.passed) missing.push(`${VERDICTS}: a gate blocks`);
const age = latest ? (Date.now() - new Date(latest.scan.at)) / 86400e3 : 0;
if (age > trust.maximumScanAgeDays) missing.push(`${VERDICTS}: scanned ${age.toFixed(1)} days ago`);
const damaged = problems.filter((problem) => problem.startsWith("sha256:"));
if (missing.length || damaged.length) {
  process.stderr.write(`${[...missing, ...problems].join("\n")}\n`);
  process.exit(1);
}
process.stdout.write(JSON.stringify(verified));
