//! Stands in for everything that the engine calls, in virtual time: what it answers and when is the test's to say, and
//! every call is remembered.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, sleep};

use crate::{
    credentials::{
        Credentials, Error, Role, ServiceError,
        eks_auth::Assumed,
        engine::Clock,
        issuer::Verdict,
        jwt::{Claims, SentToken},
        source::CredentialSource,
    },
    identity::{Pod, PodUid, ServiceAccountRef},
    secret::Secret,
    testing::claims,
};

/// How EKS Auth answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// As it should.
    Fair,
    /// Connections are refused.
    Down,
    /// Connections are accepted, and nothing comes.
    Hangs,
    /// With this error: status and code.
    Says(u16, &'static str),
}

/// What the engine meets from now on.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// How EKS Auth answers.
    pub weather: Weather,
    /// How long it takes for an answer.
    pub latency: Duration,
    /// How long what it issues is good for.
    pub life: SignedDuration,
    /// Of so many calls one fails, with a 500; 0 for none.
    pub error_every: usize,
    /// So many calls a second are let through, the others throttled.
    pub throttle: Option<f64>,
    /// What throttled calls are told to wait, in whole seconds.
    pub retry_after: Option<Duration>,
    /// Whether the API server gives tokens.
    pub api_server: bool,
    /// What is known of tokens that callers sent.
    pub verdict: Verdict,
}

/// A call of EKS Auth.
#[derive(Clone, Debug)]
pub struct Call {
    /// For which pod.
    pub pod: PodUid,
    /// When it came.
    pub at: Timestamp,
    /// When it was answered with credentials, if it was.
    pub served_at: Option<Timestamp>,
}

/// The double.
pub struct FakeUpstream {
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    conditions: Conditions,
    calls: Vec<Call>,
    under_way: HashMap<PodUid, u32>,
    overlaps: usize,
    tokens: f64,
    filled_at: Timestamp,
}

/// A call under way; it is over when this is dropped.
struct UnderWay<'a>(&'a FakeUpstream, PodUid);

// === impl Conditions ===

impl Default for Conditions {
    fn default() -> Self {
        Self {
            weather: Weather::Fair,
            latency: Duration::from_millis(50),
            life: SignedDuration::from_hours(6),
            error_every: 0,
            throttle: None,
            retry_after: None,
            api_server: true,
            verdict: Verdict::Unknown,
        }
    }
}

// === impl FakeUpstream ===

impl FakeUpstream {
    /// Good conditions, at the time of this clock.
    pub fn new(clock: Clock) -> Arc<Self> {
        let filled_at = clock();
        let state = State {
            conditions: Conditions::default(),
            calls: Vec::new(),
            under_way: HashMap::new(),
            overlaps: 0,
            tokens: 1.0,
            filled_at,
        };
        Arc::new(Self { clock, state: Mutex::new(state) })
    }

    /// Changes what the engine meets.
    pub fn change(&self, change: impl FnOnce(&mut Conditions)) {
        change(&mut self.lock().conditions);
    }

    /// Every call so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// Calls that came while another one for the same pod was under way.
    pub fn overlaps(&self) -> usize {
        self.lock().overlaps
    }

    fn arrive(&self, pod: PodUid) -> (usize, Conditions, bool, UnderWay<'_>) {
        let now = (self.clock)();
        let mut state = self.lock();
        state.calls.push(Call { pod, at: now, served_at: None });
        let under_way = state.under_way.entry(pod).or_default();
        *under_way += 1;
        state.overlaps += usize::from(*state.under_way.get(&pod).unwrap_or(&0) > 1);
        let throttled = state.conditions.throttle.is_some_and(|rate| !state.take(rate, now));
        (state.calls.len(), state.conditions.clone(), throttled, UnderWay(self, pod))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for FakeUpstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeUpstream").finish_non_exhaustive()
    }
}

impl State {
    /// A bucket with room for one call.
    fn take(&mut self, rate: f64, now: Timestamp) -> bool {
        let passed = now.duration_since(self.filled_at).as_secs_f64();
        self.tokens = (self.tokens + passed * rate).min(1.0);
        self.filled_at = now;
        let is_there = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(is_there));
        is_there
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(under_way) = self.0.lock().under_way.get_mut(&self.1) {
            *under_way -= 1;
        }
    }
}

impl CredentialSource for Arc<FakeUpstream> {
    fn judge<'a>(&'a self, _: &'a Secret, _: &'a Claims) -> BoxFuture<'a, Verdict> {
        Box::pin(async { self.lock().conditions.verdict.clone() })
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async {
            if !self.lock().conditions.api_server {
                return Err(Error::Token { reason: "the API server is away".to_owned() });
            }
            Ok(token_of(pod))
        })
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(async {
            let invalid = || says(400, "InvalidTokenException", None);
            let (uid, account) = token.expose().split_once(' ').ok_or_else(invalid)?;
            let uid = PodUid::parse(uid).ok_or_else(invalid)?;
            let (call, conditions, throttled, _under_way) = self.arrive(uid);
            if throttled {
                return Err(says(429, "ThrottlingException", conditions.retry_after));
            }
            match conditions.weather {
                Weather::Down => return Err(Error::Unreachable { reason: "connection refused".to_owned() }),
                Weather::Hangs => std::future::pending().await,
                Weather::Fair | Weather::Says(..) => sleep(conditions.latency).await,
            }
            if let Weather::Says(status, code) = conditions.weather {
                return Err(says(status, code, None));
            }
            if conditions.error_every > 0 && call.is_multiple_of(conditions.error_every) {
                return Err(says(500, "InternalServerException", None));
            }
            let (namespace, name) = account.split_once('/').ok_or_else(invalid)?;
            let now = (self.clock)();
            self.lock().calls[call - 1].served_at = Some(now);
            Ok(Assumed {
                service_account: ServiceAccountRef { namespace: namespace.into(), name: name.into() },
                credentials: Credentials {
                    access_key_id: format!("{uid} {call}"),
                    secret_access_key: "secret".into(),
                    session_token: "session".into(),
                    expiration: now + conditions.life,
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

/// A clock that follows tokio's, which tests pause.
pub fn virtual_clock() -> Clock {
    let begun = Instant::now();
    Arc::new(move || {
        let passed = SignedDuration::try_from(begun.elapsed()).unwrap_or(SignedDuration::MAX);
        Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 365 * 50) + passed
    })
}

/// The token of a pod as this double takes it.
pub fn token_of(pod: &Pod) -> Secret {
    Secret::from(format!("{} {}", pod.uid, pod.service_account))
}

/// The same, sent by a caller.
pub fn sent_by(pod: &Pod) -> SentToken {
    SentToken { token: token_of(pod), claims: claims(pod.uid) }
}

/// Whether these were issued for this pod.
pub fn are_of(credentials: &Credentials, uid: PodUid) -> bool {
    credentials.access_key_id.split(' ').next() == Some(&uid.to_string())
}

fn says(status: u16, code: &str, retry_after: Option<Duration>) -> Error {
    Error::Service(ServiceError {
        status,
        code: code.to_owned(),
        message: "said the double".to_owned(),
        request_id: "r".to_owned(),
        retry_after,
    })
}
