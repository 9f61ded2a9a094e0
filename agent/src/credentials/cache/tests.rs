use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use jiff::SignedDuration;

use super::*;
use crate::{
    credentials::Role,
    identity::ServiceAccountRef,
    testing::{claims, pod},
};

/// Answers each token `<namespace>/<service account>` after a while; counts.
#[derive(Default)]
struct FakeSource {
    calls: AtomicU64,
    takes: Duration,
    refuse: Mutex<Option<Error>>,
    answers_as: Mutex<Option<String>>,
    life: Option<SignedDuration>,
}

impl CredentialSource for Arc<FakeSource> {
    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async { Ok(Secret::from(pod.service_account.to_string())) })
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(async {
            let call = self.calls.fetch_add(1, SeqCst) + 1;
            tokio::time::sleep(self.takes).await;
            if let Some(error) = self.refuse.lock().unwrap().clone() {
                return Err(error);
            }
            let refused = || Error::Unreachable { reason: "no such token".into() };
            let subject = self.answers_as.lock().unwrap().clone().unwrap_or(token.expose().to_owned());
            let (namespace, name) = subject.split_once('/').ok_or_else(refused)?;
            let now = Timestamp::now();
            Ok(Assumed {
                service_account: ServiceAccountRef { namespace: namespace.into(), name: name.into() },
                credentials: Credentials {
                    access_key_id: format!("ASIA-{name}-{call}"),
                    secret_access_key: "s".into(),
                    session_token: "t".into(),
                    expiration: now + self.life.unwrap_or(SignedDuration::from_hours(6)),
                    obtained_at: now,
                    role: Role { account_id: "1".into(), partition: "aws".into(), name: name.into() },
                },
            })
        })
    }

    fn forget(&self, _: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

fn on_behalf(pod: &Arc<Pod>) -> Proof {
    Proof::OnBehalf(Arc::clone(pod))
}

fn soon() -> Instant {
    (tokio::time::Instant::now() + Duration::from_millis(800)).into_std()
}

fn engine(source: FakeSource) -> (Arc<FakeSource>, Arc<Engine<Arc<FakeSource>>>) {
    let source = Arc::new(source);
    (Arc::clone(&source), Arc::new(Engine::new(source)))
}

#[tokio::test]
async fn however_many_ask_one_call_is_made_and_shared() {
    let (source, engine) = engine(FakeSource { takes: Duration::from_millis(50), ..FakeSource::default() });
    let pod = Arc::new(pod("app", "web"));
    let ask = |_| {
        let (engine, pod) = (Arc::clone(&engine), Arc::clone(&pod));
        tokio::spawn(async move {
            engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.unwrap().access_key_id.clone()
        })
    };
    for answer in futures::future::join_all((0..32).map(ask)).await {
        assert_eq!(answer.unwrap(), "ASIA-web-1");
    }
    assert_eq!(source.calls.load(SeqCst), 1);
}

#[tokio::test]
async fn an_error_is_shared_and_not_kept() {
    let (source, engine) = engine(FakeSource { takes: Duration::from_millis(20), ..FakeSource::default() });
    *source.refuse.lock().unwrap() = Some(Error::Unreachable { reason: "x".into() });
    let pod = Arc::new(pod("app", "web"));
    let both = tokio::join!(
        engine.for_pod(pod.uid, on_behalf(&pod), soon()),
        engine.for_pod(pod.uid, on_behalf(&pod), soon())
    );
    assert!(both.0.is_err() && both.1.is_err());
    assert_eq!(source.calls.load(SeqCst), 1);
    *source.refuse.lock().unwrap() = None;
    assert!(engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.is_ok());
}

#[tokio::test]
async fn a_caller_who_gives_up_leaves_the_call_to_the_next_one() {
    let (source, engine) = engine(FakeSource { takes: Duration::from_millis(300), ..FakeSource::default() });
    let pod = Arc::new(pod("app", "web"));
    let at_once = Instant::now() + Duration::from_millis(20);
    assert!(matches!(engine.for_pod(pod.uid, on_behalf(&pod), at_once).await, Err(Error::Slow(_))));
    let hung_up = engine.for_pod(pod.uid, on_behalf(&pod), soon());
    assert!(tokio::time::timeout(Duration::from_millis(20), hung_up).await.is_err());
    assert!(engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.is_ok());
    assert_eq!(source.calls.load(SeqCst), 1);
}

#[tokio::test]
async fn each_pod_has_its_own_even_with_one_service_account() {
    let (_, engine) = engine(FakeSource::default());
    let (one, two) = (Arc::new(pod("app", "web")), Arc::new(pod("app", "web")));
    assert_ne!(one.uid, two.uid);
    let one = engine.for_pod(one.uid, on_behalf(&one), soon()).await.unwrap();
    let two = engine.for_pod(two.uid, on_behalf(&two), soon()).await.unwrap();
    assert_ne!(one.access_key_id, two.access_key_id);
}

#[tokio::test]
async fn an_answer_for_another_service_account_is_not_handed_out() {
    let (source, engine) = engine(FakeSource::default());
    *source.answers_as.lock().unwrap() = Some("app/other".into());
    let pod = Arc::new(pod("app", "web"));
    let answer = engine.for_pod(pod.uid, on_behalf(&pod), soon()).await;
    assert!(matches!(answer, Err(Error::BadAnswer { .. })), "{answer:?}");
}

#[tokio::test]
async fn a_forged_token_never_reaches_what_is_kept_for_its_pod() {
    let (source, engine) = engine(FakeSource::default());
    let pod = Arc::new(pod("app", "web"));
    engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.unwrap();
    let forged = engine.for_token("forged".into(), claims(pod.uid), soon()).await;
    assert!(forged.is_err());
    assert_eq!(source.calls.load(SeqCst), 2, "the forged token itself went to EKS Auth");
    // Nor does having tried once help.
    assert!(engine.for_token("forged".into(), claims(pod.uid), soon()).await.is_err());
}

#[tokio::test]
async fn a_token_that_was_accepted_once_is_served_from_the_cache() {
    let (source, engine) = engine(FakeSource::default());
    let pod = pod("app", "web");
    for _ in 0..3 {
        let answer = engine.for_token("app/web".into(), claims(pod.uid), soon()).await.unwrap();
        assert_eq!(answer.access_key_id, "ASIA-web-1");
    }
    assert_eq!(source.calls.load(SeqCst), 1);
}

#[tokio::test]
async fn what_is_due_is_fetched_again_and_what_is_forgotten_too() {
    let (source, engine) =
        engine(FakeSource { life: Some(SignedDuration::from_millis(400)), ..FakeSource::default() });
    let pod = Arc::new(pod("app", "web"));
    engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(250)).await;
    engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.unwrap();
    assert_eq!(source.calls.load(SeqCst), 2);
    engine.forget(pod.uid).await;
    engine.for_pod(pod.uid, on_behalf(&pod), soon()).await.unwrap();
    assert_eq!(source.calls.load(SeqCst), 3);
}
