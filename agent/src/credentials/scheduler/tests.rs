use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::{anonymous::FETCHES_PER_ADDRESS, *};
use crate::{credentials::freshness, testing::pod_uid};

const START: Timestamp = Timestamp::UNIX_EPOCH;
const BUDGET: Budget = Budget { per_second: 10.0, burst: 20.0 };

fn secs(seconds: i64) -> SignedDuration {
    SignedDuration::from_secs(seconds)
}

/// The scheduler, and fetches that take as long and end as the test says.
struct World {
    scheduler: Scheduler,
    now: Timestamp,
    takes: SignedDuration,
    ends: Box<dyn FnMut(Key, Timestamp) -> Outcome>,
    under_way: BTreeMap<(Timestamp, u64), Key>,
    begun: Vec<(Timestamp, Key, Priority)>,
    lives: HashMap<Key, Life>,
    dropped: HashSet<Key>,
}

impl World {
    fn new(ends: impl FnMut(Key, Timestamp) -> Outcome + 'static) -> Self {
        Self {
            scheduler: Scheduler::new(BUDGET, 7, START),
            now: START,
            takes: SignedDuration::from_millis(50),
            ends: Box::new(ends),
            under_way: BTreeMap::new(),
            begun: Vec::new(),
            lives: HashMap::new(),
            dropped: HashSet::new(),
        }
    }

    fn ask(&mut self, uid: PodUid) -> Answer {
        let answer = self.scheduler.ask(Key::Pod(uid), FairnessKey::Pod(uid), self.now);
        self.act();
        answer
    }

    /// As an anonymous caller with a token.
    fn ask_from(&mut self, address: u32, token: u32) -> Answer {
        let mut digest = [0; 32];
        digest[..4].copy_from_slice(&token.to_be_bytes());
        let fairness_key = FairnessKey::Address(std::net::Ipv4Addr::from_bits(address).into());
        let answer = self.scheduler.ask(Key::Token(digest), fairness_key, self.now);
        self.act();
        answer
    }

    fn act(&mut self) {
        while let Some(action) = self.scheduler.next(self.now) {
            match action {
                Action::Fetch(key, priority) => {
                    assert!(!self.under_way.values().any(|other| *other == key), "two fetches for {key:?}");
                    self.begun.push((self.now, key, priority));
                    self.under_way.insert((self.now + self.takes, self.begun.len() as u64), key);
                }
                Action::Evict(key) => {
                    self.dropped.insert(key);
                }
            }
        }
    }

    /// Lets time pass, with everything that happens meanwhile.
    fn pass(&mut self, time: SignedDuration) {
        let until = self.now + time;
        loop {
            let completes_at = self.under_way.first_key_value().map(|((at, _), _)| *at);
            let wake_at = self.scheduler.wake_at().map(|at| at.max(self.now));
            let Some(next) = [completes_at, wake_at].into_iter().flatten().min().filter(|at| *at <= until)
            else {
                break;
            };
            self.now = next;
            while let Some(fetch) = self.under_way.first_entry()
                && fetch.key().0 <= self.now
            {
                let key = fetch.remove();
                let outcome = (self.ends)(key, self.now);
                if let Outcome::Received(life) = outcome {
                    self.lives.insert(key, life);
                }
                self.scheduler.completed(key, outcome, self.now);
            }
            self.act();
        }
        self.now = until;
    }

    fn calls_of(&self, uid: PodUid) -> usize {
        self.begun.iter().filter(|(_, key, _)| *key == Key::Pod(uid)).count()
    }
}

fn lives(minutes: i64) -> impl FnMut(Key, Timestamp) -> Outcome {
    move |_, now| {
        Outcome::Received(Life { obtained_at: now, expiration: now + SignedDuration::from_mins(minutes) })
    }
}

#[test]
fn used_credentials_are_refreshed_and_unused_ones_lapse() {
    let mut world = World::new(lives(360));
    let [busy, idle] = [pod_uid(), pod_uid()];
    world.ask(busy);
    world.ask(idle);
    for _ in 0..96 {
        world.pass(SignedDuration::from_mins(15));
        world.scheduler.asked(Key::Pod(busy), world.now);
    }
    // Credentials used once are refreshed once.
    assert_eq!(world.calls_of(idle), 2);
    assert!(world.dropped.contains(&Key::Pod(idle)) && !world.dropped.contains(&Key::Pod(busy)));
    let calls = world.calls_of(busy);
    assert!((5..=9).contains(&calls), "a day of six-hour credentials: {calls}");
}

#[test]
fn credentials_used_again_after_a_lapse_are_refreshed() {
    let mut world = World::new(lives(360));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(SignedDuration::from_mins(500));
    let before = world.calls_of(uid);
    assert_eq!(before, 2, "refreshed once, and lapsing");
    world.scheduler.asked(Key::Pod(uid), world.now);
    world.act();
    assert_eq!(world.begun.last().map(|(_, _, priority)| *priority), Some(Priority::Refresh));
}

#[test]
fn refusals_are_remembered_longer_and_longer() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    let mut after = Vec::new();
    for _ in 0..36_000 {
        world.ask(uid);
        world.pass(SignedDuration::from_millis(100));
        after.push(world.calls_of(uid));
    }
    assert!(after[599] <= 4, "in the first minute: {}", after[599]);
    let (half, hour) = (after[17_999], after[35_999]);
    assert!(hour - half <= 8, "in the second half hour: {}", hour - half);
    // Another pod starts clean, whatever its service account.
    assert!(matches!(world.ask(pod_uid()), Answer::Joined { likely: true }));
}

#[test]
fn one_lost_answer_is_retried_before_any_caller_sees_it() {
    let mut calls = 0;
    let mut world = World::new(move |_, now| {
        calls += 1;
        if calls == 1 { Outcome::Failed(Failure::Outage) } else { lives(360)(Key::Pod(pod_uid()), now) }
    });
    let uid = pod_uid();
    world.ask(uid);
    world.pass(SignedDuration::from_millis(250));
    assert!(world.lives.contains_key(&Key::Pod(uid)));
    assert_eq!(world.calls_of(uid), 2);
}

#[test]
fn an_open_circuit_probes_every_two_seconds() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Outage));
    let pods: Vec<_> = (0..50).map(|_| pod_uid()).collect();
    for _ in 0..600 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.eks_auth_is_unavailable());
    let late = world.begun.iter().filter(|(at, ..)| *at > START + secs(30)).count();
    assert!((15..=21).contains(&late), "in thirty seconds: {late}");
    assert!(matches!(world.ask(pod_uid()), Answer::Joined { likely: false }));
}

#[test]
fn pods_without_a_token_do_not_affect_others() {
    let good = pod_uid();
    let mut world = World::new(move |key, now| {
        if key == Key::Pod(good) { lives(360)(key, now) } else { Outcome::Failed(Failure::NoToken) }
    });
    for _ in 0..200 {
        for _ in 0..5 {
            world.ask(pod_uid());
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.ask(good);
    world.pass(SignedDuration::from_millis(200));
    assert!(world.lives.contains_key(&Key::Pod(good)));
}

#[test]
fn a_prefetch_comes_last_and_is_promoted_when_its_pod_asks() {
    let mut world = World::new(lives(360));
    world.takes = secs(1);
    let pods: Vec<_> = (0..40).map(|_| pod_uid()).collect();
    for uid in &pods {
        world.scheduler.prefetch(*uid, world.now);
    }
    world.act();
    let last = pods[39];
    world.ask(last);
    assert_eq!(world.begun.last(), Some(&(START, Key::Pod(last), Priority::Foreground)));
    world.pass(secs(60));
    assert!(pods.iter().all(|uid| world.calls_of(*uid) == 1));
}

#[test]
fn each_anonymous_address_has_its_own_few_fetches() {
    let mut scheduler = Scheduler::new(BUDGET, 7, START);
    let mut ask = |digest: u8, last: u8| {
        scheduler.ask(Key::Token([digest; 32]), FairnessKey::Address([10, 0, 0, last].into()), START)
    };
    let answers: Vec<_> = (0..10).map(|digest| ask(digest, 1)).collect();
    assert_eq!(answers.iter().filter(|answer| **answer == Answer::Busy).count(), 10 - FETCHES_PER_ADDRESS);
    assert!(matches!(ask(99, 2), Answer::Joined { .. }));
    assert!(matches!(ask(0, 1), Answer::Joined { .. }), "the same token again");
}

#[test]
fn forged_tokens_get_a_few_calls_a_minute_and_disturb_nobody() {
    let mut world = World::new(|key, now| match key {
        Key::Token([_, _, _, 0, ..]) => lives(360)(key, now),
        _ => Outcome::Failed(Failure::Refused),
    });
    let (forger, mut token) = (0x0a00_0001, 1);
    let calls_until = |world: &World, minute: i64| {
        let end = START + SignedDuration::from_mins(minute);
        world.begun.iter().filter(|(at, ..)| *at < end).count()
    };
    for _ in 0..36_000 {
        world.ask_from(forger, token);
        // The last byte decides whether EKS Auth accepts it.
        token = (token + 1) | 1;
        world.pass(SignedDuration::from_millis(100));
    }
    let [first, half, hour] = [1, 30, 60].map(|minute| calls_until(&world, minute));
    assert!((2..=FETCHES_PER_ADDRESS + 2).contains(&first), "in the first minute: {first}");
    assert!(hour - half <= 8, "in the second half hour: {}", hour - half);
    assert!(
        matches!(world.ask_from(0x0a00_0002, 0x0100), Answer::Joined { likely: true }),
        "at another address"
    );
    assert!(world.scheduler.entries.len() <= 20, "{}", world.scheduler.entries.len());
}

#[test]
fn a_good_token_clears_its_address() {
    let mut world = World::new(|key, now| match key {
        Key::Token([_, _, _, 0, ..]) => lives(360)(key, now),
        _ => Outcome::Failed(Failure::Refused),
    });
    world.ask_from(1, 1);
    world.pass(secs(1));
    assert_eq!(world.ask_from(1, 0x0100), Answer::Busy, "one was refused a moment ago");
    world.pass(secs(10));
    for token in 2..6 {
        assert!(matches!(world.ask_from(1, token << 8), Answer::Joined { likely: true }), "{token}");
        world.pass(secs(1));
    }
}

#[test]
fn however_many_addresses_send_forged_tokens_the_next_has_room() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    world.scheduler = Scheduler::new(Budget { per_second: 1e6, burst: 1e6 }, 7, START);
    for address in 0..600 {
        let tokens = if address == 0 { 3 } else { 1 };
        for token in 0..tokens {
            let answer = world.ask_from(address, address << 8 | token << 4 | 1);
            assert!(matches!(answer, Answer::Joined { .. }), "{address} {token}: {answer:?}");
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.entries.len() <= 513, "{}", world.scheduler.entries.len());
    assert!(!world.dropped.is_empty());
}

#[test]
fn after_refusals_a_caller_waits_for_the_call_that_is_under_way() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    for _ in 0..3 {
        assert_eq!(world.ask(uid), Answer::Joined { likely: true });
        world.pass(SignedDuration::from_millis(100));
        assert_eq!(world.ask(uid), Answer::Refused);
        world.pass(SignedDuration::from_mins(5));
    }
}

#[test]
fn a_refused_prefetch_is_retried_when_the_pod_asks() {
    let mut calls = 0;
    let mut world = World::new(move |key, now| {
        calls += 1;
        if calls <= 2 { Outcome::Failed(Failure::Refused) } else { lives(360)(key, now) }
    });
    let uid = pod_uid();
    world.scheduler.prefetch(uid, START);
    world.act();
    world.pass(secs(12));
    assert_eq!((world.calls_of(uid), world.lives.len()), (2, 0));
    assert_eq!(world.ask(uid), Answer::Joined { likely: true });
    world.pass(secs(1));
    assert!(world.lives.contains_key(&Key::Pod(uid)));
}

#[test]
fn a_prefetch_with_a_waiter_is_retried_in_the_foreground() {
    for outcome in [Outcome::Throttled(None), Outcome::Failed(Failure::Outage)] {
        let mut calls = 0;
        let mut world = World::new(move |key, now| {
            calls += 1;
            if calls == 1 { outcome } else { lives(360)(key, now) }
        });
        let uid = pod_uid();
        world.scheduler.prefetch(uid, START);
        world.act();
        world.ask(uid);
        world.pass(secs(10));
        let priorities: Vec<_> = world.begun.iter().map(|(_, _, priority)| *priority).collect();
        assert_eq!(priorities, [Priority::Prefetch, Priority::Foreground], "{outcome:?}");
    }
}

#[test]
fn a_node_with_few_pods_opens_the_circuit_too() {
    for count in 1..4 {
        let mut world = World::new(|_, _| Outcome::Failed(Failure::Outage));
        let pods: Vec<_> = (0..count).map(|_| pod_uid()).collect();
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(secs(2));
        assert!(world.scheduler.eks_auth_is_unavailable(), "{count}");
        assert_eq!(world.ask(pods[0]), Answer::Joined { likely: false }, "{count}");
    }
}

#[test]
fn one_failing_pod_does_not_open_the_circuit() {
    let bad = pod_uid();
    let mut world = World::new(move |key, now| {
        if key == Key::Pod(bad) { Outcome::Failed(Failure::Outage) } else { lives(360)(key, now) }
    });
    for _ in 0..100 {
        world.ask(bad);
        world.ask(pod_uid());
        world.pass(SignedDuration::from_millis(200));
        assert!(!world.scheduler.eks_auth_is_unavailable());
    }
}

#[test]
fn the_failure_is_remembered_when_credentials_expire_in_an_outage() {
    let begun = START + secs(1);
    let mut world =
        World::new(
            move |key, now| {
                if now < begun { lives(20)(key, now) } else { Outcome::Failed(Failure::Outage) }
            },
        );
    let uid = pod_uid();
    world.ask(uid);
    for _ in 0..21 {
        world.pass(secs(60));
        world.ask(uid);
    }
    assert!(world.scheduler.entries[&Key::Pod(uid)].failed.is_some_and(|failed| failed.times >= 2));
    assert_eq!(world.scheduler.count_failing(world.now), (0, 1));
    world.pass(SignedDuration::from_mins(11));
    assert!(world.scheduler.entries.is_empty(), "but not forever");
}

#[test]
fn a_clock_that_is_set_back_after_an_outage_stops_nothing() {
    let weather = std::rc::Rc::new(std::cell::Cell::new(true));
    let is_fair = std::rc::Rc::clone(&weather);
    let mut world =
        World::new(
            move |key, now| {
                if is_fair.get() { lives(360)(key, now) } else { Outcome::Failed(Failure::Outage) }
            },
        );
    weather.set(false);
    let pods: Vec<_> = (0..5).map(|_| pod_uid()).collect();
    for uid in &pods {
        world.ask(*uid);
    }
    world.pass(secs(5));
    assert!(world.scheduler.eks_auth_is_unavailable());
    weather.set(true);
    world.ask(pods[0]);
    world.pass(secs(5));
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.now -= SignedDuration::from_hours(5);
    weather.set(false);
    let (before, other) = (world.begun.len(), pod_uid());
    for _ in 0..50 {
        world.ask(other);
        world.pass(SignedDuration::from_millis(200));
    }
    let calls = world.begun.len() - before;
    assert!(calls < 20, "what fails now is no leftover of the outage: {calls} calls in ten seconds");
    assert!(world.scheduler.eks_auth_is_unavailable());
}

#[test]
fn pods_without_a_token_retry_one_by_one_until_one_has_a_token() {
    let weather = std::rc::Rc::new(std::cell::Cell::new(false));
    let has_tokens = std::rc::Rc::clone(&weather);
    let mut world =
        World::new(
            move |key, now| {
                if has_tokens.get() { lives(360)(key, now) } else { Outcome::Failed(Failure::NoToken) }
            },
        );
    world.scheduler = Scheduler::new(Budget { per_second: 100.0, burst: 100.0 }, 7, START);
    let pods: Vec<_> = (0..100).map(|_| pod_uid()).collect();
    let mut attempts = Vec::new();
    for _ in 0..3_000 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
        attempts.push(world.begun.len());
    }
    let late = attempts[2_999] - attempts[1_499];
    assert!((30..=160).contains(&late), "in the last 150 s: {late}");
    weather.set(true);
    for _ in 0..50 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert_eq!(world.lives.len(), 100, "all have theirs within five seconds");
    let mut alone = World::new(|_, _| Outcome::Failed(Failure::NoToken));
    for _ in 0..6_000 {
        alone.ask(pods[0]);
        alone.pass(SignedDuration::from_millis(100));
    }
    assert!(alone.begun.len() <= 80, "in ten minutes: {}", alone.begun.len());
}

#[test]
fn a_pod_without_a_token_does_not_consume_the_probe() {
    let [good, bad] = [pod_uid(), pod_uid()];
    let weather = std::rc::Rc::new(std::cell::Cell::new(false));
    let is_fair = std::rc::Rc::clone(&weather);
    let mut world = World::new(move |key, now| match is_fair.get() {
        _ if key == Key::Pod(bad) => Outcome::Failed(Failure::NoToken),
        true => lives(360)(key, now),
        false => Outcome::Failed(Failure::Outage),
    });
    for _ in 0..30 {
        world.ask(good);
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.eks_auth_is_unavailable());
    weather.set(true);
    // Its turn is first.
    world.ask(bad);
    world.ask(good);
    let before = world.now;
    while !world.lives.contains_key(&Key::Pod(good)) {
        world.pass(SignedDuration::from_millis(50));
        world.ask(bad);
        world.ask(good);
    }
    let took = world.now.duration_since(before);
    assert!(took <= SignedDuration::from_millis(2_300), "{took}");
}

#[test]
fn a_fetch_that_awaits_its_token_gives_up_its_slot() {
    let mut world = World::new(lives(360));
    world.takes = secs(5);
    world.scheduler = Scheduler::new(Budget { per_second: 1.0, burst: 1.0 }, 7, START);
    let [slow, next] = [pod_uid(), pod_uid()];
    world.ask(slow);
    world.ask(next);
    assert_eq!((world.calls_of(slow), world.calls_of(next)), (1, 0));
    world.scheduler.awaits_token(Key::Pod(slow), world.now);
    world.act();
    assert_eq!((world.calls_of(slow), world.calls_of(next)), (1, 1), "it has its budget, too");
    assert_eq!(world.scheduler.in_flight(), 2);
    assert_eq!(world.scheduler.completed(Key::Pod(slow), Outcome::HasToken, world.now), Completion::Retrying);
    world.under_way.retain(|_, key| *key != Key::Pod(slow));
    world.act();
    world.pass(secs(20));
    assert_eq!((world.calls_of(slow), world.lives.len(), world.scheduler.in_flight()), (2, 2, 0));
}

#[test]
fn a_refused_token_costs_a_call_and_the_next_one_another() {
    let mut tokens = 0;
    let mut world = World::new(move |key, now| {
        tokens += 1;
        if tokens == 1 { Outcome::TokenRefused } else { lives(360)(key, now) }
    });
    world.scheduler = Scheduler::new(Budget { per_second: 0.1, burst: 1.0 }, 7, START);
    let [bad, next] = [pod_uid(), pod_uid()];
    world.ask(bad);
    world.pass(secs(9));
    assert_eq!(
        (world.calls_of(bad), world.scheduler.calling, world.scheduler.in_flight()),
        (1, 0, 1),
        "it has no place"
    );
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.ask(next);
    world.pass(secs(2));
    assert_eq!((world.calls_of(bad), world.calls_of(next)), (2, 0), "it was first");
    world.pass(secs(10));
    assert_eq!((world.calls_of(bad), world.calls_of(next), world.lives.len()), (2, 1, 2));
}

#[test]
fn a_refused_token_closes_the_circuit() {
    let mut world = World::new(|_, now| match now {
        now if now < START + secs(10) => Outcome::Failed(Failure::Outage),
        now if now < START + secs(14) => Outcome::TokenRefused,
        _ => lives(360)(Key::Token([0; 32]), now),
    });
    let uids = [pod_uid(), pod_uid(), pod_uid()];
    for _ in 0..12 {
        for uid in uids {
            world.ask(uid);
        }
        world.pass(secs(1));
    }
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.pass(secs(5));
    assert_eq!((world.lives.len(), world.scheduler.in_flight()), (3, 0));
}

#[test]
fn credentials_from_elsewhere_clear_the_failure() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(secs(1));
    assert_eq!(world.ask(uid), Answer::Refused);
    let life = Life { obtained_at: world.now, expiration: world.now + SignedDuration::from_hours(6) };
    world.scheduler.on_credentials(uid, life, world.now);
    assert_eq!(world.ask(uid), Answer::Joined { likely: true });
}

#[test]
fn a_clock_that_is_set_back_takes_the_schedule_along() {
    let mut world = World::new(lives(60));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(secs(10));
    world.now -= SignedDuration::from_hours(5);
    world.scheduler.asked(Key::Pod(uid), world.now);
    world.act();
    world.pass(SignedDuration::from_mins(25));
    assert_eq!(world.calls_of(uid), 2, "the refresh has come in its time");
    world.ask(pod_uid());
    assert_eq!(world.begun.len(), 3, "and the budget was not stopped");
}

#[test]
fn nothing_is_left_of_a_removed_pod() {
    let mut world = World::new(lives(60));
    let uids: Vec<_> = (0..30).map(|_| pod_uid()).collect();
    for uid in &uids {
        world.ask(*uid);
    }
    for uid in &uids {
        world.scheduler.remove(Key::Pod(*uid));
    }
    let scheduler = &world.scheduler;
    assert!(
        scheduler.entries.is_empty()
            && scheduler.timers.next_at().is_none()
            && scheduler.queue.first().is_none()
    );
    assert_eq!((scheduler.calling, scheduler.in_flight(), scheduler.wake_at()), (0, 0, None));
}

/// As many fetches as an address may have.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const MAX_FETCHES: u8 = FETCHES_PER_ADDRESS as u8;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However many pods there are within the budget, however long their credentials live and whatever was due at once:
    /// nothing that is in use expires before its replacement is there.
    #[test]
    fn nothing_in_use_expires_while_there_is_budget(
        pods in 1_usize..400,
        minutes in 30_i64..400,
        seed in any::<u64>(),
        together in any::<bool>(),
    ) {
        let mut world = World::new(lives(minutes));
        world.scheduler = Scheduler::new(BUDGET, seed, START);
        let uids: Vec<_> = (0..pods).map(|_| pod_uid()).collect();
        for (n, uid) in uids.iter().enumerate() {
            world.ask(*uid);
            if !together {
                world.pass(secs(7));
                uids[..n].iter().for_each(|uid| world.scheduler.asked(Key::Pod(*uid), world.now));
            }
        }
        world.pass(secs(60));
        for _ in 0..40 {
            world.pass(SignedDuration::from_mins(minutes) / 12);
            for uid in &uids {
                world.scheduler.asked(Key::Pod(*uid), world.now);
                let life = world.lives[&Key::Pod(*uid)];
                prop_assert!(world.now < life.expiration);
                let floor = life.fresh_until(freshness::Floor::Imds);
                prop_assert!(world.now < floor, "below the floor");
            }
            world.act();
        }
    }

    /// Waiting keys take turns: none is served twice before all are served once.
    #[test]
    fn turns_are_fair(mut weights in proptest::collection::vec(1..=MAX_FETCHES, 2..8), seed in any::<u64>()) {
        weights.sort_unstable();
        let mut scheduler = Scheduler::new(Budget { per_second: 1.0, burst: 0.0 }, seed, START);
        for (fairness_key, weight) in (0_u8..).zip(&weights) {
            for fetch in 0..*weight {
                let address = [10, 0, 0, fairness_key].into();
                let key = Key::Token([fairness_key * 32 + fetch; 32]);
                let answer = scheduler.ask(key, FairnessKey::Address(address), START);
                let joined = matches!(answer, Answer::Joined { .. });
                prop_assert!(joined);
            }
        }
        let mut served = vec![0; weights.len()];
        let mut now = START;
        while let Some(at) = scheduler.wake_at() {
            now = now.max(at);
            let Some(Action::Fetch(Key::Token(digest), _)) = scheduler.next(now) else { continue };
            let fairness_key = usize::from(digest[0] / 32);
            for (other, times) in served.iter().enumerate() {
                let has_more = *times < weights[other];
                prop_assert!(!has_more || *times >= served[fairness_key], "{served:?}");
            }
            served[fairness_key] += 1;
            if served.iter().zip(&weights).all(|(a, b)| a == b) {
                break;
            }
        }
        prop_assert!(served.iter().all(|times| *times > 0));
    }
}
