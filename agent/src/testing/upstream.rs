//! A fake of everything that the credential cache calls, in virtual time: the test sets how it responds, and every call is
//! recorded.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::{Instant, sleep};

use crate::{
    credentials::{
        Clock, Credentials, Error, Role, ServiceError,
        aws::eks_auth::Assumed,
        source::CredentialSource,
        token::{
            Verdict,
            claims::{Claims, SentToken},
        },
    },
    identity::{Pod, PodUid, ServiceAccountRef},
    secret::Secret,
    testing::claims,
};

/// How EKS Auth answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// With credentials.
    Fair,
    /// Connections are refused.
    Down,
    /// Connections are accepted, and nothing comes.
    Hangs,
    /// With this error: status and code.
    Says(u16, &'static str),
}

/// How every later call is answered.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// How EKS Auth answers.
    pub weather: Weather,
    /// How long a response takes.
    pub latency: Duration,
    /// How long issued credentials are valid.
    pub life: SignedDuration,
    /// How many of a thousand calls fail with a 500, chosen at random from `seed`.
    pub errors_per_mille: u64,
    /// Seed of those random numbers.
    pub seed: u64,
    /// How many calls a second are let through; the others are throttled.
    pub throttle: Option<f64>,
    /// `Retry-After` of throttled calls, in whole seconds.
    pub retry_after: Option<Duration>,
    /// Whether the API server gives tokens.
    pub api_server: bool,
    /// How long one takes. It is cached until EKS Auth refuses it.
    pub token_latency: Duration,
    /// Whether EKS Auth refuses the tokens that the API server issues from now on.
    pub bad_tokens: bool,
    /// How long verifying a caller's token takes.
    pub judging: Duration,
    /// The verdict on callers' tokens.
    pub verdict: Verdict,
}

/// A call to EKS Auth.
#[derive(Clone, Debug)]
pub struct Call {
    /// For which pod.
    pub pod: PodUid,
    /// When it came.
    pub at: Timestamp,
    /// When it came, by the monotonic clock.
    pub came: Instant,
    /// Whether another call for the same pod was in flight then.
    pub overlaps: bool,
    /// When it was answered with credentials, if it was, by the monotonic clock.
    pub served_at: Option<Instant>,
}

/// The fake.
pub struct FakeUpstream {
    clock: Clock,
    state: Mutex<State>,
}

struct State {
    conditions: Conditions,
    calls: Vec<Call>,
    spans: Vec<Span>,
    cached_tokens: HashMap<PodUid, (ServiceAccountRef, Secret)>,
    token_requests: usize,
    bad_tokens: usize,
    tokens: f64,
    filled_at: Timestamp,
}

/// A call, or a request for a token.
struct Span {
    pod: PodUid,
    is_call: bool,
    from: Instant,
    until: Option<Instant>,
}

/// Ends the span of this number when dropped.
struct UnderWay<'a>(&'a FakeUpstream, usize);

// === impl Conditions ===

impl Default for Conditions {
    fn default() -> Self {
        Self {
            weather: Weather::Fair,
            latency: Duration::from_millis(50),
            life: SignedDuration::from_hours(6),
            errors_per_mille: 0,
            seed: 1,
            throttle: None,
            retry_after: None,
            api_server: true,
            token_latency: Duration::ZERO,
            bad_tokens: false,
            judging: Duration::ZERO,
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
            spans: Vec::new(),
            cached_tokens: HashMap::new(),
            token_requests: 0,
            bad_tokens: 0,
            tokens: 1.0,
            filled_at,
        };
        Arc::new(Self { clock, state: Mutex::new(state) })
    }

    /// Changes the conditions.
    pub fn change(&self, change: impl FnOnce(&mut Conditions)) {
        change(&mut self.lock().conditions);
    }

    /// Every call so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// Calls that came while another for the same pod was in flight.
    pub fn overlaps(&self) -> usize {
        self.lock().calls.iter().filter(|call| call.overlaps).count()
    }

    /// How many calls and token requests were in flight for a pod at that time.
    pub fn under_way(&self, pod: PodUid, at: Instant) -> usize {
        let is_it =
            |span: &&Span| span.pod == pod && span.from <= at && span.until.is_none_or(|until| at <= until);
        self.lock().spans.iter().filter(is_it).count()
    }

    /// Calls with a token of no pod, which are refused.
    pub fn bad_tokens(&self) -> usize {
        self.lock().bad_tokens
    }

    /// How often the API server was asked for a token.
    pub fn token_requests(&self) -> usize {
        self.lock().token_requests
    }

    fn arrive(&self, pod: PodUid) -> (usize, Conditions, bool, UnderWay<'_>) {
        let now = (self.clock)();
        let under_way = self.begin(pod, true);
        let mut state = self.lock();
        let calls = state.spans.iter().filter(|span| span.is_call && span.pod == pod && span.until.is_none());
        let overlaps = calls.count() > 1;
        state.calls.push(Call { pod, at: now, came: Instant::now(), overlaps, served_at: None });
        let throttled = state.conditions.throttle.is_some_and(|rate| !state.take(rate, now));
        (state.calls.len(), state.conditions.clone(), throttled, under_way)
    }

    fn begin(&self, pod: PodUid, is_call: bool) -> UnderWay<'_> {
        let mut state = self.lock();
        state.spans.push(Span { pod, is_call, from: Instant::now(), until: None });
        UnderWay(self, state.spans.len() - 1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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
        self.0.lock().spans[self.1].until = Some(Instant::now());
    }
}

impl CredentialSource for Arc<FakeUpstream> {
    fn verify<'a>(&'a self, token: &'a Secret, _: &'a Claims) -> BoxFuture<'a, Verdict> {
        Box::pin(async {
            let Conditions { judging, verdict, .. } = self.lock().conditions.clone();
            if !judging.is_zero() {
                sleep(judging).await;
            }
            let is_genuine = owner(token).is_some();
            if verdict == Verdict::Valid && !is_genuine {
                return Verdict::Invalid("its signature is wrong".to_owned());
            }
            verdict
        })
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async {
            let cached = self.lock().cached_tokens.get(&pod.uid).cloned();
            if let Some((_, token)) = cached.filter(|(account, _)| *account == pod.service_account) {
                return Ok(token);
            }
            let (conditions, number) = {
                let mut state = self.lock();
                state.token_requests += 1;
                (state.conditions.clone(), state.token_requests)
            };
            if !conditions.token_latency.is_zero() {
                let _under_way = self.begin(pod.uid, false);
                sleep(conditions.token_latency).await;
            }
            if !conditions.api_server {
                return Err(Error::Token { reason: "the API server is unavailable".to_owned() });
            }
            let bad = || Secret::from(format!("bad{number}"));
            let token = if conditions.bad_tokens { bad() } else { token_of(pod) };
            self.lock().cached_tokens.insert(pod.uid, (pod.service_account.clone(), token.clone()));
            Ok(token)
        })
    }

    fn reject_token<'a>(&'a self, uid: PodUid, token: &'a Secret) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.lock().cached_tokens.retain(|of, (_, cached)| *of != uid || cached != token);
        })
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(async {
            let invalid = || {
                self.lock().bad_tokens += 1;
                says(400, "InvalidTokenException", None)
            };
            let (uid, account) = owner(token).ok_or_else(invalid)?;
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
            if drawn(conditions.seed, call) % 1000 < conditions.errors_per_mille {
                return Err(says(500, "InternalServerException", None));
            }
            let (namespace, name) = account.split_once('/').ok_or_else(invalid)?;
            let now = (self.clock)();
            self.lock().calls[call - 1].served_at = Some(Instant::now());
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

    fn remove_pod(&self, uid: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.lock().cached_tokens.remove(&uid);
        })
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

/// The token of a pod that this fake accepts.
pub fn token_of(pod: &Pod) -> Secret {
    Secret::from(format!("{} {}", pod.uid, pod.service_account))
}

/// The pod and the service account of a token, if it has one.
fn owner(token: &Secret) -> Option<(PodUid, &str)> {
    let (uid, account) = token.expose().split_once(' ')?;
    Some((PodUid::parse(uid)?, account))
}

/// The same, sent by a caller.
pub fn sent_by(pod: &Pod) -> SentToken {
    SentToken { token: token_of(pod), claims: claims(pod.uid) }
}

/// Whether these credentials were issued for this pod.
pub fn are_of(credentials: &Credentials, uid: PodUid) -> bool {
    credentials.access_key_id.split(' ').next() == Some(&uid.to_string())
}

/// The random number of a call (`SplitMix64`).
fn drawn(seed: u64, call: usize) -> u64 {
    let apart = seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mut mixed = apart.wrapping_add(call as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn says(status: u16, code: &str, retry_after: Option<Duration>) -> Error {
    Error::Service(ServiceError {
        status,
        code: code.to_owned(),
        message: "said the fake".to_owned(),
        request_id: "r".to_owned(),
        retry_after,
    })
}
