//! The token that proves a pod's service account to EKS Auth, for a caller who sent none.
//!
//! Owns where it comes from, best first: the file that the kubelet keeps for the pod, then TokenRequest. Never
//! asks for a token that is not bound to that very pod.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Client, Resource as _, api::PostParams};
use moka::future::Cache;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tracing::{debug, warn};

pub mod claims;
#[cfg(test)]
pub(super) mod fake_cluster;
pub mod issuer;
pub mod signature;

use self::issuer::{Issuer, Verdict};
use super::{
    cache::Clock,
    scheduler::{TokenDigest, freshness},
};
use crate::{
    identity::{Pod, PodUid, ServiceAccountRef, pods::TOKEN_VOLUME},
    secret::Secret,
};

/// The audience that EKS Auth takes tokens for.
pub const AUDIENCE: &str = "pods.eks.amazonaws.com";
/// Life asked for, as the EKS webhook does: a day.
const LIFE_SECS: i64 = 86_400;
/// The Node authorizer learns of a pod up to some 200 ms after the watch: a refusal is asked again until then.
const AUTHORIZER_LAG: Duration = Duration::from_millis(500);
const RETRY_EVERY: Duration = Duration::from_millis(50);
/// Pods that a node can have, with room; a token more or less costs one call.
const REQUESTED_MAX: u64 = 1024;

/// Obtains tokens for pods.
#[derive(Clone)]
pub struct Tokens {
    kubelet_pods: PathBuf,
    kube: Client,
    issuer: Issuer,
    clock: Clock,
    requested: Cache<PodUid, (Secret, Timestamp)>,
    /// The last one of a pod that EKS Auth has refused: the kubelet keeps its file until most of its life is over.
    refused: Cache<PodUid, TokenDigest>,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server gave none.
    #[error("the API server gives no token for service account {service_account}: {source}")]
    Request {
        /// The service account, as `namespace/name`.
        service_account: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server's answer has no token.
    #[error("the API server's answer for service account {service_account} has no token")]
    Empty {
        /// The service account, as `namespace/name`.
        service_account: String,
    },
}

// === impl Tokens ===

impl Tokens {
    /// Tokens from the kubelet whose `--root-dir` is `kubelet_root`, as far as `issuer` takes them for good, and from the
    /// API server.
    pub fn new(kubelet_root: &Path, kube: Client, issuer: Issuer, clock: Clock) -> Self {
        let life = Duration::from_secs(LIFE_SECS.unsigned_abs());
        let requested = Cache::builder().max_capacity(REQUESTED_MAX).time_to_live(life).build();
        let refused = Cache::builder().max_capacity(REQUESTED_MAX).time_to_live(life).build();
        Self { kubelet_pods: kubelet_root.join("pods"), kube, issuer, clock, requested, refused }
    }

    /// A token bound to this pod, good now.
    pub async fn for_pod(&self, pod: &Pod) -> Result<Secret, Error> {
        if let Some(token) = self.kubelets(pod).await {
            return Ok(token);
        }
        let now = (self.clock)();
        if let Some((token, until)) = self.requested.get(&pod.uid).await
            && now < until
        {
            return Ok(token);
        }
        let (token, expiration) = self.request(pod).await?;
        let until = freshness::use_token_until(now, expiration);
        self.requested.insert(pod.uid, (token.clone(), until)).await;
        Ok(token)
    }

    /// Drops what was kept for a pod that is gone.
    pub async fn forget(&self, uid: PodUid) {
        self.requested.invalidate(&uid).await;
        self.refused.invalidate(&uid).await;
    }

    /// Never gives this token of a pod again, which EKS Auth has refused.
    pub async fn refused(&self, uid: PodUid, token: &Secret) {
        self.requested.invalidate(&uid).await;
        self.refused.insert(uid, token.digest()).await;
    }

    /// The kubelet's token of the pod. `None` where the webhook has put none, or the kubelet has not written it
    /// yet, or it is no longer good because the kubelet is behind.
    async fn kubelets(&self, pod: &Pod) -> Option<Secret> {
        if !pod.token_volume {
            return None;
        }
        let volume = self.kubelet_pods.join(pod.uid.to_string());
        let volume = volume.join("volumes/kubernetes.io~projected").join(TOKEN_VOLUME);
        let read = tokio::task::spawn_blocking(move || read_projected(&volume)).await;
        let read = read.unwrap_or_else(|join| Err(io::Error::other(join)));
        match read {
            Ok(token) => match self.fault(&token, pod).await {
                None => Some(token),
                Some(reason) => {
                    debug!(pod.uid = %pod.uid, reason, "the kubelet's token is not good: asking the API server");
                    None
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(),
                    "cannot read the kubelet's token of a pod: asking the API server");
                None
            }
        }
    }

    /// What is wrong with a token of this pod, as far as one can tell here.
    async fn fault(&self, token: &Secret, pod: &Pod) -> Option<String> {
        if self.refused.get(&pod.uid).await == Some(token.digest()) {
            return Some("EKS Auth has refused it".to_owned());
        }
        let claims = match claims::read(token.expose(), (self.clock)()) {
            Ok(claims) if claims.pod == Some(pod.uid) => claims,
            Ok(_) => return Some("it is not bound to the pod".to_owned()),
            Err(error) => return Some(error.to_string()),
        };
        match self.issuer.judge(token, &claims).await {
            Verdict::Good | Verdict::Unknown => None,
            Verdict::Bad(reason) => Some(reason),
        }
    }

    async fn request(&self, pod: &Pod) -> Result<(Secret, Timestamp), Error> {
        let service_account = &pod.service_account;
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![AUDIENCE.to_owned()],
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(pod.name.clone()),
                    uid: Some(pod.uid.to_string()),
                }),
                expiration_seconds: Some(LIFE_SECS),
            },
            ..TokenRequest::default()
        };
        let url = ServiceAccount::url_path(&(), Some(&service_account.namespace));
        let failed = |source: kube::Error| Error::Request {
            service_account: service_account.to_string(),
            source: Box::new(source),
        };
        let body = serde_json::to_vec(&request).map_err(|error| failed(kube::Error::SerdeError(error)))?;
        let post = kube::core::Request::new(url).create_subresource(
            "token",
            &service_account.name,
            &PostParams::default(),
            body,
        );
        let post = post.map_err(|error| failed(kube::Error::BuildRequest(error)))?;
        let begun = tokio::time::Instant::now();
        loop {
            match self.kube.request_text(post.clone()).await {
                Ok(answer) => return read_answer(&answer, service_account),
                Err(kube::Error::Api(status)) if lags(&status) && begun.elapsed() < AUTHORIZER_LAG => {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                Err(source) => return Err(failed(source)),
            }
        }
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("kubelet_pods", &self.kubelet_pods).finish_non_exhaustive()
    }
}

/// Reads the API server's answer here: kube would log one that it cannot read, token and all.
fn read_answer(answer: &str, service_account: &ServiceAccountRef) -> Result<(Secret, Timestamp), Error> {
    let empty = || Error::Empty { service_account: service_account.to_string() };
    let answer: TokenRequest = serde_json::from_str(answer).map_err(|_| empty())?;
    let status = answer.status.filter(|status| !status.token.is_empty()).ok_or_else(empty)?;
    Ok((Secret::from(status.token), status.expiration_timestamp.0))
}

/// Whether the Node authorizer has not heard of the pod yet; every other refusal is meant.
fn lags(status: &kube::core::Status) -> bool {
    status.code == 403 && status.message.contains("no relationship found")
}

/// Reads a projected token. The volume's files are symlinks (`..data`) that the kubelet switches, on a
/// directory that the pod may share with a container of its own making: the kernel keeps us inside it.
pub(crate) fn read_projected(volume: &Path) -> io::Result<Secret> {
    let directory = File::open(volume)?;
    let file = rustix::fs::openat2(
        &directory,
        TOKEN_VOLUME,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    )?;
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file"));
    }
    let mut token = String::new();
    file.take(claims::MAX_LEN as u64 + 1).read_to_string(&mut token)?;
    if token.len() > claims::MAX_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too large for a token"));
    }
    Ok(Secret::from(token.trim_end()))
}

#[cfg(test)]
mod tests;
