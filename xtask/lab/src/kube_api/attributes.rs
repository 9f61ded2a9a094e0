//! What a request is about, as authorization sees it.
//!
//! Owns reading method, path and query. Never sees a body.

use hyper::Method;

/// A request's attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) verb: String,
    /// Empty for the core group and for paths that are no resource.
    pub(super) group: String,
    /// Empty for paths that are no resource.
    pub(super) version: String,
    pub(super) resource: String,
    pub(super) subresource: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) path: String,
    pub(super) query: Vec<(String, String)>,
    /// Requirements of the field selector that are equalities.
    pub(super) fields: Vec<(String, String)>,
}

// === impl Attributes ===

impl Attributes {
    pub(super) fn new(method: &Method, path: &str, query: &str) -> Self {
        let query: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let mut attributes = Self {
            verb: method.as_str().to_ascii_lowercase(),
            path: path.to_owned(),
            query,
            ..Self::default()
        };
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let rest = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => {
                (*version).clone_into(&mut attributes.version);
                rest
            }
            ["apis", group, version, rest @ ..] if !rest.is_empty() => {
                (*group).clone_into(&mut attributes.group);
                (*version).clone_into(&mut attributes.version);
                rest
            }
            _ => return attributes,
        };
        attributes.read_resource(rest);
        attributes.read_verb(method);
        attributes
    }

    /// A parameter of the query; empty where it is absent.
    pub(super) fn parameter(&self, name: &str) -> &str {
        self.query.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    /// A boolean parameter of the query.
    pub(super) fn flag(&self, name: &str) -> bool {
        matches!(self.parameter(name), "true" | "1")
    }

    /// The value that the field selector demands of a field.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn is_resource(&self) -> bool {
        !self.version.is_empty()
    }

    /// Resource and subresource, or the path of what is none.
    pub(super) fn full_resource(&self) -> String {
        match (self.is_resource(), self.subresource.is_empty()) {
            (false, _) => self.path.clone(),
            (true, true) => self.resource.clone(),
            (true, false) => format!("{}/{}", self.resource, self.subresource),
        }
    }

    fn read_resource(&mut self, parts: &[&str]) {
        let parts = match parts {
            // A namespace is itself the namespace that the request is in.
            ["namespaces", namespace, rest @ ..] => {
                (*namespace).clone_into(&mut self.namespace);
                if rest.is_empty() || rest[0] == "status" || rest[0] == "finalize" { parts } else { rest }
            }
            _ => parts,
        };
        let part = |at: usize| parts.get(at).copied().unwrap_or_default().to_owned();
        (self.resource, self.name, self.subresource) = (part(0), part(1), part(2));
    }

    fn read_verb(&mut self, method: &Method) {
        let selector = self.parameter("fieldSelector").to_owned();
        let equalities = selector.split(',').filter_map(|requirement| {
            let (field, value) = requirement.split_once('=').filter(|(field, _)| !field.ends_with('!'))?;
            Some((field.to_owned(), value.trim_start_matches('=').to_owned()))
        });
        self.fields = equalities.collect();
        let verb = match (method.as_str(), self.name.is_empty()) {
            ("GET" | "HEAD", false) => "get",
            ("GET" | "HEAD", true) if self.flag("watch") => "watch",
            ("GET" | "HEAD", true) => "list",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", false) => "delete",
            ("DELETE", true) => "deletecollection",
            _ => return,
        };
        verb.clone_into(&mut self.verb);
        if let ("list" | "watch", Some(name)) = (verb, self.field("metadata.name")) {
            self.name = name.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_verb_resource_namespace_and_name() {
        for (method, target, expected) in [
            ("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1", ["list", "", "pods", "", ""]),
            ("GET", "/api/v1/pods?watch=1", ["watch", "", "pods", "", ""]),
            ("GET", "/api/v1/namespaces/app/pods/web", ["get", "", "pods", "app", "web"]),
            ("GET", "/api/v1/namespaces/app", ["get", "", "namespaces", "app", "app"]),
            ("GET", "/api/v1/namespaces", ["list", "", "namespaces", "", ""]),
            (
                "POST",
                "/api/v1/namespaces/app/serviceaccounts/web/token",
                ["create", "", "serviceaccounts/token", "app", "web"],
            ),
            (
                "POST",
                "/apis/authentication.k8s.io/v1/tokenreviews",
                ["create", "authentication.k8s.io", "tokenreviews", "", ""],
            ),
            ("GET", "/api/v1/nodes?fieldSelector=metadata.name==n1", ["list", "", "nodes", "", "n1"]),
            ("PATCH", "/api/v1/nodes/n1/status", ["patch", "", "nodes/status", "", "n1"]),
            ("DELETE", "/api/v1/namespaces/app/pods", ["deletecollection", "", "pods", "app", ""]),
            ("GET", "/openid/v1/jwks", ["get", "", "/openid/v1/jwks", "", ""]),
            ("GET", "/api/v1", ["get", "", "/api/v1", "", ""]),
        ] {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let found = Attributes::new(&method, path, query);
            let resource = found.full_resource();
            assert_eq!(
                [&found.verb, &found.group, &resource, &found.namespace, &found.name],
                expected,
                "{target}"
            );
        }
    }

    #[test]
    fn a_field_selector_counts_only_where_it_demands_equality() {
        let found = Attributes::new(&Method::GET, "/api/v1/pods", "fieldSelector=spec.nodeName!=n1,a==b");
        assert_eq!(found.field("spec.nodeName"), None);
        assert_eq!(found.field("a"), Some("b"));
    }
}
