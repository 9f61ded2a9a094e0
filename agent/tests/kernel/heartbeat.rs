//! The heartbeat waits for nothing: neither for the owner of the interceptor, nor for whoever has locked the pins.

use std::{fs::File, sync::Arc, time::Duration};

use agent::{
    intercept::{Counters, Error, Heartbeat, Interceptor, InterceptorHandle, Standing},
    takeover::heartbeat_task,
};
use agent_common::{
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON, PodPolicy},
    target::HEARTBEAT_LIMIT_NS,
};
use rustix::fs::{FlockOperation, flock};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};

use crate::{
    IMDS, is_eperm,
    kernel_node::{Node, now_ns, own_pair},
};

const INTERCEPT: PodPolicy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
/// For how long the pins are locked.
const LOCKED: Duration = Duration::from_secs(5);
/// As old as a heartbeat may become that is written every 250 ms: twice that, and something for a busy machine.
const ON_TIME: Duration = Duration::from_millis(700);
/// As old as the programs let it become.
const LIMIT: Duration = Duration::from_nanos(HEARTBEAT_LIMIT_NS.cast_unsigned());

/// What was seen while the pins were locked.
struct Seen {
    oldest_heartbeat: Duration,
    slowest_counters: Duration,
    /// Whether a pod was refused.
    refused: bool,
    /// What each command answered, in order.
    answers: Vec<Vec<Result<(), Error>>>,
}

#[test]
fn heartbeat_is_on_time_while_the_pins_are_locked_for_5_s() {
    Node::run(|node| {
        let seen = lock_pins(node, |interceptor| {
            let heartbeat = interceptor.heartbeat().clone();
            tokio::spawn(heartbeat_task::run(move || heartbeat.write()))
        });
        assert!(seen.oldest_heartbeat < ON_TIME, "{:?}", seen.oldest_heartbeat);
        assert!(!seen.refused);
        assert!(seen.slowest_counters < Duration::from_millis(100), "{:?}", seen.slowest_counters);
        for answers in seen.answers {
            let (last, before) = answers.split_last().unwrap();
            assert!(matches!(before.first(), Some(Err(Error::Locked { .. }))), "it waited: {before:?}");
            assert!(last.is_ok(), "{last:?}");
        }
    });
}

#[test]
fn heartbeat_that_were_a_command_would_be_late() {
    Node::run(|node| {
        let seen = lock_pins(node, |interceptor| {
            tokio::spawn(async move {
                loop {
                    // Any command, which takes no lock itself.
                    interceptor.set_eks_agent(1, true).await.unwrap();
                    interceptor.heartbeat().write().unwrap();
                    sleep(Duration::from_millis(250)).await;
                }
            })
        });
        assert!(seen.oldest_heartbeat > LIMIT, "{:?}", seen.oldest_heartbeat);
        assert!(seen.refused);
    });
}

/// Gives the owner commands of four callers at a time, while somebody else has locked the pins.
fn lock_pins(
    node: &mut Node,
    write_heartbeats: impl FnOnce(Arc<InterceptorHandle>) -> JoinHandle<()>,
) -> Seen {
    let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
    let _agent = node.agent();
    let interceptor = Interceptor::load(&node.settings()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let interceptor = Arc::new(InterceptorHandle::spawn(interceptor).unwrap());
        interceptor.set_policy(pod.cgroup.id, INTERCEPT).await.unwrap();
        interceptor.take_over(own_pair(), Vec::new()).await.unwrap();
        let writing = write_heartbeats(Arc::clone(&interceptor));
        sleep(Duration::from_millis(300)).await;

        let pins = File::open(node.bpffs().join("podgate")).unwrap();
        flock(&pins, FlockOperation::LockExclusive).unwrap();
        let mut callers = JoinSet::new();
        for id in 0..4 {
            callers.spawn(until_it_works(Arc::clone(&interceptor), 1_000_000 + id));
        }
        let (mut oldest_heartbeat, mut slowest_counters, mut refused) =
            (Duration::ZERO, Duration::ZERO, false);
        let until = Instant::now() + LOCKED;
        while Instant::now() < until {
            oldest_heartbeat = oldest_heartbeat.max(node.heartbeat_age());
            slowest_counters = slowest_counters.max(time_of(interceptor.counters()));
            refused |= is_eperm(&pod.connect(IMDS));
            sleep(Duration::from_millis(20)).await;
        }
        drop(pins);
        let answers = callers.join_all().await;
        writing.abort();
        Seen { oldest_heartbeat, slowest_counters, refused, answers }
    })
}

/// As the reconciler does it: again, until the kernel has the policy.
async fn until_it_works(interceptor: Arc<InterceptorHandle>, pod: u64) -> Vec<Result<(), Error>> {
    let mut answers = Vec::new();
    while !matches!(answers.last(), Some(Ok(()))) {
        answers.push(interceptor.set_policy(pod, INTERCEPT).await);
    }
    answers
}

fn time_of(counters: &Counters) -> Duration {
    let start = Instant::now();
    counters.read().unwrap();
    start.elapsed()
}

#[test]
fn agent_that_has_stopped_or_is_superseded_writes_no_heartbeat() {
    Node::run(|node| {
        let own = node.interceptor.heartbeat();
        node.set_heartbeat(1);
        assert_eq!(own.standing().unwrap(), Standing::Active, "a look");
        assert_eq!(node.heartbeat(), 1, "writes nothing");
        assert_eq!(own.write().unwrap(), Standing::Active);
        assert!(node.heartbeat() > 1);

        let mut successor = Interceptor::load(&node.settings()).unwrap();
        successor.take_over(own_pair(), &[]).unwrap();
        node.set_heartbeat(1);
        assert!(matches!(own.write().unwrap(), Standing::Superseded { .. }));
        assert_eq!(node.heartbeat(), 1, "it is another's");

        let others = successor.heartbeat();
        let written = heartbeats_written(&others, || successor.stop().unwrap());
        assert!(written > 0);
        assert_eq!(node.heartbeat(), 0, "no heartbeat that was under way undoes the stop");
        assert!(matches!(others.write().unwrap(), Standing::Superseded { .. }));
        assert_eq!(node.heartbeat(), 0);
        node.interceptor.take_over(own_pair(), &[]).unwrap();
        assert_eq!(own.write().unwrap(), Standing::Active);
        assert!(now_ns() - node.heartbeat() < 1_000_000_000);
    });
}

/// Writes the heartbeat as fast as it can while `work` is done, and a moment longer; how often it could.
fn heartbeats_written(heartbeat: &Heartbeat, work: impl FnOnce()) -> u32 {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let written = scope.spawn(|| {
            let mut written = 0;
            while !done.load(Relaxed) {
                written += u32::from(heartbeat.write().unwrap() == Standing::Active);
            }
            written
        });
        std::thread::sleep(Duration::from_millis(50));
        work();
        std::thread::sleep(Duration::from_millis(50));
        done.store(true, Relaxed);
        written.join().unwrap()
    })
}
