//! When the cluster's keys are fetched, and how tokens are judged meanwhile.

use jiff::Timestamp;
use lab::jwt::SigningKey;
use tokio::time::{advance, sleep};

use super::*;
use crate::credentials::{token::claims, token::fake_cluster::FakeCluster};

/// Longer than a fetch whose answers come at once.
const SOON: Duration = Duration::from_millis(1);
const OTHER_KEY: &str = "it is signed with a key that is not the cluster's";

async fn verify(verifier: &TokenVerifier, token: &Secret) -> Verdict {
    let claims = claims::read(token.expose(), Timestamp::now()).unwrap();
    verifier.verify(token, &claims).await
}

fn other_key() -> Verdict {
    Verdict::Invalid(OTHER_KEY.to_owned())
}

/// A token for the cluster's pod that the cluster did not sign.
fn forged(cluster: &FakeCluster) -> Secret {
    let life = Duration::from_hours(1);
    let claims = cluster.cluster.pod_claims("app", "web-0", &[AUDIENCE], life);
    Secret::from(SigningKey::generate().sign(&claims))
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_once_an_hour_and_used_until_replaced() {
    let cluster = FakeCluster::new();
    let (verifier, token) = (TokenVerifier::new(cluster.client()), cluster.token());
    for _ in 0..59 {
        assert_eq!(verify(&verifier, &token).await, Verdict::Valid);
        advance(Duration::from_mins(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 1);
    // The API server is unavailable when they are old: they are used on, and fetches retried.
    cluster.set_down(true);
    advance(Duration::from_mins(1)).await;
    for seconds in 0..10 {
        assert_eq!(verify(&verifier, &token).await, Verdict::Valid, "after {seconds} s");
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 3);
    // A key that the cluster has retired is rejected from the next fetch on.
    cluster.cluster.rotate_signing_key();
    cluster.cluster.retire_old_keys();
    cluster.set_down(false);
    assert_eq!(verify(&verifier, &token).await, Verdict::Valid, "nobody waits for newer ones");
    sleep(SOON).await;
    assert_eq!(verify(&verifier, &token).await, other_key());
    assert_eq!(verify(&verifier, &cluster.token()).await, Verdict::Valid);
    assert_eq!(cluster.key_fetches(), 4);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_is_fetched_at_most_every_five_seconds() {
    let cluster = FakeCluster::new();
    let verifier = TokenVerifier::new(cluster.client());
    let old = cluster.token();
    assert_eq!(verify(&verifier, &old).await, Verdict::Valid);
    cluster.cluster.rotate_signing_key();
    let new = cluster.token();
    assert_eq!(verify(&verifier, &new).await, other_key(), "the keys are from just now");
    advance(RETRY_DELAY).await;
    for token in [&new, &old] {
        assert_eq!(verify(&verifier, token).await, Verdict::Valid);
    }
    assert_eq!(cluster.key_fetches(), 2, "one that is known needs no fetch");
    let forged = forged(&cluster);
    for _ in 0..100 {
        assert_eq!(verify(&verifier, &forged).await, other_key());
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(cluster.key_fetches(), 5, "after five, ten and fifteen of twenty seconds");
}

#[tokio::test(start_paused = true)]
async fn without_keys_no_token_is_valid_and_none_is_invalid() {
    let cluster = FakeCluster::new();
    cluster.set_down(true);
    let (verifier, token, forged) = (TokenVerifier::new(cluster.client()), cluster.token(), forged(&cluster));
    for _ in 0..20 {
        for token in [&token, &forged] {
            assert_eq!(verify(&verifier, token).await, Verdict::Unknown);
        }
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 4);
    cluster.set_down(false);
    assert_eq!(verify(&verifier, &token).await, Verdict::Valid);
    assert_eq!(verify(&verifier, &forged).await, other_key());
    // Nor is a token of an unknown key, which may be new, while the keys are unavailable.
    cluster.set_down(true);
    advance(RETRY_DELAY).await;
    assert_eq!(verify(&verifier, &forged).await, Verdict::Unknown);
    assert_eq!(verify(&verifier, &token).await, Verdict::Valid);
}

#[tokio::test(start_paused = true)]
async fn callers_share_a_key_fetch_that_continues_without_them() {
    let cluster = FakeCluster::new();
    cluster.set_latency(Duration::from_millis(300));
    let (verifier, token) = (TokenVerifier::new(cluster.client()), cluster.token());
    let begun = Instant::now();
    let verdicts = futures::future::join_all((0..8).map(|_| verify(&verifier, &token))).await;
    assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Unknown), "{verdicts:?}");
    assert_eq!(begun.elapsed(), WAIT_TIMEOUT);
    assert_eq!(verify(&verifier, &token).await, Verdict::Valid);
    assert_eq!((begun.elapsed(), cluster.key_fetches()), (Duration::from_millis(600), 1));
}

#[tokio::test(start_paused = true)]
async fn a_hanging_key_fetch_is_abandoned_and_another_one_started() {
    let cluster = FakeCluster::new();
    cluster.set_latency(Duration::from_hours(1));
    let (verifier, token) = (TokenVerifier::new(cluster.client()), cluster.token());
    verifier.prepare();
    sleep(Duration::from_secs(9)).await;
    assert_eq!(verify(&verifier, &token).await, Verdict::Unknown);
    cluster.set_latency(Duration::ZERO);
    assert_eq!((verify(&verifier, &token).await, cluster.key_fetches()), (Verdict::Unknown, 1));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((verify(&verifier, &token).await, cluster.key_fetches()), (Verdict::Valid, 2));
}
