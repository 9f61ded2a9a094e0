//! Faults that are injected into the servers of the lab.
//!
//! Owns which request meets which fault. Never answers one: the servers word the errors as the real services do.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use tokio::sync::watch;

/// A server of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// The Kubernetes API server.
    KubeApi,
    /// EKS Auth.
    EksAuth,
    /// The node's instance metadata service.
    Imds,
}

/// What happens to a request instead of its proper answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The answer comes this much later. Combines with any other fault.
    Latency(Duration),
    /// An error in the service's own format.
    Error {
        /// HTTP status.
        status: u16,
        /// The service's name for it, such as `AccessDeniedException`.
        code: String,
        /// The text for people.
        message: String,
    },
    /// The service's throttling answer.
    Throttle {
        /// Value of `Retry-After`, in whole seconds.
        retry_after: Option<Duration>,
    },
    /// More requests than this many a second are throttled: a token bucket with room for one.
    Limit {
        /// Requests a second.
        per_second: f64,
    },
    /// The connection is closed without an answer; at ratio 1 every open connection is closed as well.
    Drop,
    /// The request is accepted and never answered; open watches send nothing more.
    Hang,
}

/// The switches. Clones share them; the default is healthy services.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    shared: Arc<Shared>,
}

/// What one request meets.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) delay: Duration,
    pub(crate) fault: Option<Fault>,
}

#[derive(Debug, Default)]
struct Shared {
    switches: Mutex<HashMap<Service, Switches>>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Switches {
    latency: Option<Switch>,
    failure: Option<Switch>,
    clock_offset: SignedDuration,
    cuts: u64,
}

#[derive(Debug)]
struct Switch {
    fault: Fault,
    ratio: f64,
    owed: f64,
    /// The bucket of a limit, and when it was filled.
    bucket: (f64, Instant),
}

// === impl Faults ===

impl Faults {
    /// Every request to `service` meets `fault` from now on. A latency combines with another fault; of the others
    /// the last one set counts.
    pub fn set(&self, service: Service, fault: Fault) {
        self.set_ratio(service, fault, 1.0);
    }

    /// Like [`Faults::set`] for a part of the requests, from 0 to 1, evenly spread: at 0.25 every fourth request.
    pub fn set_ratio(&self, service: Service, fault: Fault, ratio: f64) {
        self.change(service, |switches| {
            if fault == Fault::Drop && ratio >= 1.0 {
                switches.cuts += 1;
            }
            let switch = Some(Switch {
                ratio: ratio.clamp(0.0, 1.0),
                owed: 0.0,
                fault,
                bucket: (1.0, Instant::now()),
            });
            match switch {
                Some(Switch { fault: Fault::Latency(_), .. }) => switches.latency = switch,
                _ => switches.failure = switch,
            }
        });
    }

    /// `service` answers properly again, without delay. Its clock stays as it is set.
    pub fn clear(&self, service: Service) {
        self.change(service, |switches| (switches.latency, switches.failure) = (None, None));
    }

    /// `service` answers without delay again; another fault stays.
    pub fn clear_latency(&self, service: Service) {
        self.change(service, |switches| switches.latency = None);
    }

    /// `service` answers properly again; a latency stays.
    pub fn clear_failure(&self, service: Service) {
        self.change(service, |switches| switches.failure = None);
    }

    /// The wall clock of `service` is ahead of this machine's by `offset`, or behind it where that is negative.
    pub fn set_clock(&self, service: Service, offset: SignedDuration) {
        self.change(service, |switches| switches.clock_offset = offset);
    }

    /// What time it is to `service`.
    pub(crate) fn now(&self, service: Service) -> Timestamp {
        let all = self.shared.switches.lock();
        let offset = all.get(&service).map_or(SignedDuration::ZERO, |switches| switches.clock_offset);
        Timestamp::now().saturating_add(offset).unwrap_or(Timestamp::MAX)
    }

    /// Decides about the next request to `service`.
    pub(crate) fn next(&self, service: Service) -> Verdict {
        let mut all = self.shared.switches.lock();
        let Some(switches) = all.get_mut(&service) else { return Verdict::default() };
        let delay = match switches.latency.as_mut().and_then(Switch::next) {
            Some(Fault::Latency(delay)) => delay,
            _ => Duration::ZERO,
        };
        Verdict { delay, fault: switches.failure.as_mut().and_then(Switch::next) }
    }

    /// Resolves once the open connections to `service` are to be closed.
    pub(crate) fn cut(&self, service: Service) -> impl Future<Output = ()> + Send + use<> {
        let before = self.cuts(service);
        let faults = self.clone();
        async move { faults.until(|faults| faults.cuts(service) != before).await }
    }

    /// Resolves at once unless `service` hangs; then when it no longer does.
    pub(crate) async fn while_hanging(&self, service: Service) {
        self.until(|faults| !faults.hangs(service)).await;
    }

    fn change(&self, service: Service, change: impl FnOnce(&mut Switches)) {
        let mut all = self.shared.switches.lock();
        change(all.entry(service).or_default());
        drop(all);
        self.shared.changes.send_modify(|count| *count += 1);
    }

    async fn until(&self, condition: impl Fn(&Self) -> bool + Send) {
        let mut changes = self.shared.changes.subscribe();
        while !condition(self) && changes.changed().await.is_ok() {}
    }

    fn cuts(&self, service: Service) -> u64 {
        let all = self.shared.switches.lock();
        all.get(&service).map_or(0, |switches| switches.cuts)
    }

    fn hangs(&self, service: Service) -> bool {
        let all = self.shared.switches.lock();
        let failure = all.get(&service).and_then(|switches| switches.failure.as_ref());
        failure.is_some_and(|switch| switch.fault == Fault::Hang && switch.ratio >= 1.0)
    }
}

// === impl Switch ===

impl Switch {
    fn next(&mut self) -> Option<Fault> {
        self.owed += self.ratio;
        let hit = self.owed >= 1.0;
        if hit {
            self.owed -= 1.0;
        }
        match self.fault {
            Fault::Limit { per_second } => {
                let throttled = hit && !self.take(per_second);
                throttled.then_some(Fault::Throttle { retry_after: None })
            }
            _ => hit.then(|| self.fault.clone()),
        }
    }

    fn take(&mut self, per_second: f64) -> bool {
        let (tokens, filled_at) = &mut self.bucket;
        *tokens = (*tokens + filled_at.elapsed().as_secs_f64() * per_second).min(1.0);
        *filled_at = Instant::now();
        let is_there = *tokens >= 1.0;
        *tokens -= f64::from(u8::from(is_there));
        is_there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(faults: &Faults, requests: usize) -> usize {
        (0..requests).filter(|_| faults.next(Service::EksAuth).fault.is_some()).count()
    }

    #[test]
    fn a_ratio_hits_its_share_of_the_requests_and_no_other_service() {
        let faults = Faults::default();
        for (ratio, expected) in [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)] {
            faults.set_ratio(Service::EksAuth, Fault::Drop, ratio);
            assert_eq!(hits(&faults, 20), expected, "{ratio}");
            assert!(faults.next(Service::KubeApi).fault.is_none());
        }
    }

    #[test]
    fn a_limit_lets_so_many_a_second_through() {
        let faults = Faults::default();
        faults.set(Service::EksAuth, Fault::Limit { per_second: 20.0 });
        assert_eq!(hits(&faults, 10), 9);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(hits(&faults, 10), 9);
    }

    #[test]
    fn latency_combines_with_another_fault_until_both_are_cleared() {
        let faults = Faults::default();
        faults.set(Service::Imds, Fault::Latency(Duration::from_millis(7)));
        faults.set(Service::Imds, Fault::Hang);
        let verdict = faults.next(Service::Imds);
        assert_eq!(verdict.delay, Duration::from_millis(7));
        assert_eq!(verdict.fault, Some(Fault::Hang));
        faults.clear(Service::Imds);
        let verdict = faults.next(Service::Imds);
        assert_eq!((verdict.delay, verdict.fault), (Duration::ZERO, None));
    }

    #[test]
    fn latency_and_failure_are_cleared_one_without_the_other() {
        let faults = Faults::default();
        faults.set(Service::Imds, Fault::Latency(Duration::from_millis(7)));
        faults.set(Service::Imds, Fault::Drop);
        faults.clear_latency(Service::Imds);
        let verdict = faults.next(Service::Imds);
        assert_eq!((verdict.delay, verdict.fault), (Duration::ZERO, Some(Fault::Drop)));
        faults.clear_failure(Service::Imds);
        assert_eq!(faults.next(Service::Imds).fault, None);
    }

    #[test]
    fn each_service_has_a_clock_of_its_own() {
        let faults = Faults::default();
        faults.set_clock(Service::EksAuth, SignedDuration::from_hours(-1));
        let eks_auth = faults.now(Service::EksAuth);
        assert_eq!(faults.now(Service::KubeApi).duration_since(eks_auth).as_mins(), 60);
    }

    #[tokio::test]
    async fn a_short_drop_cuts_the_connections_that_were_open() {
        let faults = Faults::default();
        let cut = faults.cut(Service::KubeApi);
        faults.set(Service::KubeApi, Fault::Drop);
        faults.clear(Service::KubeApi);
        tokio::time::timeout(Duration::from_secs(5), cut).await.unwrap();
        let later = faults.cut(Service::KubeApi);
        tokio::time::timeout(Duration::from_millis(20), later).await.unwrap_err();
    }
}
