//! `TokenRequest` and `TokenReview`.
//!
//! Owns what a token may be asked to be, for anybody and for a node (`NodeRestriction`). Never signs one: the
//! cluster does.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    attributes::Attributes, authenticate::Authenticator, authorize::Rules, status::Status, user::User,
};
use crate::cluster::{API_AUDIENCE, Cluster, TokenOrder, store::Kind};

/// What the kubelet asks for on behalf of its default volume; such a token is prolonged.
const PROLONGED: u64 = 60 * 60 + 7;
const PROLONGED_TO: Duration = Duration::from_hours(365 * 24);
const UID_MISMATCH: &str =
    "does not match the UID in record. The object might have been deleted and then recreated";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    audiences: Vec<String>,
    expiration_seconds: u64,
    bound_object_ref: Option<BoundObject>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct BoundObject {
    api_version: String,
    kind: String,
    name: String,
    uid: String,
}

// === impl Spec ===

impl Default for Spec {
    fn default() -> Self {
        Self { audiences: Vec::new(), expiration_seconds: 3600, bound_object_ref: None }
    }
}

/// Answers a `TokenRequest`.
pub(super) fn create(
    cluster: &Cluster,
    rules: &Rules,
    user: &User,
    attributes: &Attributes,
    mut request: Value,
    now: Timestamp,
) -> Result<Value, Status> {
    let Attributes { namespace, name, .. } = attributes;
    let mut spec: Spec = serde_json::from_value(request["spec"].take()).map_err(|error| {
        Status::bad_request(format!("TokenRequest in version \"v1\" cannot be handled: {error}"))
    })?;
    if let Some(node) = user.node_identity() {
        admit_node(cluster, rules, user, node, attributes, &spec)?;
    }
    if cluster.get(Kind::ServiceAccount, namespace, name).is_none() {
        return Err(Status::not_found("serviceaccounts", name));
    }
    if spec.audiences.is_empty() {
        spec.audiences.push(API_AUDIENCE.to_owned());
    }
    check_lifetime(&spec)?;
    let pod =
        spec.bound_object_ref.as_ref().map(|bound| check_bound(cluster, attributes, bound)).transpose()?;

    let asked = Duration::from_secs(spec.expiration_seconds);
    let prolong =
        pod.is_some() && spec.expiration_seconds == PROLONGED && spec.audiences == [API_AUDIENCE.to_owned()];
    let order = TokenOrder {
        namespace,
        service_account: name,
        pod,
        audiences: spec.audiences.clone(),
        lifetime: if prolong { PROLONGED_TO } else { asked },
        warn_after: prolong.then_some(asked),
    };
    // The pod may have been deleted since it was looked up.
    let claims =
        cluster.claims(&order, now).ok_or_else(|| Status::not_found("pods", pod.unwrap_or_default()))?;
    let expires = now.as_second().saturating_add(i64::try_from(spec.expiration_seconds).unwrap_or(i64::MAX));
    let expires = Timestamp::from_second(expires).unwrap_or(Timestamp::MAX);
    let bound = spec.bound_object_ref.as_ref().map(|bound| {
        json!({"apiVersion": bound.api_version, "kind": bound.kind, "name": bound.name, "uid": bound.uid})
    });
    Ok(json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": rfc3339(now)},
        "spec": {
            "audiences": spec.audiences,
            "expirationSeconds": spec.expiration_seconds,
            "boundObjectRef": bound,
        },
        "status": {"token": cluster.sign(&claims), "expirationTimestamp": rfc3339(expires)},
    }))
}

/// Answers a `TokenReview`.
pub(super) fn review(
    authenticator: &Authenticator,
    mut review: Value,
    now: Timestamp,
) -> Result<Value, Status> {
    let spec = &review["spec"];
    let Some(token) = spec["token"].as_str().filter(|token| !token.is_empty()) else {
        return Err(Status::bad_request("token is required for TokenReview in authentication".to_owned()));
    };
    let asked = spec["audiences"].as_array().into_iter().flatten();
    let mut audiences: Vec<String> =
        asked.filter_map(|audience| audience.as_str().map(str::to_owned)).collect();
    if audiences.is_empty() {
        audiences.push(API_AUDIENCE.to_owned());
    }
    let status = match authenticator.token(token, &audiences, now, Instant::now()) {
        Ok((user, audiences)) => json!({"authenticated": true, "user": user.info(), "audiences": audiences}),
        Err(error) => json!({"user": {}, "error": error}),
    };
    review["status"] = status;
    Ok(review)
}

/// What `NodeRestriction` asks of a node's request.
fn admit_node(
    cluster: &Cluster,
    rules: &Rules,
    user: &User,
    node: &str,
    attributes: &Attributes,
    spec: &Spec,
) -> Result<(), Status> {
    let deny = |why: &str| Err(Status::denied(attributes, why));
    let bound = match &spec.bound_object_ref {
        Some(bound) if bound.api_version == "v1" && bound.kind == "Pod" && !bound.name.is_empty() => bound,
        _ => return deny("node requested token not bound to a pod"),
    };
    if bound.uid.is_empty() {
        return deny("node requested token with a pod binding without a uid");
    }
    let pod = cluster
        .get(Kind::Pod, &attributes.namespace, &bound.name)
        .ok_or_else(|| Status::not_found("pods", &bound.name))?;
    if pod["metadata"]["uid"] != bound.uid {
        return deny(&format!("the UID in the bound object reference ({}) {UID_MISMATCH}", bound.uid));
    }
    if pod["spec"]["nodeName"] != node {
        return deny("node requested token bound to a pod scheduled on a different node");
    }
    let audience = match spec.audiences.as_slice() {
        [] => "",
        [audience] => audience,
        _ => return deny("node may only request 0 or 1 audiences"),
    };
    if has_token_volume(&pod, audience) || rules.allows_audience(user, attributes, audience) {
        return Ok(());
    }
    deny(&format!(
        "audience \"{audience}\" not found in pod spec volume, {} is not authorized to request tokens for this \
         audience",
        user.name
    ))
}

fn has_token_volume(pod: &Value, audience: &str) -> bool {
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    let sources = volumes.filter_map(|volume| volume["projected"]["sources"].as_array()).flatten();
    let mut tokens = sources.filter_map(|source| source.get("serviceAccountToken"));
    tokens.any(|token| token["audience"].as_str().unwrap_or_default() == audience)
}

fn check_lifetime(spec: &Spec) -> Result<(), Status> {
    let why = match spec.expiration_seconds {
        0..600 => "may not specify a duration less than 10 minutes",
        600..=0x1_0000_0000 => return Ok(()),
        _ => "may not specify a duration larger than 2^32 seconds",
    };
    let why = format!("Invalid value: {}: {why}", spec.expiration_seconds);
    let field = "spec.expirationSeconds";
    Err(Status::invalid("authentication.k8s.io", "TokenRequest", field, "FieldValueInvalid", &why))
}

/// The pod that a token is bound to.
fn check_bound<'a>(
    cluster: &Cluster,
    attributes: &Attributes,
    bound: &'a BoundObject,
) -> Result<&'a str, Status> {
    let Attributes { namespace, name, .. } = attributes;
    if (bound.api_version.as_str(), bound.kind.as_str()) != ("v1", "Pod") {
        let (version, kind) = (&bound.api_version, &bound.kind);
        let message = format!("cannot bind token to object of type {version}, Kind={kind}");
        return Err(Status::bad_request(message));
    }
    let pod = cluster
        .get(Kind::Pod, namespace, &bound.name)
        .ok_or_else(|| Status::not_found("pods", &bound.name))?;
    if pod["spec"]["serviceAccountName"] != *name {
        return Err(Status::bad_request(format!(
            "cannot bind token for serviceaccount \"{name}\" to pod running with different serviceaccount name."
        )));
    }
    if !bound.uid.is_empty() && pod["metadata"]["uid"] != bound.uid {
        let why = format!("the UID in the bound object reference ({}) {UID_MISMATCH}", bound.uid);
        return Err(Status::conflict("Pod", &bound.name, &why));
    }
    Ok(&bound.name)
}

fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
