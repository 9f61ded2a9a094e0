use std::collections::{BTreeMap, HashSet};

use super::{anonymous::FETCHES_PER_ADDRESS, *};
use crate::{credentials::freshness, testing::pod_uid};

mod anonymous;
mod circuit;
mod properties;
mod schedule;

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
