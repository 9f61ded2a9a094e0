//! Who a bearer token stands for.
//!
//! Owns the checks of a service-account token. Never authorizes anything.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::Value;

use super::user::User;
use crate::{
    cluster::{Cluster, store::Kind},
    jwt::Claims,
};

/// How long a token that was good counts as good without another look, as in kube-apiserver.
const CACHE_LIFETIME: Duration = Duration::from_secs(10);

/// The user, and those of the audiences asked for that the token has.
pub(super) type Authenticated = (User, Vec<String>);

#[derive(Debug)]
pub(super) struct Authenticator {
    cluster: Cluster,
    good: Mutex<HashMap<Asked, (Authenticated, Instant)>>,
}

/// A token, and the audiences that it was held against.
type Asked = (String, Vec<String>);

// === impl Authenticator ===

impl Authenticator {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, good: Mutex::default() }
    }

    /// The user behind a token for one of these audiences, or why there is none. `now` is the time that the token
    /// is held against, `at` the age of what is remembered.
    pub(super) fn token(
        &self,
        token: &str,
        audiences: &[String],
        now: Timestamp,
        at: Instant,
    ) -> Result<Authenticated, String> {
        let key = (token.to_owned(), audiences.to_vec());
        let mut good = self.good.lock();
        good.retain(|_, (_, since)| at.duration_since(*since) < CACHE_LIFETIME);
        if let Some((authenticated, _)) = good.get(&key) {
            return Ok(authenticated.clone());
        }
        let authenticated = self.check(token, audiences, now)?;
        good.insert(key, (authenticated.clone(), at));
        Ok(authenticated)
    }

    fn check(&self, token: &str, audiences: &[String], now: Timestamp) -> Result<Authenticated, String> {
        let refuse = |why: &str| format!("[invalid bearer token, {why}]");
        let claims = self.cluster.verify(token).map_err(|_| "invalid bearer token".to_owned())?;
        if claims.iss != self.cluster.issuer() {
            return Err("invalid bearer token".to_owned());
        }
        let common: Vec<String> = claims.aud.iter().filter(|own| audiences.contains(own)).cloned().collect();
        if common.is_empty() {
            let why = format!(
                "token audiences {} is invalid for the target audiences {}",
                quoted(&claims.aud),
                quoted(audiences)
            );
            return Err(refuse(&why));
        }
        self.check_claims(&claims, now).map_err(|why| refuse(&why))?;
        Ok((User::of_token(&claims), common))
    }

    fn check_claims(&self, claims: &Claims, now: Timestamp) -> Result<(), String> {
        if now.as_second() > claims.exp {
            return Err("service account token has expired".to_owned());
        }
        if now.as_second() < claims.nbf {
            return Err("service account token is not valid yet".to_owned());
        }
        let kubernetes = &claims.kubernetes;
        let find = |kind, name: &str| self.cluster.get(kind, &kubernetes.namespace, name);
        let uid = |object: &Value| object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let account = &kubernetes.serviceaccount;
        match find(Kind::ServiceAccount, &account.name) {
            None => return Err(format!("serviceaccounts \"{}\" not found", account.name)),
            Some(found) if uid(&found) != account.uid => {
                let (found, claimed) = (uid(&found), &account.uid);
                return Err(format!("service account UID ({found}) does not match claim ({claimed})"));
            }
            Some(_) => {}
        }
        let Some(pod) = &kubernetes.pod else { return Ok(()) };
        match find(Kind::Pod, &pod.name) {
            None => Err("service account token has been invalidated".to_owned()),
            Some(found) if uid(&found) != pod.uid => {
                let (found, claimed) = (uid(&found), &pod.uid);
                Err(format!("pod UID ({found}) does not match service account pod ref claim ({claimed})"))
            }
            Some(_) => Ok(()),
        }
    }
}

/// A list as Go's `%q` prints it.
fn quoted(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", quoted.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{API_AUDIENCE, PodSpec};

    #[test]
    fn a_deleted_pods_token_stays_valid_for_ten_seconds_if_it_was_cached() {
        let cluster = Cluster::new("https://oidc.test.invalid");
        cluster.add_service_account("app", "web");
        let text = str::to_owned;
        cluster.add_pod(&PodSpec {
            namespace: text("app"),
            name: text("web-1"),
            service_account: text("web"),
            ..PodSpec::default()
        });
        let token = cluster.mint_pod_token("app", "web-1", &[API_AUDIENCE], Duration::from_hours(1));
        let authenticator = Authenticator::new(cluster.clone());
        let (now, start) = (Timestamp::now(), Instant::now());
        let after = |seconds| {
            let at = start + Duration::from_secs(seconds);
            authenticator.token(&token, &[text(API_AUDIENCE)], now, at).map(|(user, _)| user.name)
        };
        assert_eq!(after(0).unwrap(), "system:serviceaccount:app:web");
        cluster.delete_pod("app", "web-1");
        assert_eq!(after(9).unwrap(), "system:serviceaccount:app:web");
        let refusal = "[invalid bearer token, service account token has been invalidated]";
        assert_eq!(after(10).unwrap_err(), refusal);
    }
}
