//! When the cluster's keys are fetched, and what is known of tokens meanwhile.

use jiff::Timestamp;
use lab::jwt::SigningKey;
use tokio::time::{advance, sleep};

use super::*;
use crate::credentials::{token::claims, token::fake_cluster::FakeCluster};

/// Longer than a fetch whose answers come at once.
const SOON: Duration = Duration::from_millis(1);
const OTHER_KEY: &str = "it is signed with a key that is not the cluster's";

async fn judge(issuer: &Issuer, token: &Secret) -> Verdict {
    let claims = claims::read(token.expose(), Timestamp::now()).unwrap();
    issuer.judge(token, &claims).await
}

fn other_key() -> Verdict {
    Verdict::Bad(OTHER_KEY.to_owned())
}

/// A token of the cluster's pod that the cluster has not signed.
fn forged(cluster: &FakeCluster) -> Secret {
    let life = Duration::from_hours(1);
    let claims = cluster.cluster.pod_claims("app", "web-0", &[AUDIENCE], life);
    Secret::from(SigningKey::generate().sign(&claims))
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_once_in_an_hour_and_used_until_there_are_newer_ones() {
    let cluster = FakeCluster::new();
    let (issuer, token) = (Issuer::new(cluster.client()), cluster.token());
    for _ in 0..59 {
        assert_eq!(judge(&issuer, &token).await, Verdict::Good);
        advance(Duration::from_mins(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 1);
    // The API server is away when they are old: they are used on, and asked for now and then.
    cluster.set_down(true);
    advance(Duration::from_mins(1)).await;
    for seconds in 0..10 {
        assert_eq!(judge(&issuer, &token).await, Verdict::Good, "after {seconds} s");
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 3);
    // A key that the cluster has taken back counts no more from the next fetch on.
    cluster.cluster.rotate_signing_key();
    cluster.cluster.retire_old_keys();
    cluster.set_down(false);
    assert_eq!(judge(&issuer, &token).await, Verdict::Good, "nobody waits for newer ones");
    sleep(SOON).await;
    assert_eq!(judge(&issuer, &token).await, other_key());
    assert_eq!(judge(&issuer, &cluster.token()).await, Verdict::Good);
    assert_eq!(cluster.key_fetches(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_not_known_is_asked_for_and_not_more_often_than_every_five_seconds() {
    let cluster = FakeCluster::new();
    let issuer = Issuer::new(cluster.client());
    let old = cluster.token();
    assert_eq!(judge(&issuer, &old).await, Verdict::Good);
    cluster.cluster.rotate_signing_key();
    let new = cluster.token();
    assert_eq!(judge(&issuer, &new).await, other_key(), "the keys are from just now");
    advance(EVERY).await;
    for token in [&new, &old] {
        assert_eq!(judge(&issuer, token).await, Verdict::Good);
    }
    assert_eq!(cluster.key_fetches(), 2, "one that is known needs no fetch");
    let forged = forged(&cluster);
    for _ in 0..100 {
        assert_eq!(judge(&issuer, &forged).await, other_key());
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(cluster.key_fetches(), 5, "after five, ten and fifteen of twenty seconds");
}

#[tokio::test(start_paused = true)]
async fn while_the_keys_cannot_be_had_no_token_is_good_and_none_is_bad() {
    let cluster = FakeCluster::new();
    cluster.set_down(true);
    let (issuer, token, forged) = (Issuer::new(cluster.client()), cluster.token(), forged(&cluster));
    for _ in 0..20 {
        for token in [&token, &forged] {
            assert_eq!(judge(&issuer, token).await, Verdict::Unknown);
        }
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(cluster.key_fetches(), 4);
    cluster.set_down(false);
    assert_eq!(judge(&issuer, &token).await, Verdict::Good);
    assert_eq!(judge(&issuer, &forged).await, other_key());
    // Nor is a key that may be a new one, while nobody can tell.
    cluster.set_down(true);
    advance(EVERY).await;
    assert_eq!(judge(&issuer, &forged).await, Verdict::Unknown);
    assert_eq!(judge(&issuer, &token).await, Verdict::Good);
}

#[tokio::test(start_paused = true)]
async fn callers_share_a_fetch_and_it_goes_on_when_they_wait_no_longer() {
    let cluster = FakeCluster::new();
    cluster.set_latency(Duration::from_millis(300));
    let (issuer, token) = (Issuer::new(cluster.client()), cluster.token());
    let begun = Instant::now();
    let verdicts = futures::future::join_all((0..8).map(|_| judge(&issuer, &token))).await;
    assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Unknown), "{verdicts:?}");
    assert_eq!(begun.elapsed(), WAIT_TIMEOUT);
    assert_eq!(judge(&issuer, &token).await, Verdict::Good);
    assert_eq!((begun.elapsed(), cluster.key_fetches()), (Duration::from_millis(600), 1));
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_hangs_is_given_up_and_another_one_begun() {
    let cluster = FakeCluster::new();
    cluster.set_latency(Duration::from_hours(1));
    let (issuer, token) = (Issuer::new(cluster.client()), cluster.token());
    issuer.prepare();
    sleep(Duration::from_secs(9)).await;
    assert_eq!(judge(&issuer, &token).await, Verdict::Unknown);
    cluster.set_latency(Duration::ZERO);
    assert_eq!((judge(&issuer, &token).await, cluster.key_fetches()), (Verdict::Unknown, 1));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((judge(&issuer, &token).await, cluster.key_fetches()), (Verdict::Good, 2));
}
