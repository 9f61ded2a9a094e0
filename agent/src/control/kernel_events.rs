//! Logs what the kernel decided by itself: who still uses the node's role, who was refused and why.
//!
//! Owns the log lines and their rate, because pods decide how often the kernel reports; never decides anything about a
//! pod.

use std::{
    collections::HashMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use agent_common::{counter::Counter, event::Event};
use futures::{Stream, StreamExt as _};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::{
    credentials::source::CredentialSource,
    identity::{Pod, PodUid},
    intercept::{self, DebugLog},
    log_limit::LogLimit,
    serve::{self, Server},
};

/// Each pod has one line of each kind per interval; the next line counts the rest.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Most limits that are remembered. Past that all are dropped, and some lines come early.
const MAX_ENTRIES: usize = 8192;
/// After a failure to read.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// A limit for each pod and kind of event.
#[derive(Debug, Default)]
struct EventLimits(HashMap<(u64, u32), LogLimit>);

/// Logs the kernel's events until shutdown. `unanswered` is told of networks, by their cookies, in which nothing has answered
/// a pod.
pub(crate) async fn run<S: CredentialSource>(
    mut events: impl Stream<Item = Result<(Counter, Event), intercept::Error>> + Unpin,
    server: Arc<Server<S>>,
    unanswered: watch::Sender<u64>,
) {
    let mut limits = EventLimits::default();
    while let Some(event) = events.next().await {
        match event {
            Ok((counter, event)) => {
                if matches!(counter, Counter::Unanswered) && event.address.is_loopback() {
                    unanswered.send_replace(event.netns_cookie);
                }
                if let Some(suppressed) = limits.admit(counter, &event, Instant::now()) {
                    log(counter, &event, suppressed, &server);
                }
            }
            Err(error) => {
                error!(%error, "cannot read the kernel's events");
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }
}

/// Copies the programs' debug log into the agent's until shutdown, on a thread of its own: pods decide how much of it
/// there is.
pub(crate) fn copy_debug_log(log: DebugLog) {
    thread::spawn(move || {
        let error = log.run();
        error!(%error, "cannot read the programs' debug log any more");
    });
}

// === impl EventLimits ===

impl EventLimits {
    /// Whether an event is to be logged: then, how many like it were suppressed since the last one.
    fn admit(&mut self, counter: Counter, event: &Event, now: Instant) -> Option<u64> {
        if self.0.len() > MAX_ENTRIES {
            self.0.clear();
        }
        let cgroup_id = if event.pod_cgroup_id == 0 { event.cgroup_id } else { event.pod_cgroup_id };
        let limit =
            self.0.entry((cgroup_id, counter as u32)).or_insert_with(|| LogLimit::new(1, LOG_INTERVAL));
        limit.admit(now)
    }
}

fn log<S: CredentialSource>(counter: Counter, event: &Event, suppressed: u64, server: &Server<S>) {
    let uid = server.resolver.source_pod(event.cgroup_id).ok().map(|source_pod| source_pod.uid);
    let pod = uid.and_then(|uid| server.resolver.known(uid));
    let uid = uid.map(|uid: PodUid| tracing::field::display(uid));
    let name = pod.as_deref().map(Pod::full_name);
    let process = serve::process_label(&event.comm, event.tgid);
    let (address, reason) = (event.address, counter.label());
    match counter {
        Counter::Audited => {
            info!(target: "audit", process, ?address, suppressed, pod.uid = uid, pod.name = name,
                "a pod connected to the node's own metadata service");
        }
        Counter::Unanswered if event.address.is_loopback() => {
            warn!(target: "kernel", reason, process, ?address, suppressed, pod.uid = uid, pod.name = name,
                "nothing answered a pod's connection attempt on its own loopback: it is down, or rules in the pod's network drop \
                 what is sent there (`nft list ruleset` in it tells)");
        }
        Counter::Unanswered => {
            let (ip, port) = (address.ip(), address.port.get());
            warn!(target: "kernel", reason, process, ?address, suppressed, pod.uid = uid, pod.name = name,
                "nothing answered a pod's connection attempt: a network policy or firewall drops it (allow {ip} port {port}), or \
                 the agent hangs");
        }
        Counter::AuditedCredentials | Counter::AuditedUserData | Counter::AuditedOther => {
            info!(target: "audit", requested = requested(counter), ?address, suppressed, pod.uid = uid, pod.name = name,
                "a pod sent a request to the node's own metadata service");
        }
        Counter::EgressDropped => {
            warn!(target: "kernel", reason, ?address, suppressed, pod.uid = uid, pod.name = name,
                "dropped a packet of a pod that belongs to no connection which the programs know");
        }
        Counter::FenceDropped => {
            warn!(target: "kernel", reason, ?address, suppressed, pod.uid = uid, pod.name = name,
                "dropped a packet to IMDS as it left the node: a pod translates addresses, or a Service has IMDS for an \
                 endpoint; without a pod's name, one behind a netdev that is no pod's");
        }
        _ => {
            warn!(target: "kernel", reason, process, ?address, suppressed, pod.uid = uid, pod.name = name,
                "the kernel refused or questioned a connection attempt");
        }
    }
}

/// What a pod in mode `audit` requested.
fn requested(counter: Counter) -> &'static str {
    match counter {
        Counter::AuditedCredentials => "credentials",
        Counter::AuditedUserData => "user-data",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(pod_cgroup_id: u64, cgroup_id: u64) -> Event {
        Event {
            cgroup_id,
            pod_cgroup_id,
            netns_cookie: 0,
            at_ns: 0,
            address: agent_common::net::Endpoint::NONE,
            kind: 0,
            tgid: 0,
            tid: 0,
            comm: [0; 16],
        }
    }

    #[test]
    fn a_repeating_pod_has_one_line_a_second_and_others_have_theirs() {
        let (mut limits, now) = (EventLimits::default(), Instant::now());
        assert_eq!(limits.admit(Counter::Denied, &event(1, 10), now), Some(0));
        for _ in 0..5 {
            assert_eq!(limits.admit(Counter::Denied, &event(1, 11), now), None, "another container of it");
        }
        assert_eq!(limits.admit(Counter::Audited, &event(1, 10), now), Some(0), "another kind");
        assert_eq!(limits.admit(Counter::Denied, &event(2, 20), now), Some(0), "another pod");
        assert_eq!(limits.admit(Counter::Denied, &event(0, 30), now), Some(0), "a pod without a policy yet");
        assert_eq!(limits.admit(Counter::Denied, &event(1, 10), now + LOG_INTERVAL), Some(5));
        assert_eq!(limits.admit(Counter::Denied, &event(1, 10), now + 2 * LOG_INTERVAL), Some(0));
    }
}
