//! Where podgate gets the token of a pod whose caller sent none.
//!
//! Owns the sources, best first: the file that the kubelet maintains for the pod, then TokenRequest. Never requests a token
//! that is not bound to that very pod.

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

use super::{
    claims,
    verifier::{TokenVerifier, Verdict},
};
use crate::{
    credentials::{Clock, TokenDigest, freshness},
    identity::{AUDIENCE, Pod, PodUid, ServiceAccountRef, TOKEN_VOLUME},
    secret::Secret,
};

/// Requested life: a day, like the EKS webhook.
const LIFE_SECS: i64 = 86_400;
/// The Node authorizer learns of a pod up to some 200 ms after the watch: a refusal is retried until then.
const AUTHORIZER_LAG: Duration = Duration::from_millis(500);
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// More pods than a node has; a token that was evicted costs one request.
const MAX_ENTRIES: u64 = 1024;

/// Obtains tokens for pods.
#[derive(Clone)]
pub struct TokenProvider {
    kubelet_pods: PathBuf,
    kube: Client,
    verifier: TokenVerifier,
    clock: Clock,
    /// Caches, unlike the tables of pods: the entries of a pod whose removal was missed lapse.
    requested: Cache<PodUid, (Secret, Timestamp)>,
    /// The last token of a pod that EKS Auth has refused: the kubelet replaces its file only after most of its life.
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

// === impl TokenProvider ===

impl TokenProvider {
    /// Tokens from the kubelet whose `--root-dir` is `kubelet_root`, unless `verifier` rejects them, and from the API
    /// server.
    pub fn new(kubelet_root: &Path, kube: Client, verifier: TokenVerifier, clock: Clock) -> Self {
        let life = Duration::from_secs(LIFE_SECS.unsigned_abs());
        let requested = Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(life).build();
        let refused = Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(life).build();
        Self { kubelet_pods: kubelet_root.join("pods"), kube, verifier, clock, requested, refused }
    }

    /// A token bound to this pod, valid now.
    pub async fn for_pod(&self, pod: &Pod) -> Result<Secret, Error> {
        if let Some(token) = self.kubelet_token(pod).await {
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

    /// Drops the tokens of a pod that was removed.
    pub async fn remove_pod(&self, uid: PodUid) {
        self.requested.invalidate(&uid).await;
        self.refused.invalidate(&uid).await;
    }

    /// Never returns this token of a pod again, since EKS Auth has refused it.
    pub async fn reject_token(&self, uid: PodUid, token: &Secret) {
        self.requested.invalidate(&uid).await;
        self.refused.insert(uid, token.digest()).await;
    }

    /// The kubelet's token of the pod. `None` where the webhook has added no volume, the kubelet has not written the file
    /// yet, or the token is no longer valid because the kubelet is behind.
    async fn kubelet_token(&self, pod: &Pod) -> Option<Secret> {
        if !pod.token_volume {
            return None;
        }
        let volume = self.kubelet_pods.join(pod.uid.to_string());
        let volume = volume.join("volumes/kubernetes.io~projected").join(TOKEN_VOLUME);
        let read = tokio::task::spawn_blocking(move || read_projected(&volume)).await;
        let read = read.unwrap_or_else(|join| Err(io::Error::other(join)));
        match read {
            Ok(token) => match self.rejection(&token, pod).await {
                None => Some(token),
                Some(reason) => {
                    debug!(pod.uid = %pod.uid, reason, "rejected the kubelet's token; requesting one from the API server");
                    None
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(),
                    "cannot read the kubelet's token of a pod; requesting one from the API server");
                None
            }
        }
    }

    /// Why a token cannot be used for this pod, as far as that is known here.
    async fn rejection(&self, token: &Secret, pod: &Pod) -> Option<String> {
        if self.refused.get(&pod.uid).await == Some(token.digest()) {
            return Some("EKS Auth has refused it".to_owned());
        }
        let claims = match claims::read(token.expose(), (self.clock)()) {
            Ok(claims) if claims.pod == Some(pod.uid) => claims,
            Ok(_) => return Some("it is not bound to the pod".to_owned()),
            Err(error) => return Some(error.to_string()),
        };
        match self.verifier.verify(token, &claims).await {
            Verdict::Valid | Verdict::Unknown => None,
            Verdict::Invalid(reason) => Some(reason),
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
                Err(kube::Error::Api(status))
                    if is_authorizer_lag(&status) && begun.elapsed() < AUTHORIZER_LAG =>
                {
                    tokio::time::sleep(RETRY_DELAY).await;
                }
                Err(source) => return Err(failed(source)),
            }
        }
    }
}

impl std::fmt::Debug for TokenProvider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenProvider").field("kubelet_pods", &self.kubelet_pods).finish_non_exhaustive()
    }
}

/// Parses the API server's response here: kube would log one that it cannot parse, including the token.
fn read_answer(answer: &str, service_account: &ServiceAccountRef) -> Result<(Secret, Timestamp), Error> {
    let empty = || Error::Empty { service_account: service_account.to_string() };
    let answer: TokenRequest = serde_json::from_str(answer).map_err(|_| empty())?;
    let status = answer.status.filter(|status| !status.token.is_empty()).ok_or_else(empty)?;
    Ok((Secret::from(status.token), status.expiration_timestamp.0))
}

/// Whether the Node authorizer does not know the pod yet; any other refusal is final.
fn is_authorizer_lag(status: &kube::core::Status) -> bool {
    status.code == 403 && status.message.contains("no relationship found")
}

/// Reads a projected token. The files of the volume are symlinks (`..data`) that the kubelet switches, in a directory that
/// containers of the pod may be able to write to: the kernel confines the lookup to it.
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
