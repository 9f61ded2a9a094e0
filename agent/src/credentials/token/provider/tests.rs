use std::{
    fs,
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::SeqCst},
    },
};

use jiff::SignedDuration;

use super::*;
use crate::credentials::token::fake_cluster::{FakeCluster, LIFE};

/// A provider on a node whose clock and kubelet belong to the test.
struct Node {
    cluster: Arc<FakeCluster>,
    kubelet: tempfile::TempDir,
    /// Minutes by which the clock is ahead.
    ahead: Arc<AtomicI64>,
    tokens: TokenProvider,
}

// === impl Node ===

impl Node {
    fn new() -> Self {
        let (cluster, kubelet) = (FakeCluster::new(), tempfile::tempdir().unwrap());
        let ahead = Arc::<AtomicI64>::default();
        let offset = Arc::clone(&ahead);
        let clock: Clock =
            Arc::new(move || Timestamp::now() + SignedDuration::from_mins(offset.load(SeqCst)));
        let issuer = TokenVerifier::new(cluster.client());
        let tokens = TokenProvider::new(kubelet.path(), cluster.client(), issuer, clock);
        Self { cluster, kubelet, ahead, tokens }
    }

    fn kubelet_writes(&self, token: &str) {
        let volume = self.kubelet.path().join("pods").join(self.cluster.pod.uid.to_string());
        let volume = volume.join("volumes/kubernetes.io~projected").join(TOKEN_VOLUME);
        fs::create_dir_all(&volume).unwrap();
        fs::write(volume.join(TOKEN_VOLUME), token).unwrap();
    }

    async fn token(&self) -> String {
        self.tokens.for_pod(&self.cluster.pod).await.unwrap().expose().to_owned()
    }

    /// A token of the pod with changed claims.
    fn signed(&self, change: impl FnOnce(&mut lab::jwt::Claims)) -> String {
        let mut claims = self.cluster.cluster.pod_claims("app", "web-0", &[AUDIENCE], LIFE.unsigned_abs());
        change(&mut claims);
        self.cluster.cluster.sign(&claims)
    }
}

#[tokio::test]
async fn a_requested_token_is_used_for_four_fifths_of_its_life() {
    let node = Node::new();
    let first = node.token().await;
    let last = LIFE.as_mins() * 4 / 5;
    for minutes in [0, 60, last - 1] {
        node.ahead.store(minutes, SeqCst);
        assert_eq!(node.token().await, first, "after {minutes} minutes");
    }
    node.ahead.store(last + 1, SeqCst);
    assert_ne!(node.token().await, first);
    assert_eq!(node.cluster.token_requests(), 2);
}

#[tokio::test]
async fn a_valid_kubelet_token_is_used_and_otherwise_one_is_requested() {
    let node = Node::new();
    let good = node.cluster.token().expose().to_owned();
    let forged = node.cluster.cluster.signing_key().forge();
    let forged =
        forged.sign(&node.cluster.cluster.pod_claims("app", "web-0", &[AUDIENCE], LIFE.unsigned_abs()));
    let uid = crate::testing::pod_uid().to_string();
    for (what, token, is_good) in [
        ("good", good, true),
        ("expired", node.signed(|claims| claims.exp = claims.iat - 1), false),
        ("early", node.signed(|claims| claims.nbf += 600), false),
        ("another pod's", node.signed(|claims| claims.kubernetes.pod.as_mut().unwrap().uid = uid), false),
        ("for somebody else", node.signed(|claims| claims.aud = vec!["sts.amazonaws.com".into()]), false),
        ("of another cluster", node.signed(|claims| claims.iss = "https://elsewhere".into()), false),
        ("forged", forged, false),
        ("none", "not a token".to_owned(), false),
    ] {
        node.tokens.remove_pod(node.cluster.pod.uid).await;
        node.kubelet_writes(&token);
        let before = node.cluster.token_requests();
        assert_eq!(node.token().await == token, is_good, "{what}");
        assert_eq!(node.cluster.token_requests() - before, usize::from(!is_good), "{what}");
    }
}

#[tokio::test]
async fn a_kubelet_token_is_used_while_it_cannot_be_verified() {
    let node = Node::new();
    node.cluster.set_down(true);
    let token = node.cluster.token();
    node.kubelet_writes(token.expose());
    assert_eq!(node.token().await, token.expose());
    assert_eq!(node.cluster.token_requests(), 0);
}

#[tokio::test]
async fn a_token_that_eks_auth_has_refused_is_not_used_again() {
    let node = Node::new();
    let uid = node.cluster.pod.uid;
    let kubelet_token = node.cluster.token();
    node.kubelet_writes(kubelet_token.expose());
    assert_eq!(node.token().await, kubelet_token.expose());
    node.tokens.reject_token(uid, &kubelet_token).await;
    let requested = node.token().await;
    assert_ne!(requested, kubelet_token.expose());
    assert_eq!((node.token().await, node.cluster.token_requests()), (requested, 1), "and cached");

    // The kubelet has a newer one.
    let newer = node.cluster.token();
    node.kubelet_writes(newer.expose());
    assert_eq!(node.token().await, newer.expose());
    node.tokens.reject_token(uid, &newer).await;
    let requested = Secret::from(node.token().await);
    node.tokens.reject_token(uid, &requested).await;
    assert_ne!(node.token().await, requested.expose(), "a requested one is dropped, too");
}

#[test]
fn the_kubelet_symlinks_are_followed_but_never_out_of_the_volume() {
    let volume = tempfile::tempdir().unwrap();
    let at = |path: &str| volume.path().join(path);
    assert_eq!(read_projected(&at("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);

    std::fs::create_dir(at("..2026_01_01")).unwrap();
    std::fs::write(at("..2026_01_01/eks-pod-identity-token"), "a.b.c\n").unwrap();
    symlink("..2026_01_01", at("..data")).unwrap();
    symlink("..data/eks-pod-identity-token", at(TOKEN_VOLUME)).unwrap();
    assert_eq!(read_projected(volume.path()).unwrap().expose(), "a.b.c");

    std::fs::write(at("..2026_01_01/eks-pod-identity-token"), vec![b'a'; claims::MAX_LEN + 1]).unwrap();
    assert!(read_projected(volume.path()).is_err());

    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    for target in [elsewhere.path(), Path::new("../../../../../../etc/hostname"), Path::new("..data")] {
        std::fs::remove_file(at(TOKEN_VOLUME)).unwrap();
        symlink(target, at(TOKEN_VOLUME)).unwrap();
        assert!(read_projected(volume.path()).is_err(), "{}", target.display());
    }
}
