//! Refusals as the API server words them.
//!
//! Owns `metav1.Status`. Never decides to refuse.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};

use super::{attributes::Attributes, user::User};
use crate::http::{self, Response};

/// A refusal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Status {
    code: StatusCode,
    reason: String,
    message: String,
    details: Value,
}

// === impl Status ===

impl Status {
    pub(super) fn new(code: StatusCode, reason: &str, message: String) -> Self {
        Self { code, reason: reason.to_owned(), message, details: Value::Null }
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized".to_owned())
    }

    pub(super) fn bad_request(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(super) fn not_found(resource: &str, name: &str) -> Self {
        let status = Self::new(StatusCode::NOT_FOUND, "NotFound", format!("{resource} \"{name}\" not found"));
        status.about("", resource, name)
    }

    pub(super) fn no_such_resource() -> Self {
        let message = "the server could not find the requested resource".to_owned();
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource".to_owned();
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    pub(super) fn conflict(kind: &str, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {kind} \"{name}\": {why}");
        Self::new(StatusCode::CONFLICT, "Conflict", message).about("", kind, name)
    }

    /// One field of an object is not as it must be; `why` begins with the kind of mistake.
    pub(super) fn invalid(group: &str, kind: &str, field: &str, mistake: &str, why: &str) -> Self {
        let message = format!("{kind}.{group} \"\" is invalid: {field}: {why}");
        let mut status =
            Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message).about(group, kind, "");
        status.details["causes"] = json!([{"reason": mistake, "message": why, "field": field}]);
        status
    }

    /// The resource version is older than the log of changes.
    pub(super) fn expired(message: String) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    /// The resource version is one that does not exist yet.
    pub(super) fn too_large_resource_version(wanted: u64, current: u64) -> Self {
        let message = format!("Timeout: Too large resource version: {wanted}, current: {current}");
        let mut status = Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message);
        let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        status.details = json!({"retryAfterSeconds": 1, "causes": [cause]});
        status
    }

    pub(super) fn too_many_requests(retry_after: Option<Duration>) -> Self {
        let message =
            "the server has received too many requests and has asked us to try again later".to_owned();
        let mut status = Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message);
        if let Some(after) = retry_after {
            status.details = json!({"retryAfterSeconds": after.as_secs()});
        }
        status
    }

    /// Authorization refuses; `reason` may be empty.
    pub(super) fn forbidden(user: &User, attributes: &Attributes, reason: &str) -> Self {
        let Attributes { verb, group, namespace, path, .. } = attributes;
        let what = match namespace.as_str() {
            _ if !attributes.is_resource() => format!("path \"{path}\""),
            namespace => {
                let resource = attributes.full_resource();
                let place = match namespace {
                    "" => "at the cluster scope".to_owned(),
                    namespace => format!("in the namespace \"{namespace}\""),
                };
                format!("resource \"{resource}\" in API group \"{group}\" {place}")
            }
        };
        let separator = if reason.is_empty() { "" } else { ": " };
        let why = format!("User \"{}\" cannot {verb} {what}{separator}{reason}", user.name);
        Self::denied(attributes, &why)
    }

    /// Admission refuses.
    pub(super) fn denied(attributes: &Attributes, why: &str) -> Self {
        let Attributes { group, resource, name, .. } = attributes;
        let dot = if group.is_empty() { "" } else { "." };
        let message = match (resource.as_str(), name.as_str()) {
            ("", _) => format!("forbidden: {why}"),
            (resource, "") => format!("{resource}{dot}{group} is forbidden: {why}"),
            (resource, name) => format!("{resource}{dot}{group} \"{name}\" is forbidden: {why}"),
        };
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).about(group, resource, name)
    }

    /// The object, as a watch's ERROR event carries it.
    pub(super) fn object(&self) -> Value {
        let mut object = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code.as_u16(),
        });
        if !self.details.is_null() {
            object["details"] = self.details.clone();
        }
        object
    }

    pub(super) fn response(&self) -> Response {
        let mut response = http::json(self.code, &self.object());
        if let Some(seconds) = self.details["retryAfterSeconds"].as_u64() {
            http::set_header(&mut response, "retry-after", &seconds.to_string());
        }
        response
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        let fields = [("name", name), ("group", group), ("kind", kind)];
        let fields = fields.into_iter().filter(|(_, value)| !value.is_empty());
        self.details = fields.map(|(key, value)| (key.to_owned(), json!(value))).collect();
        self
    }
}
