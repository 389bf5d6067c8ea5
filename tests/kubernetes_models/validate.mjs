// Reads a JSON list of objects, and writes a list with what their operators' types object to in each, or null.
import * as argocd from "@kubernetes-models/argo-cd/argoproj.io/v1alpha1";
import * as flux from "@kubernetes-models/flux-cd/kustomize.toolkit.fluxcd.io/v1";
import * as kyverno from "@kubernetes-models/kyverno/kyverno.io/v1";
import * as policies from "@kubernetes-models/kyverno/policies.kyverno.io/v1beta1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import { readFileSync, writeFileSync } from "node:fs";

const groups = {
  "argoproj.io/v1alpha1": argocd,
  "kustomize.toolkit.fluxcd.io/v1": flux,
  "kyverno.io/v1": kyverno,
  "policies.kyverno.io/v1beta1": policies,
  "monitoring.coreos.com/v1": prometheus,
};
const said = JSON.parse(readFileSync(0, "utf8")).map((object) => {
  try {
    new groups[object.apiVersion][object.kind](object).validate();
    return null;
  } catch (error) {
    return String(error.message);
  }
});
writeFileSync(1, JSON.stringify(said));
